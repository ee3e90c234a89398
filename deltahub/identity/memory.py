"""Leaves of tensors in memory, remembered for as long as the tensor lives and is not written to.

A backbone that was checked once need not be hashed again for the next delta. What is remembered belongs to the tensor
object and to its address, layout and version counter, which every in-place operation of torch raises; a sample of its
bytes is compared as well, for writes through ``.data``, which the counter does not see.
"""

from __future__ import annotations

__all__ = ["recall", "remember"]

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_SAMPLES = 61
"""A prime number of places, so that no layout repeats at the same step."""

Pair = tuple[bytes, bytes]


@cache
def _known() -> MutableMapping[Any, tuple[object, Pair]]:
    from torch.utils.weak import WeakIdKeyDictionary

    found: MutableMapping[Any, tuple[object, Pair]] = WeakIdKeyDictionary()
    return found


def _state(tensor: Any) -> object | None:
    """What changes when a tensor does; ``None`` where torch cannot tell."""
    import torch

    if not isinstance(tensor, torch.Tensor) or not tensor.numel() or not tensor.is_contiguous():
        return None
    try:
        flat = tensor.detach().view(-1).view(torch.uint8)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu().numpy().tobytes()
        return (tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape), sample)
    except (RuntimeError, TypeError, NotImplementedError):  # an inference tensor, a subclass without memory, …
        return None


def recall(tensor: Any) -> Pair | None:
    """The leaves of a tensor, stored and rounded, if it is as it was when they were remembered."""
    known = _known().get(tensor)
    return known[1] if known is not None and known[0] == _state(tensor) else None


def remember(tensor: Any, pair: Pair) -> None:
    """Keep a tensor's leaves until it is written to or gone."""
    state = _state(tensor)
    if state is not None:
        _known()[tensor] = (state, pair)
