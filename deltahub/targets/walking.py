"""The modules of a backbone, without what deltas have put into them."""

from __future__ import annotations

__all__ = ["SITE_PREFIX", "backbone_modules"]

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SITE_PREFIX = "deltahub:"
"""Sites are child modules of their host under this prefix; their tensors stay out of ``state_dict()``."""


def backbone_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model.named_modules()`` by path, in its order, the root under ``""``; no sites.

    However many deltas are attached, the time depends on the backbone alone: a site is not entered.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        if module._modules:
            prefix = f"{path}." if path else ""
            waiting += [
                (prefix + name, child)
                for name, child in reversed(module._modules.items())
                if child is not None and not name.startswith(SITE_PREFIX)
            ]
    return found
