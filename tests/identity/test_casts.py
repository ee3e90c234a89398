"""Casts, quantised copies, ties, and declarations that are wrong."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from deltahub import identity as I
from deltahub.errors import IdentityError
from tests.identity.cases import TOUCHED, refused, saved, section, values

if TYPE_CHECKING:
    from pathlib import Path

CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize(("theirs", "mine"), CASTS, ids=str)
@pytest.mark.parametrize("leaves", ["both", "exact only", "none"])
def test_a_cast_copy_is_accepted_through_the_bf16_root(
    tmp_path: Path, theirs: torch.dtype, mine: torch.dtype, leaves: str
) -> None:
    # small integers: what float16 and bfloat16 both hold, so that one rounding is as good as two
    base = {n: (t * 8).round().to(theirs) if t.is_floating_point() else t for n, t in values().items()}
    declared = section(saved(tmp_path / "a", base))
    for field in {"both": (), "exact only": ("leaves_bf16",), "none": ("leaves", "leaves_bf16")}[leaves]:
        declared.pop(field, None)
    cast = {name: t.to(mine) if t.is_floating_point() else t for name, t in base.items()}
    folder = saved(tmp_path / "b", cast)
    for level in (I.Level.L3, I.Level.L4):
        report = I.check(declared, files=folder, level=level)
        assert report.root == "bf16"
        assert I.Level.L2 in report.levels
        assert "BF16" in str(report)
    if leaves == "both":
        assert I.check(declared, files=folder).level is I.Level.L3
    model = nn.Module()
    model.layer = nn.ModuleList([nn.Linear(5, 6, bias=False) for _ in range(4)])
    model.register_buffer("step", cast["step"])
    model.norm = nn.Module()
    model.norm.bias = nn.Parameter(cast["norm.bias"])
    model.to(mine).load_state_dict(cast)
    assert I.check(declared, module=model).root == "bf16"
    wrong = {**cast, "layer.0.weight": cast["layer.0.weight"] + 1}
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "c", wrong))
    model.load_state_dict(wrong)
    refused("E_BACKBONE_MISMATCH", declared, module=model)


def test_a_copy_of_which_only_a_part_was_cast(tmp_path: Path) -> None:
    base = values(torch.bfloat16)
    mixed = {**base, "norm.bias": base["norm.bias"].float()}
    declared = section(saved(tmp_path / "a", mixed))
    report = I.check(declared, files=saved(tmp_path / "b", base))
    assert (report.level, report.root) == (I.Level.L4, "bf16")
    refused("E_BACKBONE_MISMATCH", declared, files=tmp_path / "b", level=I.Level.L2)
    base["norm.bias"][0] += 1
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "c", base))


def test_a_quantised_copy(tmp_path: Path) -> None:
    base = values()
    declared = section(saved(tmp_path / "a", base))
    eight = {n: t.to(torch.int8) if n.endswith("weight") else t for n, t in base.items()}
    for i, copied in enumerate(
        (eight, {**eight, "layer.0.weight_scale": torch.ones(1)}, {**base, "layer.0.SCB": torch.ones(1)})
    ):
        text = refused("E_BACKBONE_QUANTISED", declared, files=saved(tmp_path / str(i), copied))
        assert "quantise" in text
    folder = tmp_path / "0"
    root = I.fingerprint(folder).exact
    declared["compatible"] = [{"root": root, "relation": "quantised", "method": "int8"}]
    report = I.check(declared, files=folder)
    assert (report.root, report.level) == ("compatible", I.Level.L4)
    assert "quantised" in str(report)


@pytest.mark.parametrize("level", [I.Level.L3, I.Level.L4])
def test_a_listed_backbone_of_the_same_structure(tmp_path: Path, level: I.Level) -> None:
    base = values()
    declared = section(saved(tmp_path / "a", base))
    other = saved(tmp_path / "b", {n: t + 1 if n.endswith("weight") else t for n, t in base.items()})
    with pytest.raises(IdentityError):
        I.check(declared, files=other, level=level)
    declared["compatible"] = [{"root": I.fingerprint(other).exact, "relation": "safety-tuned"}]
    assert I.check(declared, files=other, level=level).root == "compatible"
    assert I.check(declared, files=tmp_path / "a", level=level).root == "exact"
    with pytest.raises(IdentityError):
        I.check(declared, files=saved(tmp_path / "c", {n: t + 2 for n, t in base.items()}), level=level)


def test_a_tied_alias_that_differs(tmp_path: Path) -> None:
    base = values()
    ties = {"head.weight": "layer.0.weight"}
    declared = section(saved(tmp_path / "a", base))
    declared["identity"]["tied"] = ties
    both = {**base, "head.weight": base["layer.0.weight"].clone()}
    assert I.check(declared, files=saved(tmp_path / "b", both)).root == "exact"
    both["head.weight"][0, 0] += 1
    assert "head.weight equal to layer.0.weight" in refused(
        "E_BACKBONE_TIED", declared, files=saved(tmp_path / "c", both)
    )
    lost = {name: t for name, t in both.items() if name != "layer.0.weight"}
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "d", lost))


@pytest.mark.parametrize(
    ("field", "value", "code", "says"),
    [
        ("algorithm", "blake3", "E_IDENTITY_ALGORITHM", "blake3"),
        ("algorithm", None, "E_IDENTITY_ALGORITHM", "sha256-tree-1"),
        ("exact", "0" * 63, "E_IDENTITY_DIGEST", "not 63"),
        ("bf16", "0" * 128, "E_IDENTITY_DIGEST", "not 128"),
        ("structure", "A" * 64, "E_IDENTITY_DIGEST", "lower case"),
        ("exact", "g" * 64, "E_IDENTITY_DIGEST", "hexadecimal"),
        ("exact", "../../../etc/passwd" + "0" * 45, "E_IDENTITY_DIGEST", "hexadecimal"),
        ("exact", 7, "E_IDENTITY_DIGEST", "string"),
        ("tensors", True, "E_IDENTITY_SECTION", "count"),
        ("tensors", -1, "E_IDENTITY_SECTION", "count"),
        ("tied", [], "E_IDENTITY_SECTION", "tied"),
        ("tied", {"a": "b", "b": "c"}, "E_IDENTITY_SECTION", "tied"),
    ],
)
def test_declarations_that_are_wrong(tmp_path: Path, field: str, value: Any, code: str, says: str) -> None:
    declared = section(saved(tmp_path, values()))
    declared["identity"][field] = value
    assert says in refused(code, declared, files=tmp_path)


def test_leaves_that_are_wrong(tmp_path: Path) -> None:
    declared = section(saved(tmp_path, values()))
    for field in ("leaves", "leaves_bf16"):
        other = copy.deepcopy(declared)
        other[field]["layer.0.weight"] = "ABC"
        assert f"backbone.{field}.layer.0.weight" in refused("E_IDENTITY_DIGEST", other, files=tmp_path)
    refused("E_IDENTITY_SECTION", {**declared, "leaves": []}, files=tmp_path)
    refused("E_IDENTITY_SECTION", [], files=tmp_path)
    with pytest.raises(IdentityError, match="E_IDENTITY_UNKNOWN"):
        I.describe(tmp_path, touched=["none"])
    assert I.leaves(tmp_path, TOUCHED) == declared["leaves"]
