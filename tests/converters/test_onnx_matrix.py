"""Every cell of the export matrix: within the limit, or for a reason that is known."""

from __future__ import annotations

import pytest

from tests.converters.onnx_matrix import ARCHITECTURE_KINDS, LIMIT, cell, cells

pytest.importorskip("onnxruntime")

_QUICK = {("bert-classifier", kind, "merged") for kind in ("lora", "bias", "assign", "dora", "ia3", "diff")}


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [pytest.param(*c, marks=[] if c in _QUICK else pytest.mark.slow, id="-".join(c)) for c in cells()],
)
def test_cell(name: str, kind: str, form: str) -> None:
    found = cell(name, kind, form)
    if isinstance(found, str):
        known = ("no merged form", "no slots", "needs another host", "no bias there", "E_ONNX_UNSUPPORTED")
        assert found.startswith(known), found
        assert (kind, form) not in {(k, "live") for k in ARCHITECTURE_KINDS}, found
    else:
        assert found[0] <= LIMIT
        assert found[1] > 10 * found[0], "the delta does nothing, so the comparison says nothing"
