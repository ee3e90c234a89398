"""Hypercomplex layers of other libraries, which map rows where the kind ``compacter`` maps columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dense", "layer", "same_rank"]


def layer(side: str, rule: Tensor, left: Tensor, right: Tensor | None, bias: Tensor | None) -> dict[str, Tensor]:
    """One layer by the names of the kind: each factor is transposed, left and right change places.

    Args:
        side: ``down`` or ``up``.
        rule: ``[n, n, n]``.
        left: ``[n, in / n, rank]``; or ``[n, in / n, out / n]`` for a weight that is not factored.
        right: ``[n, rank, out / n]``; ``None`` for a weight that is not factored.
        bias: ``[out]``; ``None`` for none.
    """
    import torch

    if right is None:
        right = torch.eye(left.shape[2]).to(left).repeat(left.shape[0], 1, 1)
    return {
        f"{side}_rule": rule.transpose(1, 2).contiguous(),
        f"{side}_left": right.transpose(1, 2).contiguous(),
        f"{side}_right": left.transpose(1, 2).contiguous(),
        f"{side}_bias": left.new_zeros(rule.shape[2] * right.shape[2]) if bias is None else bias,
    }


def same_rank(values: dict[str, Tensor]) -> int:
    """Give both layers of an adapter factors of one rank, by terms of zero; returns it."""
    import torch.nn.functional as F

    rank = max(values[f"{side}_left"].shape[2] for side in ("down", "up"))
    for side in ("down", "up"):
        more = rank - values[f"{side}_left"].shape[2]
        if more:
            values[f"{side}_left"] = F.pad(values[f"{side}_left"], (0, more))
            values[f"{side}_right"] = F.pad(values[f"{side}_right"], (0, 0, 0, more))
    return int(rank)


def dense(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with its two layers multiplied out."""
    import torch

    found = {name: value for name, value in values.items() if name.split("_")[-1] not in {"rule", "left", "right"}}
    for side in ("down", "up"):
        inner = torch.bmm(values[f"{side}_left"], values[f"{side}_right"])
        pairs = zip(values[f"{side}_rule"], inner, strict=True)
        found[side] = torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0)
    return found
