"""The levels of checking: what they report, what they refuse, and what the refusal says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from deltahub import identity as I
from deltahub.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


from tests.identity.cases import refused, saved, section, sharded, values


def test_levels_are_reported(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder)
    source = {"hub": "org/name", "commit": "1" * 40}
    seen = {one["path"]: (one["size"], one["sha256"]) for one in declared["files"]}
    L = I.Level
    reports = {level: I.check(declared, files=folder, level=level, source=source, witnesses=seen) for level in I.Level}
    assert {level: report.levels for level, report in reports.items()} == {
        L.L0: (L.L0, L.L1),
        L.L1: (L.L0, L.L1),
        L.L2: (L.L0, L.L1, L.L2),
        L.L3: (L.L0, L.L1, L.L2, L.L3),
        L.L4: (L.L0, L.L1, L.L2, L.L3, L.L4),
    }
    assert [len(report.hashed) for report in reports.values()] == [0, 0, 0, 2, 6]
    assert reports[L.L3].root == "exact"
    assert "L3 touched; 2 of 6 tensors hashed" in str(reports[L.L3])
    assert I.check(declared, files=folder).levels == (L.L2, L.L3)
    assert I.check(declared, files=sharded(tmp_path / "b", values()), level=L.L4).root == "exact"
    assert L.named("touched") is L.L3
    assert L.named("L4") is L.L4
    with pytest.raises(UsageError, match="E_IDENTITY_LEVEL"):
        L.named("some")
    for wrong in ({}, {"files": folder, "module": nn.Linear(1, 1)}):
        with pytest.raises(UsageError, match="E_IDENTITY_SOURCE"):
            I.check(declared, **wrong)


def test_without_the_leaves_that_are_needed_everything_is_compared(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    for declared, touched in (
        (section(folder, ()), None),
        (section(folder), ["layer.1.weight"]),
        (section(folder), []),
    ):
        report = I.check(declared, files=folder, touched=touched)
        assert report.level is I.Level.L4
        assert len(report.hashed) == 6
    assert I.check(section(folder), files=folder, touched=["layer.0.weight"]).level is I.Level.L3


def test_another_commit_and_other_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder)
    other = {"hub": "org/name", "commit": "2" * 40}
    text = refused("E_BACKBONE_COMMIT", declared, level=I.Level.L0, source=other)
    assert "org/name@" + "2" * 40 in text
    seen = {"model.safetensors": (1, "0" * 64)}
    assert "model.safetensors" in refused("E_BACKBONE_WITNESS", declared, level=I.Level.L1, witnesses=seen)
    report = I.check(declared, files=folder, source=other, witnesses=seen)
    assert report.levels == (I.Level.L2, I.Level.L3)
    assert len(report.notes) == 2
    changed = {name: t + 1 for name, t in values().items()}
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "b", changed), source=other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", ["touched", "elsewhere"])
def test_one_flipped_bit(tmp_path: Path, dtype: torch.dtype, place: str) -> None:
    tensors = values(dtype)
    declared = section(saved(tmp_path / "a", tensors))
    name = "layer.2.weight" if place == "touched" else "layer.1.weight"
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8)[0, 0] ^= 1  # the lowest bit of all: nothing that rounding would show
    folder = saved(tmp_path / "b", tensors)
    model = nn.Module()
    for at, value in tensors.items():
        model.register_buffer(at.replace(".", "_"), value)
    if place == "touched":
        assert "differing: layer.2.weight" in refused("E_BACKBONE_MISMATCH", declared, files=folder)
    else:
        assert I.check(declared, files=folder).level is I.Level.L3
    text = refused("E_BACKBONE_MISMATCH", declared, files=folder, level=I.Level.L4)
    assert "org/name@" in text
    if place == "elsewhere":
        assert "none of the touched tensors differs" in text


def test_ten_names_and_a_count(tmp_path: Path) -> None:
    tensors = {f"t{i:02}": torch.full((2,), float(i)) for i in range(30)}
    declared = section(saved(tmp_path / "a", tensors), tuple(tensors))
    folder = saved(tmp_path / "b", {name: t + 1 for name, t in tensors.items()})
    text = refused("E_BACKBONE_MISMATCH", declared, files=folder)
    assert "t00, t01" in text
    assert "t09 and 20 more" in text
    assert "t10" not in text


def test_missing_extra_and_reshaped_tensors(tmp_path: Path) -> None:
    base = values()
    declared = section(saved(tmp_path / "a", base))
    less = {name: t for name, t in base.items() if name != "layer.0.weight"}
    text = refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "less", less))
    assert "missing: layer.0.weight" in text
    assert "5 tensors where 6 were declared" in text
    more = {**base, "extra": torch.zeros(1)}
    assert "7 tensors" in refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "more", more))
    turned = {**base, "layer.0.weight": base["layer.0.weight"].T}
    text = refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "turned", turned))
    assert "differing: layer.0.weight" in text
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "x", turned), level=I.Level.L2)
