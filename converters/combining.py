"""Merges that are not one sum: what several deltas together make of one tensor, block by block.

A delta alone would turn the backbone's tensor ``W`` into ``W_i``; ``tau_i = W_i - W`` is its task vector. All are
computed in float32 and combined element by element; what a method must know of a whole tensor (a threshold, an angle)
is found in passes of its own over the same blocks, so no tensor is ever held.

    task_arithmetic   W + scale * sum(w_i tau_i)                                        arXiv:2212.04089
    linear            the weighted mean of the models W_i                               arXiv:2203.05482
    ties              trim each tau_i to its largest, elect a sign, mean of who agrees  arXiv:2306.01708
    dare_linear       drop at random, rescale what stays, then task arithmetic          arXiv:2311.03099
    dare_ties         drop at random, rescale, then elect a sign as ties does
    slerp             from one model to the other along the arc between them
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "Blocks", "Method", "threshold"]

METHODS = ("sum", "task_arithmetic", "linear", "ties", "dare_linear", "dare_ties", "slerp")
"""``sum`` lets the deltas act one after another, as :func:`deltahub.load` does; of updates that add it is their sum."""

Blocks = Callable[[], Iterator["tuple[Tensor, list[Tensor | None]]"]]
"""Gives, each time it is called, the blocks of a tensor: the backbone's, and each delta's or ``None`` where it has no
say there; in float32, in the same order every time."""

_TRIMMED = frozenset({"ties"})
_DROPPED = frozenset({"dare_linear", "dare_ties"})
_PARALLEL = 0.9995
"""Cosine beyond which an arc is as good as a line."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How deltas are combined.

    Attributes:
        name: one of :data:`METHODS`.
        weights: one for each delta. Of ``slerp`` with two deltas, their share tells how far to go from the first to
            the second; with one, how far to go from the backbone.
        densities: the share of each task vector that ``ties`` and ``dare`` keep.
        scale: multiplies the combined task vector.
        seed: of what ``dare`` drops.
    """

    name: str
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    scale: float = 1.0
    seed: int = 0

    @classmethod
    def make(
        cls,
        name: str,
        weights: Sequence[float],
        *,
        density: float | Sequence[float] | None = None,
        scale: float = 1.0,
        seed: int = 0,
    ) -> Method:
        """Check what was asked for.

        Raises:
            ConverterError: ``E_MERGE_METHOD``.
        """
        several = [density] * len(weights) if density is None or isinstance(density, int | float) else list(density)
        usual = 0.2 if name in _TRIMMED else 1.0
        densities = tuple(usual if one is None else float(one) for one in several)
        wrong = None
        if name not in METHODS:
            wrong = f"the method is one of {', '.join(METHODS)}"
        elif density is not None and name not in _TRIMMED | _DROPPED:
            wrong = f"{name} keeps everything: it takes no density"
        elif len(densities) != len(weights) or not all(0 < one <= 1 for one in densities):
            wrong = "each delta needs a density above 0, of 1 at most"
        elif not math.isfinite(scale) or (name in {"sum", "linear", "slerp"} and scale != 1.0):
            wrong = f"this is no scale that {name} can use"
        elif name in {"ties", "dare_ties"} and min(weights) <= 0:
            wrong = f"{name} weighs votes: each weight is above 0"
        elif name == "linear" and not math.isfinite(1 / (sum(weights) or math.inf) or math.nan):
            wrong = "the weights of a mean do not sum up to 0"
        elif name == "slerp" and (len(weights) > 2 or not 0 <= _position(weights) <= 1):
            wrong = "slerp goes from one model to another: one delta or two, and a share between 0 and 1"
        if wrong is not None:
            found = f"{name}, weights {list(weights)}, density {density}, scale {scale}"
            raise ConverterError("E_MERGE_METHOD", wrong, found=found)
        return cls(name=name, weights=tuple(weights), densities=densities, scale=scale, seed=seed)

    @property
    def sequential(self) -> bool:
        """Whether the deltas act one after another, which needs none of this."""
        return self.name == "sum"

    def document(self) -> dict[str, object]:
        """What a record says of it."""
        found: dict[str, object] = {"method": self.name}
        if self.name in _TRIMMED | _DROPPED:
            found["densities"] = list(self.densities)
        if self.name in _DROPPED:
            found["seed"] = self.seed
        return found | ({"scale": self.scale} if self.scale != 1.0 else {})

    def combine(self, blocks: Blocks, name: str) -> Iterator[Tensor]:
        """The combined tensor, block by block, in float32.

        Args:
            blocks: what there is to combine.
            name: of the tensor; what is dropped at random depends on the seed, the delta's number, and this.
        """
        if self.name == "slerp":
            yield from self._slerp(blocks)
            return
        limits = [0.0] * len(self.weights)
        if self.name in _TRIMMED:
            limits = [self._limit(blocks, number) for number in range(len(self.weights))]
        draws = [_Draw(self.seed, number, name) for number in range(len(self.weights))]
        for base, models in blocks():
            parts: list[tuple[float, Tensor]] = []
            for number, model in enumerate(models):
                if model is None:
                    continue
                task = model - base
                if self.name in _TRIMMED:
                    task = task * (task.abs() >= limits[number])
                elif self.name in _DROPPED:
                    task = task * draws[number].keep(task, self.densities[number]) / self.densities[number]
                parts.append((self.weights[number], task))
            yield base + self._joined(base, parts)

    def _joined(self, base: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
        import torch

        total = torch.zeros_like(base)
        if self.name in {"ties", "dare_ties"}:
            for weight, task in parts:
                total += weight * task
            elected, mixed, voices = total.sign(), torch.zeros_like(base), torch.zeros_like(base)
            for weight, task in parts:
                agrees = (task.sign() == elected) & (task != 0)
                mixed += weight * task * agrees
                voices += weight * agrees
            return self.scale * mixed / torch.where(voices > 0, voices, 1.0)
        for weight, task in parts:
            total += weight * task
        return total / sum(self.weights) if self.name == "linear" else self.scale * total

    def _limit(self, blocks: Blocks, number: int) -> float:
        density = self.densities[number]
        if density == 1.0:
            return 0.0
        return threshold(lambda: (own - b for b, models in blocks() if (own := models[number]) is not None), density)

    def _slerp(self, blocks: Blocks) -> Iterator[Tensor]:
        dot = first = second = 0.0
        for one, other in _ends(blocks):
            a, b = one.double().flatten(), other.double().flatten()
            dot, first, second = dot + float(a @ b), first + float(a @ a), second + float(b @ b)
        norm = math.sqrt(first * second)
        cosine = max(-1.0, min(1.0, dot / norm)) if norm else 1.0
        position = _position(self.weights)
        here, there = 1 - position, position
        if abs(cosine) <= _PARALLEL:
            angle = math.acos(cosine)
            here, there = (math.sin(share * angle) / math.sin(angle) for share in (here, there))
        for one, other in _ends(blocks):
            yield here * one + there * other


def _position(weights: Sequence[float]) -> float:
    """How far along the arc: of two weights, the second's share."""
    if len(weights) == 1:
        return weights[0]
    return weights[1] / sum(weights) if sum(weights) else math.nan


def _ends(blocks: Blocks) -> Iterator[tuple[Tensor, Tensor]]:
    for base, models in blocks():
        ends = [base if model is None else model for model in models]
        yield (base, ends[0]) if len(ends) == 1 else (ends[0], ends[1])


class _Draw:
    """Which elements stay: the same for the same seed, delta and tensor, wherever it is computed."""

    def __init__(self, seed: int, number: int, name: str) -> None:
        key = hashlib.sha256(f"{seed}\0{number}\0{name}".encode()).digest()
        self._random = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))

    def keep(self, like: Tensor, density: float) -> Tensor:
        import torch

        return torch.from_numpy(self._random.random(like.numel(), dtype=np.float32) < density).view(like.shape)


def threshold(parts: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The smallest magnitude among the largest ``density * n`` of all values, exactly, in two passes.

    Bits of a magnitude are ordered as the magnitude is, so its upper and then its lower half are counted. Values that
    equal the threshold are all kept.

    Args:
        parts: gives the values in float32, in pieces; called twice.
        density: the share to keep; at least one value is kept.
    """
    upper, total = np.zeros(1 << 16, np.int64), 0
    for part in parts():
        bits = _magnitudes(part)
        upper += np.bincount(bits >> 15, minlength=1 << 16)
        total += bits.size
    if not total:
        return 0.0
    wanted = max(1, int(density * total))
    above = np.cumsum(upper[::-1])[::-1]
    half = int(np.nonzero(above >= wanted)[0][-1])
    wanted -= int(above[half + 1]) if half + 1 < above.size else 0
    lower = np.zeros(1 << 15, np.int64)
    for part in parts():
        bits = _magnitudes(part)
        lower += np.bincount(bits[bits >> 15 == half] & 0x7FFF, minlength=1 << 15)
    rest = np.cumsum(lower[::-1])[::-1]
    found = half << 15 | int(np.nonzero(rest >= wanted)[0][-1])
    return float(np.array(found, np.uint32).view(np.float32))


def _magnitudes(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    flat = values.contiguous().view(-1).numpy().view(np.int32)
    bits: np.ndarray[tuple[int], np.dtype[np.int32]] = flat & 0x7FFFFFFF
    return bits
