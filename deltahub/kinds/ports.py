"""The words of a kind document: where equations act and what they are given, conditions, initialisers, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["CONTEXT", "DTYPES", "FACTS", "INITIALISERS", "LIVE_PORTS", "MERGED_PORTS", "PORTS"]

PORTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "input": ("x",),
        "output": ("x", "y"),
        "replace": ("x",),
        "kv": ("x",),
        "past": ("x",),
        "scores": ("scores",),
        "prompt": (),
        "weight": ("W", "b"),
        "bias": ("W", "b"),
    }
)
"""Where an equation may act, and what it is given there besides the host and the kind's own tensors."""
LIVE_PORTS = frozenset({"input", "output", "replace", "kv", "past", "scores", "prompt"})
MERGED_PORTS = frozenset({"weight", "bias"})

CONTEXT = ("grid", "group", "taps")
"""What an equation may ask of the surroundings: height and width of the token map, rows that belong together,
and hidden states of named modules."""

FACTS = ("bias", "family", "grouped", "channels_first")
"""What a ``when`` may ask of the host besides config values."""

INITIALISERS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "zeros": (0, 0),
        "ones": (0, 0),
        "constant": (1, 1),
        "normal": (1, 1),
        "uniform": (1, 1),
        "kaiming_uniform": (0, 0),
        "xavier_uniform": (0, 1),
        "xavier_normal": (0, 1),
        "orthogonal": (0, 1),
        "eye": (0, 0),
        "indices": (1, 1),
        "paired": (1, 1),
        "singular_in": (0, 0),
        "singular_out": (0, 0),
        "weight": (0, 0),
        "bias": (0, 0),
    }
)
"""Initialisers by name, with the fewest and the most arguments."""

DTYPES = ("float", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
