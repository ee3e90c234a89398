"""Delta algebra against dense updates in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import deltahub
from deltahub.converters import combine
from deltahub.errors import ConverterError, DeltaHubError
from deltahub.package import Package
from tests.converters import tiny

Make = Callable[..., Path]
Array = np.ndarray[Any, Any]


def dense(package: Package) -> dict[str, Array]:
    """What a package adds to each weight, and to each bias."""
    found: dict[str, Array] = {}

    def add(name: str, value: Array) -> None:
        found[name] = found[name] + value if name in found else value

    for module in package.manifest.modules:
        scale = float(package.config(module.name)["scale"])  # type: ignore[arg-type]
        for path, tensors in package.tensors(module.name).items():
            own = {name: value.double().numpy() for name, value in tensors.items()}
            if module.kind == "lora":
                add(f"{path}.weight", scale * own["up"] @ own["down"])
            elif module.kind == "diff":
                add(f"{path}.weight", scale * own["weight"])
                add(f"{path}.bias", scale * own["bias"])
            else:
                add(f"{path}.bias", scale * own["value"])
    return found


@pytest.fixture
def two(backbone: Make, tmp_path: Path) -> tuple[Path, Package, Package]:
    base = backbone("bert")
    packages = []
    plans: list[Any] = [
        [("lora", ["query", "output.dense"], {"rank": 3, "scale": 2.0}), ("bias", ["query"], {})],
        [("lora", ["query"], {"rank": 2, "scale": 0.5}), ("diff", ["query"], {}), ("bias", ["key"], {})],
    ]
    for number, plan in enumerate(plans):
        model = tiny.load_model("bert", base)
        deltas = []
        for i, (kind, targets, config) in enumerate(plan):
            delta = deltahub.attach(model, kind, targets, name=f"{kind}{i}", **config)
            tiny.randomise(delta, 10 * number + i)
            deltas.append(delta)
        packages.append(tiny.package_of(tmp_path / f"p{number}", model, deltas, base))
    return base, packages[0], packages[1]


def same(one: dict[str, Array], other: dict[str, Array], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.abs(value - other[name]).max() <= tolerance, name


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0], [0.25, 0.75]])
def test_sums_are_sums(weights: list[float], two: Any, tmp_path: Path) -> None:
    _, one, other = two
    a, b = dense(one), dense(other)
    names = a.keys() | b.keys()
    wanted = {n: weights[0] * a.get(n, np.zeros(1)) + weights[1] * b.get(n, np.zeros(1)) for n in names}
    found = combine([one, other], tmp_path / "out", weights=weights)
    same(dense(found), wanted)
    ranks = {path: t["up"].shape[1] for m in found.manifest.modules if m.kind == "lora"
             for path, t in found.tensors(m.name).items()}  # fmt: skip
    assert {rank for path, rank in ranks.items() if path.endswith("query")} == {5}
    assert {rank for path, rank in ranks.items() if path.endswith("dense")} == {3}


def test_a_sum_acts_as_both_do(two: Any, tmp_path: Path) -> None:
    base, one, other = two
    combine([one, other], tmp_path / "sum", weights=[1.0, 0.5])
    ids = torch.arange(1, 9)[None]
    model = deltahub.load(one.path, backbone=base, name="one")
    deltahub.load(other.path, backbone=model, name="other", verify=None)
    deltahub.deltas(model)["other"].scale = 0.5
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.allclose(deltahub.load(tmp_path / "sum", backbone=base)(ids).logits, wanted, atol=1e-5)


def test_concatenated_ranks_are_the_very_numbers(two: Any, tmp_path: Path) -> None:
    _, one, _ = two
    found = combine([one, one], tmp_path / "out", only=["lora0-0"])
    (module,) = found.manifest.modules
    assert module.config["rank"] == 6
    path = module.paths[0]
    assert torch.equal(found.tensor(f"{module.name}/{path}/up")[:, :3], one.tensor(f"lora0-0/{path}/up"))


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.9}, {"rank": 100}])
def test_recompressed_is_the_best_of_its_rank(options: dict[str, Any], two: Any, tmp_path: Path) -> None:
    _, one, other = two
    whole = dense(combine([one, other], tmp_path / "whole", only=["*query"]))
    found = combine([one, other], tmp_path / "small", only=["*query"], **options)
    low = [m for m in found.manifest.modules if m.kind == "lora"]
    exact = combine([one, other], tmp_path / "exact", only=["*query"])
    for module in low:
        for path in module.paths:
            wide = next(m for m in exact.manifest.modules if m.kind == "lora" and path in m.paths)
            full = float(wide.config["scale"]) * (
                exact.tensor(f"{wide.name}/{path}/up").double() @ exact.tensor(f"{wide.name}/{path}/down").double()
            )
            values = np.linalg.svd(full.numpy(), compute_uv=False)
            count = int(module.config["rank"])
            left = np.linalg.norm(whole[f"{path}.weight"] - dense(found)[f"{path}.weight"])
            assert left == pytest.approx(np.sqrt((values[count:] ** 2).sum()), abs=1e-5)
            if "energy" in options:
                assert (values[:count] ** 2).sum() >= 0.9 * (values**2).sum()
            assert count <= 5


def test_scaled_split_and_cast(two: Any, tmp_path: Path) -> None:
    _, one, _ = two
    same(dense(combine(one, tmp_path / "scaled", weights=-0.5)), {n: -0.5 * v for n, v in dense(one).items()})
    parts = [dense(combine(one, tmp_path / name, only=[glob])) for name, glob in (("a", "*query"), ("b", "*dense"))]
    same(parts[0] | parts[1], dense(one))
    assert not parts[0].keys() & parts[1].keys()
    half = combine(one, tmp_path / "half", dtype="bfloat16")
    assert {half.info(name).dtype for name in half.names} == {"BF16"}
    assert half.size < one.size


def test_renamed_for_another_architecture(two: Any, backbone: Make, tmp_path: Path) -> None:
    _, one, _ = two
    bare = backbone("bert-base", seed=3)
    found = combine(one, tmp_path / "bare", rename={"bert": ""}, backbone=bare)
    same(dense(found), {name.removeprefix("bert."): value for name, value in dense(one).items()})
    model = deltahub.load(found.path, backbone=bare)
    assert type(model).__name__ == "BertModel"


def test_what_is_no_sum_is_refused(two: Any, backbone: Make, tmp_path: Path) -> None:
    base, one, _ = two
    model = tiny.load_model("bert", base)
    head = deltahub.attach(model, "assign", ["classifier", "query"])
    fixed = tiny.package_of(tmp_path / "fixed", model, [head], base)
    elsewhere = backbone("bert", seed=9)
    other_model = tiny.load_model("bert", elsewhere)
    low = deltahub.attach(other_model, "lora", ["query"], rank=2)
    stranger = tiny.package_of(tmp_path / "stranger", other_model, [low], elsewhere)
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("E_COMBINE_KIND", fixed, {"weights": 2.0}),
        ("E_COMBINE_KIND", [fixed, one], {}),
        ("E_COMBINE_BACKBONE", [one, stranger], {}),
        ("E_COMBINE_WEIGHTS", one, {"weights": [1.0, 2.0]}),
        ("E_COMBINE_OPTIONS", one, {"rank": 2, "energy": 0.5}),
        ("E_COMBINE_OPTIONS", one, {"rename": {"a": "b"}}),
        ("E_COMBINE_OPTIONS", one, {"dtype": "int8"}),
        ("E_COMBINE_EMPTY", one, {"only": ["nowhere"]}),
    ]
    big = combine(one, tmp_path / "large")
    with torch.no_grad():
        for name in big.names:
            big.tensor(name).fill_(1e6)
    cases.append(("E_PACKAGE_VALUES", big, {"dtype": "float16"}))
    for code, packages, options in cases:
        with pytest.raises(DeltaHubError) as caught:
            combine(packages, tmp_path / "no", **options)
        assert caught.value.code == code, caught.value
        assert isinstance(caught.value, ConverterError) or code.startswith("E_PACKAGE")
        assert not (tmp_path / "no").exists()


def test_the_verb(two: Any, tmp_path: Path) -> None:
    from deltahub.cli import app

    _, one, other = two
    paths = [str(one.path), str(other.path)]
    out = ["--out", str(tmp_path / "out"), "--weight", "1", "--weight", "-1", "--rank", "2"]
    done = CliRunner().invoke(app, ["combine", *paths, *out])
    assert done.exit_code == 0, done.output
    assert {m.config["rank"] for m in Package.open(tmp_path / "out").manifest.modules if m.kind == "lora"} == {2}
