"""Other updates of a weight as plain low-rank ones: exactly where their form allows it, by an SVD where asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Plain", "padded", "plain"]


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A site as a plain low-rank update with a scale of 1.

    Attributes:
        entry: of kind ``lora``.
        error: the Frobenius norm of what is lost over that of the update; 0 where nothing is but rounding.
    """

    entry: Entry
    error: float = 0.0


def plain(entry: Entry, base: Base | None, *, most: int, rank: int | None) -> Plain | str:
    """A site as a plain low-rank update.

    Args:
        entry: the site.
        base: the backbone, which an approximation is made against.
        most: the largest rank that will do.
        rank: of an approximation; ``None`` where none was asked for.

    Returns:
        The update; or why there is none.
    """
    if entry.kind == "lora":
        if entry.config.get("biased"):
            return f"lora at {entry.path}: it adds a bias of its own"
        found = entry
    else:
        make = _EXACT.get(entry.kind)
        pair = None if make is None or any(v.ndim > 2 for v in entry.tensors.values()) else make(entry)
        if pair is None or pair[0].shape[0] > most:
            return _approximated(entry, base, most=most, rank=rank, exact=None if pair is None else pair[0].shape[0])
        found = _entry(entry, *pair)
    own = int(found.config["rank"])
    if own > most:
        return _approximated(entry, base, most=most, rank=rank, exact=own)
    up, scale = found.tensors["up"], float(found.config["scale"])
    up = up if scale == 1.0 else (up.double() * scale).to(up.dtype)
    if not bool(up.isfinite().all()):
        return f"{entry.kind} at {entry.path}: its scale is too large for {str(up.dtype).removeprefix('torch.')}"
    return Plain(entry=replace(found, config={"rank": own, "scale": 1.0}, tensors={**found.tensors, "up": up}))


def padded(entry: Entry, rank: int) -> Entry:
    """The same update at a higher rank, with zeros."""
    import torch

    more = rank - int(entry.config["rank"])
    if more <= 0:
        return entry
    down, up = entry.tensors["down"], entry.tensors["up"]
    tensors = {
        "down": torch.cat([down, down.new_zeros(more, *down.shape[1:])]),
        "up": torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1),
    }
    return replace(entry, config={**entry.config, "rank": rank}, tensors=tensors)


def _entry(entry: Entry, down: Tensor, up: Tensor) -> Entry:
    dtype = next(value.dtype for value in entry.tensors.values() if value.is_floating_point())
    config = {"rank": int(down.shape[0]), "scale": 1.0}
    tensors = {"down": down.to(dtype).contiguous(), "up": up.to(dtype).contiguous()}
    return Entry(path=entry.path, kind="lora", config=config, tensors=tensors, group="lora")


_Pair = tuple["Tensor", "Tensor"]


def _loha(entry: Entry) -> _Pair | None:
    """The product of two sums of outer products, element by element, is a sum over all pairs of them."""
    import torch

    if entry.config.get("tucker"):
        return None
    t = {name: value.double() for name, value in entry.tensors.items()}
    up = torch.einsum("or,os->ors", t["up_1"], t["up_2"]).flatten(1)
    down = torch.einsum("ri,si->rsi", t["down_1"], t["down_2"]).flatten(0, 1)
    return down, up * float(entry.config["scale"])


def _lokr(entry: Entry) -> _Pair | None:
    """``w1 ⊗ (u v) = (w1 ⊗ u) (1 ⊗ v)``: as many ranks as the first matrix has columns, times those of the second."""
    import torch

    t = {name: value.double() for name, value in entry.tensors.items()}
    first = t["w1"] if "w1" in t else t["w1_up"] @ t["w1_down"]
    if "w2" in t:
        u, s, v = torch.linalg.svd(t["w2"], full_matrices=False)
        left, right = (u * s).contiguous(), v.contiguous()
    elif "w2_down" in t:
        left, right = t["w2_up"], t["w2_down"]
    else:
        return None
    eye = torch.eye(first.shape[1], dtype=torch.float64)
    return torch.kron(eye, right), torch.kron(first, left) * float(entry.config["scale"])


def _adalora(entry: Entry) -> _Pair:
    t = {name: value.double() for name, value in entry.tensors.items()}
    return t["down"], t["up"] * t["values"] * float(entry.config["scale"])


_EXACT: Mapping[str, Callable[[Entry], _Pair | None]] = {"adalora": _adalora, "loha": _loha, "lokr": _lokr}


def _approximated(entry: Entry, base: Base | None, *, most: int, rank: int | None, exact: int | None) -> Plain | str:
    what = f"{entry.kind} at {entry.path}"
    if rank is None:
        if exact is not None:
            return f"{what}: it is of rank {exact}, and {most} is the largest"
        return f"{what}: it is no low-rank update; ask for an approximation, or merge it"
    change = _change(entry, base)
    if change is None:
        return f"{what}: it is no change of a weight"
    import torch

    u, s, v = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank, most, len(s))
    down, up = v[:kept], u[:, :kept] * s[:kept]
    total = float(s.square().sum())
    error = (float(s[kept:].square().sum()) / total) ** 0.5 if total else 0.0
    return Plain(entry=_entry(entry, down, up), error=error)


def _change(entry: Entry, base: Base | None) -> Tensor | None:
    """What a site adds to its module's weight, in float64; ``None`` where it is not that alone."""
    from deltahub.sites import Bound, change_of

    if base is None:
        raise ConverterError(
            "E_CONVERT_BACKBONE", "an approximation is made against the backbone's weights", where=entry.path,
            hint="pass the backbone",
        )  # fmt: skip
    host, kind = base.arch.host(entry.path), entry.resolved()
    config: Mapping[str, Any] = kind.check_config(entry.config)
    if host.shape.family != "linear" or not kind.mergeable(config, host.shape):
        return None
    weight = base.weight(entry.path)
    if weight is None:
        return None
    bound = Bound(kind, config, host.shape, runs=host.runs)
    if "bias" in bound.ports:
        return None
    names = list(kind.tensors(config, host.shape, known={n: tuple(t.shape) for n, t in entry.tensors.items()}))
    change = change_of(bound, names, [entry.tensors[name] for name in names])
    whole = weight.double()
    return change.new("weight", None, whole, None) - whole
