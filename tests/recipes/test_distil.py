"""A distillation lowers every term that it logs, can be stopped and resumed, and ends in a package that loads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import deltahub
from deltahub import presets
from deltahub.errors import UsageError
from deltahub.recipes import Options, distil, warm_start
from deltahub.recipes.data import random_batches
from tests.diffusion import dit, inputs_of, pixart, sample, unet


def sharp(model: Any) -> Any:
    """A random teacher whose attention is not uniform."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "attn1.to_q" in name or "attn1.to_k" in name:
                p.mul_(6)
    return model


def quick(**changes: Any) -> Options:
    # A random teacher cannot predict noise: the term against it would say nothing.
    return Options(**{"steps": 24, "supervised": 0.0, "features": 1.0, "warmup": 4, "lr": 3e-3, "ema": 0.9, **changes})


@pytest.mark.parametrize("make", [unet, pixart])
@pytest.mark.parametrize(("mode", "loss"), [("stream", "released"), ("stream", "paper"), ("teacher", "released")])
def test_every_logged_term_falls(make: Any, mode: str, loss: str, tmp_path: Path) -> None:
    model, bare = sharp(make()), sharp(make())
    delta = presets.attach_preset(model, "paper-table1", name="it", seed=0, kernel=3)
    assert warm_start(delta) == len(delta.sites)
    batches = itertools.islice(random_batches(model, sizes=((16, 16), (8, 24)), seed=1), 2)
    heard: list[int] = []
    result = distil(
        model,
        delta,
        itertools.cycle(list(batches)),
        tmp_path,
        options=quick(mode=mode, loss=loss),
        probe=inputs_of(model, 10, 14),
        progress=lambda step, of, terms: heard.append(step),
    )
    assert heard == list(range(1, 25))
    assert set(result.history) == ({"features"} if mode == "teacher" else {"distilled", "features"})
    for name in result.history:
        before, after = result.change(name, 4)
        assert after < before, name
    inputs = inputs_of(model, 12, 20)
    again = deltahub.load(tmp_path / "package", backbone=bare)
    assert torch.equal(sample(again, inputs), sample(model, inputs))
    assert result.package.probe() is not None
    assert (tmp_path / "losses.csv").read_text().count("\n") == 25
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"


def test_a_warm_start_is_nearer_than_a_cold_one() -> None:
    from deltahub.recipes.features import distance, watch

    distances = []
    for warm in (False, True):
        model = sharp(pixart())
        delta = deltahub.attach(model, "delta-conv", "**.attn1", name="it", seed=0, kernel=3)
        if warm:
            warm_start(delta)
        batch = next(random_batches(model))
        with torch.no_grad(), deltahub.using(model), watch(model, delta, around=False) as teacher:
            model(**batch.inputs)
        with torch.no_grad(), watch(model, delta, around=False) as student:
            model(**batch.inputs)
        distances.append(float(distance(student.outputs, teacher.outputs)))
    assert distances[1] < 0.7 * distances[0]


def test_linear_attention_starts_with_the_teachers_projections() -> None:
    model = pixart()
    delta = deltahub.attach(model, "linear-attention", "**.attn1", name="it", heads=2, middle=8, biased=True)
    assert warm_start(delta) == 2
    host, site = delta.parts[0].sites[0]
    assert torch.equal(site.query, host.to_q.weight)
    assert torch.equal(site.result_bias, host.to_out[0].bias)


def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path: Path) -> None:
    def run(folder: Path, *, steps: int) -> Any:
        model = sharp(dit())
        delta = deltahub.attach(model, "delta-conv", "**.attn1", name="it", seed=0, kernel=3)
        torch.manual_seed(0)
        return distil(
            model,
            delta,
            random_batches(model, seed=2),
            folder,
            options=quick(steps=steps, save_every=3, mode="teacher"),
        )

    whole = run(tmp_path / "whole", steps=6)
    run(tmp_path / "parts", steps=3)
    parts = run(tmp_path / "parts", steps=6)
    assert parts.history == whole.history
    mine = (tmp_path / "parts/package/delta.safetensors").read_bytes()
    assert mine == (tmp_path / "whole/package/delta.safetensors").read_bytes()


def test_checkpointing_and_a_cache_change_nothing_but_cost(tmp_path: Path) -> None:
    histories = []
    for name, more in (("plain", {}), ("checkpointed", {"checkpointing": True})):
        model = sharp(pixart())
        delta = deltahub.attach(model, "delta-conv", "**.attn1", name="it", seed=0, kernel=3)
        result = distil(model, delta, random_batches(model), tmp_path / name, options=quick(steps=3, **more))
        histories.append(result.history)
    for name, values in histories[0].items():
        assert values == pytest.approx(histories[1][name], rel=1e-5)
    model = sharp(pixart())
    delta = deltahub.attach(model, "delta-conv", "**.attn1", name="it", seed=0, kernel=3)
    result = distil(
        model, delta, random_batches(model), tmp_path / "cached", options=quick(steps=12, mode="teacher", cache=2)
    )
    assert result.history["features"][-1] < result.history["features"][0]


def test_wrong_options_and_too_few_batches(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mode"):
        Options(mode="dream")
    model = pixart()
    delta = deltahub.attach(model, "delta-conv", "**.attn1", name="it", kernel=3)
    with pytest.raises(UsageError, match="too few"):
        distil(model, delta, itertools.islice(random_batches(model), 2), tmp_path / "a", options=quick(steps=3))
    distil(model, delta, random_batches(model), tmp_path / "b", options=quick(steps=2, save_every=2))
    other = deltahub.attach(unet(), "delta-conv", "mid_block.**.attn1", name="it", kernel=3)
    with pytest.raises(UsageError, match="another delta"):
        distil(other._model, other, random_batches(other._model), tmp_path / "b", options=quick(steps=3))
    with pytest.raises(UsageError, match="how this model is called"):
        next(random_batches(torch.nn.Linear(1, 1)))
