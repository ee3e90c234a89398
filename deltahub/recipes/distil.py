"""Distillation of any replaced module from the frozen model around it: layer by layer, by the output, or both.

The teacher is the very same model with the delta at rest, so no second copy is held.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.composition import using
from deltahub.errors import UsageError
from deltahub.package import Package
from deltahub.recipes.data import Batch
from deltahub.recipes.features import Seen, distance, first, min_snr, watch
from deltahub.recipes.plot import loglog

if TYPE_CHECKING:
    from deltahub.delta import Delta

__all__ = ["Options", "Result", "distil"]

Progress = Callable[[int, int, Mapping[str, float]], None]
"""Called with the step, the number of steps and the terms of the loss."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a distillation runs; the defaults are those of the ΔConvFusion release.

    Attributes:
        steps: of the optimiser.
        mode: ``stream`` runs the student as a whole and compares what its own hidden states become; ``teacher`` shows
            every replaced module what the teacher's module saw, so that each learns by itself.
        loss: ``released`` compares hidden states behind the enclosing blocks and outputs by plain squares; ``paper``
            compares the modules' own outputs, and weighs outputs by ``min(gamma * snr, 1)``.
        supervised: weight of the error against the noise that was added.
        distilled: weight of the error against the teacher's prediction.
        features: weight of the hidden states.
        gamma: of the paper's weights.
        lr: of AdamW, after ``warmup`` steps.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup: steps.
        clip: greatest norm of a gradient.
        ema: decay of the average that is published; 0 publishes the last tensors.
        checkpointing: recompute activations, where the model can.
        cache: batches whose teacher is remembered (``teacher`` mode).
        save_every: steps between checkpoints to resume from; 0 for none.
        mixed_precision: as accelerate takes it: ``no``, ``fp16``, ``bf16``.
    """

    steps: int = 1000
    mode: str = "stream"
    loss: str = "released"
    supervised: float = 1.0
    distilled: float = 1.0
    features: float = 0.001
    gamma: float = 5.0
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.03
    warmup: int = 500
    clip: float = 1.0
    ema: float = 0.999
    checkpointing: bool = False
    cache: int = 0
    save_every: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name, known in (("mode", ("stream", "teacher")), ("loss", ("released", "paper"))):
            if getattr(self, name) not in known:
                raise UsageError(
                    "E_USAGE_RECIPE", f"{name} must be {' or '.join(known)}", where="distil", found=getattr(self, name)
                )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a distillation gave.

    Attributes:
        package: the package that it ended in.
        history: each term of the loss at each step.
        folder: where the package, ``losses.csv`` and ``losses.png`` are.
    """

    package: Package
    history: Mapping[str, tuple[float, ...]]
    folder: Path

    def change(self, term: str, window: int = 5) -> tuple[float, float]:
        """Means of a term over the first and the last steps."""
        values = self.history[term]
        return sum(values[:window]) / len(values[:window]), sum(values[-window:]) / len(values[-window:])


@dataclass(kw_only=True)
class _Run:
    """One training, as far as it is."""

    model: nn.Module
    delta: Delta
    options: Options
    folder: Path
    accelerator: Any
    optimizer: torch.optim.Optimizer = field(init=False)
    names: list[str] = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    average: list[Tensor] = field(init=False)
    history: dict[str, list[float]] = field(default_factory=dict)
    step: int = 0
    taught: dict[int, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = list(self.delta.named_parameters())
        self.names, self.parameters = [n for n, _ in named], [p for _, p in named]
        options = self.options
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters]

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["names"] != self.names:
            raise UsageError(
                "E_USAGE_RECIPE",
                "the checkpoint belongs to another delta",
                where=str(self.checkpoint),
                hint="give another folder, or remove it",
            )
        with torch.no_grad():
            for target, value in itertools.chain(
                zip(self.parameters, state["parameters"], strict=True), zip(self.average, state["average"], strict=True)
            ):
                target.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]

    def save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "names": self.names,
            "parameters": [p.detach().cpu() for p in self.parameters],
            "average": [a.cpu() for a in self.average],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def terms(self, batch: Batch, index: int) -> dict[str, Tensor]:
        """The terms of the loss on one batch, unweighted."""
        options = self.options
        around = options.loss == "released" and options.mode == "stream"
        if options.mode == "teacher":
            seen = self.taught.get(index)
            if seen is None:
                seen = self._teach(batch, around=False)[1]
                if len(self.taught) < options.cache:
                    self.taught[index] = seen
            return {"features": distance(dict(self._layers(seen)), seen.outputs)}
        prediction, seen = self._teach(batch, around=around)
        with watch(self.model, self.delta, around=around) as own:
            mine = first(self.model(**batch.inputs))
        mine, theirs = mine[:, : batch.noise.shape[1]], prediction[:, : batch.noise.shape[1]]
        found: dict[str, Tensor] = {}
        weight = min_snr(batch.snr, options.gamma) if options.loss == "paper" else torch.ones_like(batch.snr)
        for name, target in (("supervised", batch.noise), ("distilled", theirs)):
            if getattr(options, name):
                error = F.mse_loss(mine.float(), target.float(), reduction="none").flatten(1).mean(1)
                found[name] = (weight * error).mean()
        if options.features:
            found["features"] = distance(own.outputs, seen.outputs)
        return found

    def _teach(self, batch: Batch, *, around: bool) -> tuple[Tensor, Seen]:
        with torch.no_grad(), using(self.model), watch(self.model, self.delta, around=around) as seen:
            prediction = first(self.model(**batch.inputs))
        return prediction, seen

    def _layers(self, seen: Seen) -> Iterator[tuple[str, Tensor]]:
        for path, (args, kwargs) in seen.calls.items():
            yield path, first(self.model.get_submodule(path)(*args, **kwargs))

    def advance(self, batch: Batch, index: int) -> dict[str, float]:
        """One step of the optimiser."""
        options = self.options
        rate = options.lr * min(1.0, (self.step + 1) / max(1, options.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.accelerator.autocast():
            terms = self.terms(batch, index)
        total: Any = sum(getattr(options, name) * value for name, value in terms.items())
        self.optimizer.zero_grad()
        self.accelerator.backward(total)
        for p in self.parameters:
            if p.grad is not None and self.accelerator.num_processes > 1:
                p.grad = self.accelerator.reduce(p.grad, "mean")
        nn.utils.clip_grad_norm_(self.parameters, options.clip)
        self.optimizer.step()
        self.step += 1
        decay = min(options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, p in zip(self.average, self.parameters, strict=True):
                mean.lerp_(p.detach(), 1 - decay)
        return {name: float(value.detach()) for name, value in terms.items()}


def distil(
    model: nn.Module,
    delta: Delta,
    batches: Iterable[Batch],
    folder: Path,
    *,
    options: Options = Options(),
    probe: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    readme: str | None = None,
) -> Result:
    """Train the replaced modules of a delta to do what the model's own do.

    Args:
        model: the model; it is frozen.
        delta: attached to it, active; perhaps warm-started by :func:`deltahub.recipes.warm_start`.
        batches: at least as many as there are steps; with several processes each takes its own share of them.
        folder: where the package and the log go; a checkpoint in it is resumed.
        options: how it runs.
        probe: keyword inputs of the model whose outputs the package records.
        progress: told of every step.
        readme: text of the model card.

    Raises:
        UsageError: ``E_USAGE_RECIPE`` where there are too few batches, or a checkpoint of another delta is in the way.
    """
    from accelerate import Accelerator  # type: ignore[import-untyped]

    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, cpu=next(model.parameters()).device.type == "cpu"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if options.checkpointing and hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    run = _Run(model=model, delta=delta, options=options, folder=folder, accelerator=accelerator)
    run.resume()
    device = next(model.parameters()).device
    stride = accelerator.num_processes
    mine = itertools.islice(batches, accelerator.process_index + run.step * stride, None, stride)
    for batch in itertools.islice(mine, options.steps - run.step):
        found = run.advance(batch.to(device), run.step % options.cache if options.cache else run.step)
        for name, value in found.items():
            run.history.setdefault(name, []).append(value)
        if progress is not None:
            progress(run.step, options.steps, found)
        if options.save_every and run.step % options.save_every == 0:
            run.save()
    if run.step < options.steps:
        raise UsageError("E_USAGE_RECIPE", "there are too few batches", expected=options.steps, found=run.step)
    return _finish(run, probe, readme)


def _log(run: _Run) -> None:
    """The terms of the loss as a table and as a picture."""
    with (run.folder / "losses.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *run.history])
        rows.writerows(zip(itertools.count(1), *run.history.values()))
    curves = {
        name: [(i + 1.0, max(v, 1e-12)) for i, v in enumerate(values)] for name, values in run.history.items() if values
    }
    if curves:
        loglog(run.folder / "losses.png", curves, title="Distillation", x="step", y="loss")


def _finish(run: _Run, probe: Mapping[str, Tensor] | None, readme: str | None) -> Result:
    """Publish the average: the log, its plot, the package."""
    if run.options.ema:
        with torch.no_grad():
            for p, mean in zip(run.parameters, run.average, strict=True):
                p.copy_(mean)
    extension = {
        "org.deltahub.distil": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(run.options).items()}
    }
    place = run.folder / "package"
    try:
        if run.accelerator.is_main_process:
            _log(run)
            run.delta.save(place, probe=probe, readme=readme, extensions=extension, overwrite=True)
    finally:
        run.accelerator.wait_for_everyone()
    package = Package.open(place)
    history = {name: tuple(values) for name, values in run.history.items()}
    return Result(package=package, history=history, folder=run.folder)
