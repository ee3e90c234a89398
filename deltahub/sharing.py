"""Tensors that several processes share among them (``DTensor``): all of one, and one that is shared as another is."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

__all__ = ["replicated", "sharded_as", "shared", "whole"]


def shared(value: Any) -> bool:
    """Whether several processes share a tensor: whether it is a ``DTensor``."""
    return type(value) is not Tensor and hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """All of a tensor that several processes share; any other one as it is. Gradients flow back."""
    return cast(Tensor, value.full_tensor()) if shared(value) else value  # type: ignore[attr-defined]


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has all of, shared among them as another one is."""
    if not shared(like):
        return value
    there: Any = replicated(value, like)
    return cast(Tensor, there.redistribute(placements=cast(Any, like).placements))


def replicated(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has all of, said to be so where another one is shared."""
    if shared(value) or not shared(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, like).device_mesh
    return cast(Tensor, DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False))
