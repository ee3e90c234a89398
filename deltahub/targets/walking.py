"""The modules of a backbone, without what deltas have put into them; the names by which data call their classes."""

from __future__ import annotations

__all__ = ["SITE_PREFIX", "backbone_modules", "class_names"]

import functools
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

    def walk(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        if children := module._modules:
            prefix = path and path + "."
            for name, child in children.items():
                if child is not None and name[:_LENGTH] != SITE_PREFIX:
                    walk(child, prefix + name)

    walk(model, "")
    return found


_LENGTH = len(SITE_PREFIX)


@functools.cache
def class_names(cls: type) -> tuple[str, ...]:
    """Library and name of a class and of those above it, such as ``diffusers.Attention``, the nearest first."""
    return tuple(f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in cls.__mro__)
