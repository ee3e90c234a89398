"""Every cell of the export matrix: within the limit, or refused for the reason that the documentation gives."""

from __future__ import annotations

import pytest

from deltahub.errors import ConverterError
from tests.converters.onnx_matrix import FORMS, KINDS, LIMIT, REFUSED, Cell, architecture, hosted, possible
from tests.converters.onnx_models import MODELS, PREFIXED

pytest.importorskip("onnxruntime")


def check(cell: Cell) -> None:
    assert cell.difference <= LIMIT
    assert cell.effect > 10 * cell.difference, "the delta does nothing, so the comparison says nothing"
    assert cell.sizes >= 4


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_on_a_host_of_its_own(form: str) -> None:
    cells = hosted(possible(form), form)
    assert len(cells) >= 30
    for cell in cells.values():
        check(cell)


@pytest.mark.parametrize(("kind", "form"), [("boft", "live"), ("diag-oft", "swappable"), ("adapter", "merged")])
def test_what_cannot_be_says_why(kind: str, form: str) -> None:
    with pytest.raises(ConverterError) as caught:
        hosted([kind], form)
    assert caught.value.code == REFUSED[kind, form][0]
    assert kind in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_architecture(name: str) -> None:
    cells = architecture(name)
    assert {key for key, cell in cells.items() if cell.reason} == {
        *(("adapter", "merged"), ("prefix", "merged")),
        *((("prefix", form) for form in FORMS) if name not in PREFIXED else ()),
    }
    assert len(cells) == len(KINDS) * len(FORMS)
    for cell in cells.values():
        if not cell.reason:
            check(cell)
