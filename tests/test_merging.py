"""Weights merged in pieces: the same numbers as in one, for every kind and every host."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from deltahub import kinds
from deltahub.errors import KindError
from deltahub.hosts import view_of
from deltahub.kinds import Document, Kind
from deltahub.merging import Change, Merging, at_once, stored_transposed
from deltahub.sites import Bound, change_of

HOSTS = {
    "linear": lambda: nn.Linear(2100, 777),
    "no bias": lambda: nn.Linear(2100, 777, bias=False),
    "conv": lambda: nn.Conv2d(8, 16, 3),
    "embedding": lambda: nn.Embedding(2500, 999),
    "norm": lambda: nn.LayerNorm(64),
}


def change(kind: Kind, module: nn.Module, config: dict[str, object], strength: float = 1.0) -> Change:
    view = view_of(module)
    shape = view.shape(module, type(module))
    bound = Bound(kind, kind.check_config(config), shape)
    specs = kind.tensors(bound.config, shape)
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(spec.shape, generator=generator) for spec in specs.values()]
    return change_of(bound, list(specs), tensors, strength)


def both(module: nn.Module, changes: list[Change]) -> tuple[Merging, float]:
    view = view_of(module)
    weight, bias = view.weight(module).detach(), view.bias(module)
    bias = None if bias is None else bias.detach()
    merging = Merging(changes, weight.shape, transposed=stored_transposed(view.canonical), host=module)
    pieces, whole = merging.whole(weight, bias), at_once(changes, module, weight, bias)
    assert (pieces[1] is None) == (whole[1] is None)
    worst = float((pieces[0] - whole[0]).abs().max())
    if pieces[1] is not None:
        worst = max(worst, float((pieces[1] - whole[1]).abs().max()))
    return merging, worst


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", kinds.names())
def test_every_kind_in_pieces_is_the_kind_at_once(name: str, host: str) -> None:
    module, kind = HOSTS[host](), kinds.get(name)
    config = {n: max(1, int(f.minimum or 1)) for n, f in kind.document.config.items() if f.type == "integer"}
    try:
        one = change(kind, module, config)
    except KindError:
        pytest.skip("the kind does not fit this host")
    if not {"weight", "bias"} & set(one.ports):
        pytest.skip("the kind has no merged form")
    _, worst = both(module, [one])
    assert worst <= 2e-5


@pytest.mark.parametrize(("host", "axis", "pieces"), [("linear", 0, 2), ("embedding", 1, 3), ("conv", 0, 1)])
def test_lora_is_cut_along_the_rows_as_stored(host: str, axis: int, pieces: int) -> None:
    module = HOSTS[host]()
    merging, _ = both(module, [change(kinds.get("lora"), module, {"rank": 4, "scale": 2.0}, 0.5)])
    assert merging.axis == axis
    cuts = list(merging.pieces())
    assert len(cuts) == pieces
    assert cuts[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))


def test_several_changes_act_in_order() -> None:
    module = HOSTS["linear"]()
    chain = [change(kinds.get("assign"), module, {}), change(kinds.get("lora"), module, {"rank": 2}, -1.0)]
    merging, worst = both(module, chain)
    assert merging.axis == 0
    assert worst <= 2e-5


@pytest.mark.parametrize(
    ("weight", "tensor", "axis"),
    [
        ("W * rows(gate)", ["out"], 0),
        ("W * columns(gate)", ["out"], None),
        ("W * columns(gate)", ["in"], 0),
        ("W + (gate @ W)", ["out", "out"], None),
        ("W - W @ gate", ["in", "in"], 0),
        ("softmax(W)", ["out"], None),
        ("h = W * rows(gate)\nh / 3", ["out"], 0),
    ],
)
def test_an_equation_that_needs_the_whole_weight_gets_it(weight: str, tensor: list[str], axis: int | None) -> None:
    document = {
        "kind": "com.example.test",
        "version": 1,
        "hosts": ["linear"],
        "tensors": {"gate": {"shape": tensor, "init": "zeros"}},
        "equations": {"weight": weight},
    }
    module = nn.Linear(48, 48, bias=False)
    try:
        one = change(Kind(Document.parse(document)), module, {})
    except KindError:
        assert axis is None  # the kind itself refuses: lengths that do not agree
        return
    merging, worst = both(module, [one])
    assert merging.axis == axis
    assert worst <= 1e-5


def test_half_precision_is_rounded_once() -> None:
    module = nn.Linear(64, 64, bias=False).bfloat16()
    one = change(kinds.get("diff"), module, {})
    weight = module.weight.detach()
    merging = Merging([one], weight.shape)
    new, _ = merging.whole(weight, None)
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, (weight.float() + one.tensors[0]).bfloat16())
