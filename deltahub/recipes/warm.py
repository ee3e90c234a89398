"""Where a replacement of attention starts: at the teacher's own weights, as far as its form has a place for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltahub.delta import Delta
    from deltahub.sites import Site

__all__ = ["warm_start"]


def warm_start(delta: Delta) -> int:
    """Start fresh sites from the attention that they replace.

    ΔConv starts as attention that looks everywhere alike: its mean branch is ``W_o W_v``, its pyramid adds nothing
    yet. Linear attention starts with the teacher's projections.

    Args:
        delta: attached, not trained yet.

    Returns:
        How many sites were changed; those whose host is no attention of diffusers, or whose kind is another, are left.
    """
    changed = 0
    with torch.no_grad():
        for part in delta.parts:
            start = _STARTS.get(part.kind.name)
            for module, site in part.sites:
                if start is not None and all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "to_out")):
                    start(dict(zip(site.names, site.tensors(), strict=True)), module, site)
                    changed += 1
    return changed


def _set(tensors: Mapping[str, Tensor], name: str, value: Tensor | None) -> None:
    if name in tensors:
        tensors[name].copy_(torch.zeros_like(tensors[name]) if value is None else value)


def _delta_conv(tensors: Mapping[str, Tensor], attention: Any, site: Site) -> None:
    out, value = attention.to_out[0], attention.to_v
    bias = None if out.bias is None else out.bias.float()
    if value.bias is not None:
        carried = out.weight.float() @ value.bias.float()
        bias = carried if bias is None else bias + carried
    _set(tensors, "average", out.weight.float() @ value.weight.float())
    _set(tensors, "average_bias", bias)
    for name in ("mix", "mix_sum", "mix_bias"):
        _set(tensors, name, None)


def _linear_attention(tensors: Mapping[str, Tensor], attention: Any, site: Site) -> None:
    places: dict[str, nn.Linear] = {
        "query": attention.to_q,
        "key": attention.to_k,
        "value": attention.to_v,
        "result": attention.to_out[0],
    }
    for name, linear in places.items():
        _set(tensors, name, linear.weight)
        _set(tensors, f"{name}_bias", linear.bias)


_STARTS: Mapping[str, Callable[[Mapping[str, Tensor], Any, Site], None]] = {
    "delta-conv": _delta_conv,
    "linear-attention": _linear_attention,
}
