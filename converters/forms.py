"""How the difference of one weight is said: exactly, or in less room and with a loss that is known.

exact      whole values (kind ``assign``); only the rows that differ, where few do (``tokens``)
dense      the difference in float32 (``diff``)
lowrank    the largest singular triples (``lora``)                                  arXiv:0909.4061
sparse     the largest elements, at their places (``sparse``)
dare       elements chosen at random, rescaled (``sparse``)                         arXiv:2311.03099
sign       one bit for each element, one fitted factor for each row (``diff-sign``) arXiv:2402.10193
int8       whole numbers, one factor for each row (``diff-int8``)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from deltahub.converters.entries import Entry
from deltahub.tensors import Pending

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["FORMS", "LOSSY", "Form", "Option", "best", "options", "pending", "weight_entry"]

LOSSY = ("lowrank", "sparse", "dare", "sign", "int8")
FORMS = ("exact", "dense", *LOSSY, "auto")
_OVERSAMPLE = 16
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1)
_PLACES = 1 << 31
"""Elements of a weight whose places fit into 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one weight's difference is to be.

    Attributes:
        name: one of :data:`FORMS`, but ``auto``.
        rank: of ``lowrank``.
        energy: instead of a rank, the share of the sum of squares to keep.
        max_rank: where ``energy`` gives up.
        density: the share of elements that ``sparse`` and ``dare`` keep.
        seed: of ``dare``.
    """

    name: str
    rank: int | None = None
    energy: float | None = None
    max_rank: int = 256
    density: float = 0.01
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one form would cost: bytes, and the sum of squares that is lost."""

    form: Form
    size: int
    lost: float


def pending(dtype: Any, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is made when it is written: all that is done with it before is to ask for its shape."""
    return cast("Tensor", Pending(dtype=dtype, shape=shape, make=make))


def weight_entry(form: Form, path: str, change: Callable[[], Tensor]) -> Entry | None:
    """One weight's difference in a lossy form; ``None`` where the form cannot say it in less room than it is.

    Args:
        form: which.
        path: of the module.
        change: gives the difference, canonical, in float32, as often as it is asked.
    """
    delta = change()
    if form.name == "lowrank":
        return _lowrank(form, path, delta)
    if form.name in {"sparse", "dare"}:
        return _sparse(form, path, delta)
    if form.name == "sign":
        return _sign(path, delta)
    gain = _int8_gain(delta)
    values = pending(_torch().int8, tuple(delta.shape), lambda: _int8(change(), gain))
    return Entry(path=path, kind="diff-int8", config={"scale": 1.0}, tensors={"values": values, "gain": gain})


def _torch() -> Any:
    import torch

    return torch


def _rows(gain: Tensor, like: Tensor) -> Tensor:
    return gain.view(-1, *(1,) * (like.ndim - 1))


# --- low rank


def _lowrank(form: Form, path: str, change: Tensor) -> Entry | None:
    shape, flat = change.shape, change.reshape(change.shape[0], -1)
    smallest = min(flat.shape)
    total = float(flat.double().square().sum())
    for size in [form.rank] if form.rank is not None else list(_ranks(min(form.max_rank, smallest))):
        u, s, v = _svd(flat, min(size, smallest))
        kept = s.double().square().cumsum(0) / total
        if form.energy is None:
            count = len(s)
        elif float(kept[-1]) < form.energy:
            continue
        else:
            count = int((kept < form.energy).sum()) + 1
        if count * sum(flat.shape) >= flat.numel() and form.energy is not None:
            return None
        root = s[:count].sqrt()
        up, down = (u[:, :count] * root).contiguous(), (root[:, None] * v[:, :count].T).contiguous()
        tensors = {"down": down.reshape(count, *shape[1:]), "up": up}
        return Entry(path=path, kind="lora", config={"rank": count, "scale": 1.0}, tensors=tensors)
    return None


def _ranks(limit: int) -> Iterator[int]:
    size = 8
    while size < limit:
        yield size
        size *= 4
    yield limit


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples: randomised with two power iterations (arXiv:0909.4061) where that is cheaper."""
    import torch

    if rank + _OVERSAMPLE >= min(matrix.shape) // 2:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same checkpoints give the same package
        u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=2)
    return u[:, :rank], s[:rank], v[:, :rank]


# --- a few elements


def _sparse(form: Form, path: str, change: Tensor) -> Entry | None:
    import torch

    flat = change.reshape(-1)
    if flat.numel() >= _PLACES:
        return None
    if form.name == "sparse":
        count = max(1, int(form.density * flat.numel()))
        places = flat.abs().topk(count, sorted=False).indices.sort().values
        values = flat[places]
    else:
        key = hashlib.sha256(f"{form.seed}\0{path}".encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        places = torch.from_numpy(np.flatnonzero(random.random(flat.numel(), dtype=np.float32) < form.density))
        if not places.numel():
            return None
        values = flat[places] / form.density
    tensors = {"places": places.to(torch.int32), "values": values.contiguous()}
    return Entry(path=path, kind="sparse", config={"count": len(places), "scale": 1.0}, tensors=tensors)


# --- a few bits


def _sign(path: str, change: Tensor) -> Entry:
    """The factor of a row is the mean magnitude, which is the least-squares fit to its signs."""
    import torch

    gain = change.abs().flatten(1).mean(1)
    bits = np.packbits((change >= 0).numpy(), axis=1, bitorder="little")
    return Entry(
        path=path, kind="diff-sign", config={"scale": 1.0}, tensors={"signs": torch.from_numpy(bits), "gain": gain}
    )


def _int8_gain(change: Tensor) -> Tensor:
    return change.abs().flatten(1).amax(1) / 127


def _int8(change: Tensor, gain: Tensor) -> Tensor:
    import torch

    rows = _rows(gain, change)
    return torch.where(rows > 0, change / rows, 0.0).round().clamp(-127, 127).to(torch.int8)


# --- choosing


def options(change: Tensor, whole: int, max_rank: int) -> list[Option]:
    """What each form would cost for one difference.

    Args:
        change: canonical, in float32.
        whole: bytes of the exact form.
        max_rank: of low-rank forms.
    """
    flat = change.reshape(change.shape[0], -1)
    total, rows = float(flat.double().square().sum()), flat.shape[0]
    found = [Option(form=Form(name="exact"), size=whole, lost=0.0)]
    gain = _int8_gain(change)
    found.append(
        _option(Form(name="int8"), change.numel() + 4 * rows, change, _int8(change, gain) * _rows(gain, change))
    )
    mean = flat.abs().mean(1, keepdim=True)
    bits = rows * math.ceil(change.shape[1] / 8) * math.prod(change.shape[2:]) + 4 * rows
    found.append(
        Option(form=Form(name="sign"), size=bits, lost=total - float((flat.shape[1] * mean.double() ** 2).sum()))
    )
    squares = flat.double().square().flatten().sort(descending=True).values.cumsum(0)
    for density in _DENSITIES:
        count = max(1, int(density * flat.numel()))
        left = total - float(squares[count - 1])
        found.append(Option(form=Form(name="sparse", density=density), size=8 * count, lost=max(0.0, left)))
    limit = min(max_rank, *flat.shape, _RANKS[-1])
    spectrum = _svd(flat, limit)[1].double().square().cumsum(0)
    for rank in (one for one in _RANKS if one <= limit):
        left = total - float(spectrum[rank - 1])
        found.append(Option(form=Form(name="lowrank", rank=rank), size=4 * rank * sum(flat.shape), lost=max(0.0, left)))
    return [one for one in found if one.size <= whole]


def _option(form: Form, size: int, change: Tensor, made: Tensor) -> Option:
    return Option(form=form, size=size, lost=float((change - made).double().square().sum()))


def best(
    candidates: dict[str, tuple[float, list[Option]]], *, budget: int | None, error: float | None
) -> dict[str, Form]:
    """A form for each weight: the smallest within an error, or the least loss within a budget of bytes.

    Args:
        candidates: by path, the sum of squares of the difference, and what there is to choose from.
        budget: bytes of all together; the smallest forms are taken where even they are more.
        error: greatest relative error of each.
    """
    if error is not None:
        return {
            path: min((o for o in all_ if o.lost <= error**2 * total), key=lambda o: (o.size, o.lost)).form
            for path, (total, all_) in candidates.items()
        }
    assert budget is not None
    chosen = {path: min(all_, key=lambda o: (o.size, o.lost)) for path, (_, all_) in candidates.items()}
    spent = sum(one.size for one in chosen.values())
    while True:  # the step that saves most per byte, as long as one fits
        steps = [
            ((chosen[path].lost - o.lost) / (o.size - chosen[path].size), path, o)
            for path, (_, all_) in candidates.items()
            for o in all_
            if o.size > chosen[path].size
            and o.lost < chosen[path].lost
            and spent + o.size - chosen[path].size <= budget
        ]
        if not steps:
            return {path: one.form for path, one in chosen.items()}
        _, path, taken = max(steps, key=lambda step: step[0])
        spent += taken.size - chosen[path].size
        chosen[path] = taken
