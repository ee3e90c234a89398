"""Merges that are not sums, against mergekit's algorithms as peft has them, and the papers' formulas in NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltahub.attaching import attach
from deltahub.converters.combining import METHODS, Method, threshold
from deltahub.converters.merge import merge
from deltahub.errors import ConverterError
from tests.converters import tiny

Make = Callable[..., Path]
KEY = "model.layers.0.self_attn.q_proj.weight"
Array = np.ndarray[Any, Any]


@pytest.fixture
def three(backbone: Make, tmp_path: Path) -> tuple[Path, list[Any], Array, list[Array]]:
    """A backbone, three packages on it, its weight, and the task vectors of one tensor; the third has none of it."""
    base = backbone("llama")
    packages, tasks = [], []
    start = dict(tiny.load_model("llama", base).named_parameters())[KEY].detach().numpy().astype(np.float64)
    kinds: list[tuple[str, Any]] = [("lora", {"rank": 3, "scale": 2.0}), ("diff", {}), ("lora", {"rank": 2})]
    for number, (kind, options) in enumerate(kinds):
        model = tiny.load_model("llama", base)
        delta = attach(model, kind, ["q_proj"] if number < 2 else ["k_proj"], name=f"d{number}", **options)
        tiny.randomise(delta, number)
        packages.append(tiny.package_of(tmp_path / f"p{number}", model, [delta], base))
        delta.merge(permanently=True)
        tasks.append(dict(model.named_parameters())[KEY].detach().numpy().astype(np.float64) - start)
    return base, packages, start, tasks


def merged(out: Path) -> Array:
    found: Array = dict(tiny.load_model("llama", out).named_parameters())[KEY].detach().numpy()
    return found


def top(task: Array, density: float) -> Array:
    limit = np.sort(np.abs(task).ravel())[::-1][int(density * task.size) - 1]
    return task * (np.abs(task) >= limit)


def ties(tasks: list[Array], weights: list[float]) -> Array:
    """arXiv:2306.01708, equations of section 3, votes weighted."""
    elected = np.sign(sum(w * t for w, t in zip(weights, tasks, strict=True)))
    agree = [(np.sign(t) == elected) & (t != 0) for t in tasks]
    mixed = sum(w * t * a for w, t, a in zip(weights, tasks, agree, strict=True))
    voices = sum(w * a for w, a in zip(weights, agree, strict=True))
    return np.where(voices > 0, mixed / np.maximum(voices, 1e-30), 0.0)


def slerp(one: Array, other: Array, t: float) -> Array:
    angle = np.arccos((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)


def test_every_method_is_its_formula(three: Any, tmp_path: Path) -> None:
    base, packages, start, tasks = three
    weights = [1.0, 2.0, 0.5]
    weighted = sum(w * t for w, t in zip(weights, tasks, strict=True))
    trimmed = [top(task, 0.3) for task in tasks[:2]]
    wanted = {
        "task_arithmetic": (start + 0.7 * weighted, {"scale": 0.7}),
        "linear": (start + weighted / sum(weights), {}),
        "ties": (start + ties(trimmed, weights[:2]), {"density": 0.3}),
        "dare_ties": (start + ties(tasks, weights), {"density": 1.0}),
        "dare_linear": (start + weighted, {"density": 1.0}),
    }
    for method, (expected, options) in wanted.items():
        report = merge(packages, tmp_path / method, backbone=base, weights=weights, method=method, **options)
        assert np.abs(merged(tmp_path / method) - expected).max() < 2e-6, method
        assert len(report.changed) == 4
        record = json.loads((tmp_path / method / "merge.json").read_text(encoding="utf-8"))
        assert record["method"] == method
    merge(packages[:2], tmp_path / "slerp", backbone=base, weights=[0.75, 0.25], method="slerp")
    assert np.abs(merged(tmp_path / "slerp") - slerp(start + tasks[0], start + tasks[1], 0.25)).max() < 2e-6
    merge(packages[0], tmp_path / "arc", backbone=base, weights=0.4, method="slerp")
    assert np.abs(merged(tmp_path / "arc") - slerp(start, start + tasks[0], 0.4)).max() < 2e-6


def test_ties_is_that_of_peft() -> None:
    from peft.utils.merge_utils import ties as theirs

    generator = torch.Generator().manual_seed(0)
    tasks = [torch.randn(40, 25, generator=generator) for _ in range(3)]
    base = torch.randn(40, 25, generator=generator)
    method = Method.make("ties", [1.0, 1.0, 1.0], density=0.4)
    (ours,) = method.combine(lambda: iter([(base, [base + t for t in tasks])]), "w")
    expected = theirs([(base + t) - base for t in tasks], torch.ones(3), 0.4)
    assert torch.allclose(ours - base, expected, atol=1e-6)


def test_what_is_dropped_depends_on_the_seed_alone(three: Any, tmp_path: Path) -> None:
    base, packages, start, tasks = three
    options: dict[str, Any] = {"backbone": base, "method": "dare_linear", "density": 0.5}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        merge(packages[1], tmp_path / name, seed=seed, **options)
    a, b, c = (merged(tmp_path / name) - start for name in "abc")
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    kept = np.abs(a) > 1e-9
    assert 0.4 < kept.mean() < 0.6
    assert np.abs(a - 2 * tasks[1] * kept).max() < 2e-6


def test_blocks_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 8, generator=generator)
    models = [base + torch.randn(64, 8, generator=generator) for _ in range(2)]

    def blocks(step: int) -> Callable[[], Any]:
        cuts = range(0, 64, step)
        return lambda: ((base[i : i + step], [m[i : i + step] for m in models]) for i in cuts)

    for name in METHODS[1:]:
        method = Method.make(name, [0.5, 1.0], density=0.3 if name.startswith(("ties", "dare")) else None)
        whole, cut = (torch.cat(list(method.combine(blocks(step), "w"))) for step in (64, 16))
        assert torch.allclose(whole, cut, atol=1e-6), name


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.5, 0.999])
def test_a_threshold_is_exact(density: float) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 5000)
    values[::7] = 0
    found = threshold(lambda: values.split(999), density)
    wanted = np.sort(np.abs(values.numpy()))[::-1][max(1, int(density * 5000)) - 1]
    assert found == wanted


@pytest.mark.parametrize(
    ("name", "weights", "options"),
    [
        ("mean", [1.0], {}),
        ("sum", [1.0], {"density": 0.5}),
        ("ties", [1.0, 1.0], {"density": [0.5]}),
        ("ties", [1.0, 1.0], {"density": 0.0}),
        ("ties", [1.0, -1.0], {}),
        ("linear", [1.0, -1.0], {}),
        ("slerp", [1.0, 1.0, 1.0], {}),
        ("slerp", [1.5], {}),
        ("slerp", [1.0, -1.0], {}),
        ("slerp", [0.5], {"scale": 2.0}),
        ("task_arithmetic", [1.0], {"scale": float("inf")}),
    ],
)
def test_methods_that_make_no_sense(name: str, weights: list[float], options: dict[str, Any]) -> None:
    with pytest.raises(ConverterError) as caught:
        Method.make(name, weights, **options)
    assert caught.value.code == "E_MERGE_METHOD"


def test_two_fine_tunes_of_one_module_are_combined(backbone: Make, tmp_path: Path) -> None:
    """Two that set the same parameter contradict each other in a sum, and not in a mean."""
    base = backbone("bert")
    packages = []
    for number in range(2):
        model = tiny.load_model("bert", base)
        delta = attach(model, "assign", ["classifier"], name=f"d{number}")
        tiny.randomise(delta, number)
        packages.append(tiny.package_of(tmp_path / f"p{number}", model, [delta], base))
    with pytest.raises(ConverterError) as caught:
        merge(packages, tmp_path / "out", backbone=base)
    assert caught.value.code == "E_MERGE_CONFLICT"
    merge(packages, tmp_path / "out", backbone=base, method="linear")
    found = tiny.load_model("bert", tmp_path / "out").state_dict()
    for name in ("weight", "bias"):
        wanted = sum(p.tensor(f"d{i}/classifier/{name}") for i, p in enumerate(packages)) / 2
        assert torch.allclose(found[f"classifier.{name}"], wanted, atol=1e-6)
