"""DeltaHub: one package format for every kind of delta over a frozen backbone, and one loader.

    model = deltahub.load("user/delta")

fetches and verifies the package, fetches and verifies the backbone, and injects the delta.
The names below are looked up when they are first used, so that ``import deltahub``, the command
line's help and everything that only reads manifests cost no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltahub import converters
    from deltahub.attaching import attach
    from deltahub.composition import deltas, using
    from deltahub.delta import Delta, push, save
    from deltahub.errors import DeltaHubError
    from deltahub.hub import pull, search
    from deltahub.identity import fingerprint
    from deltahub.inspecting import inspect
    from deltahub.opening import load, verify

__all__ = [
    "Delta",
    "DeltaHubError",
    "__version__",
    "attach",
    "converters",
    "deltas",
    "fingerprint",
    "inspect",
    "load",
    "pull",
    "push",
    "save",
    "search",
    "using",
    "verify",
]

__version__ = "0.1.0"

_ROOMS = {
    "Delta": "delta",
    "DeltaHubError": "errors",
    "attach": "attaching",
    "deltas": "composition",
    "fingerprint": "identity",
    "inspect": "inspecting",
    "load": "opening",
    "pull": "hub",
    "push": "delta",
    "save": "delta",
    "search": "hub",
    "using": "composition",
    "verify": "opening",
}


def __getattr__(name: str) -> object:
    if name == "converters":
        return importlib.import_module("deltahub.converters")
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"module 'deltahub' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"deltahub.{room}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
