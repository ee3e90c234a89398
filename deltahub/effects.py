"""Whether a delta does anything: measured on its own sites, for packages that bring no probe."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltahub.composition import using
from deltahub.injection import slot_of
from deltahub.sites import Site

if TYPE_CHECKING:
    from deltahub.delta import Delta

__all__ = ["effect_of"]

_ROWS = 4


def effect_of(model: nn.Module, delta: Delta) -> float:
    """Greatest change that a delta makes to a weight or a bias, or else to an output, over its sites.

    Args:
        model: what it is attached to.
        delta: attached and not merged.

    Returns:
        For a kind with merged equations the change of the host's parameters; for one with live equations alone on a
        linear host that of its output for fixed random rows; else the greatest of the delta's own numbers.
    """
    found = 0.0
    for part in delta.parts:
        for module, site in part.sites:
            found = max(found, _on_parameters(module, site) if site.bound.mergeable else _live(model, module, site))
    return found


def _greatest(*tensors: Tensor | None) -> float:
    sizes = [float(t.detach().abs().max()) for t in tensors if t is not None and t.numel() and t.is_floating_point()]
    return max(sizes, default=0.0)


def _on_parameters(module: nn.Module, site: Site) -> float:
    slot = slot_of(module)
    assert slot is not None
    with torch.no_grad():
        view = site.view or slot.view
        weight, bias = slot.transformed(module, [site], view)
        before = view.bias(module)
        added = bias if bias is None or before is None else bias.float() - before.float()
        return _greatest(weight.float() - view.weight(module).float(), added)


def _live(model: nn.Module, module: nn.Module, site: Site) -> float:
    shape = site.bound.shape
    if shape.family != "linear" or shape.d_in is None:
        return _greatest(*site.tensors())
    like = next(module.parameters())
    x = torch.randn(_ROWS, shape.d_in, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
    with torch.no_grad():
        with using(model, site.delta):
            acting = module(x)
        with using(model):
            return _greatest(acting.float() - module(x).float())
