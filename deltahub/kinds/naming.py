"""What others call a kind: data for people, which decides nothing."""

from __future__ import annotations

__all__ = ["also_called", "known_as"]

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files


@cache
def _names() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = tomllib.loads(
        files("deltahub.spec").joinpath("also.toml").read_text(encoding="utf-8")
    )
    return found


def also_called(kind: str) -> Mapping[str, str]:
    """What other libraries call a built-in kind: library to name; empty where no other name is known."""
    return _names().get(kind, {})


def known_as(name: str) -> list[str]:
    """The kinds that somebody calls so: a word of their name, in any case."""
    wanted = name.lower().removesuffix("config").removesuffix("model")
    if len(wanted) < 3:
        return []
    return [kind for kind, names in _names().items() if any(wanted in called.lower() for called in names.values())]
