"""The parts of a kind document, as immutable values, and what may be said of a config value."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from deltahub.errors import KindError
from deltahub.kinds.tree import Program

__all__ = [
    "MAX_CONFIG_INTEGER",
    "MISSING",
    "Case",
    "ConfigField",
    "Dim",
    "Initial",
    "TensorField",
    "When",
    "holds",
    "pick",
]

T = TypeVar("T")

MAX_CONFIG_INTEGER = 2**31 - 1
MAX_CONFIG_STRING = 256
_LARGEST_NUMBER = 3.4e38
"""Deltas compute in float32 or less; a larger factor would make infinities of what it multiplies."""
MISSING = object()
"""The default of a config value that must be given."""

When = tuple[tuple[str, tuple[object, ...]], ...]
"""Names, each with the values it may have; all must hold, and none at all always does."""

ConfigType = Literal["integer", "number", "boolean", "string"]


def holds(when: When, values: Mapping[str, object]) -> bool:
    """Whether every name has one of its values; ``True`` is not 1 here."""
    return all(any(type(values[n]) is type(v) and values[n] == v for v in allowed) for n, allowed in when)


@dataclass(frozen=True, slots=True)
class Case(Generic[T]):
    """A value, and when it is meant."""

    when: When
    value: T


def pick(cases: tuple[Case[T], ...], values: Mapping[str, object]) -> T | None:
    """The value of the first case that holds."""
    return next((case.value for case in cases if holds(case.when, values)), None)


@dataclass(frozen=True, slots=True)
class Dim:
    """One entry of a symbolic shape: a length, or ``*kernel`` or ``*weight`` for several."""

    text: str
    spread: str | None
    program: Program | None


@dataclass(frozen=True, slots=True)
class Initial:
    """How a fresh tensor is filled: a named initialiser with arguments, or an expression over W and b."""

    text: str
    name: str | None
    program: Program | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorField:
    """One tensor of a kind: ``dtype`` is ``float`` (whatever floating type it was trained in) or a fixed one."""

    name: str
    dims: tuple[Dim, ...]
    init: tuple[Case[Initial], ...]
    dtype: str
    trainable: bool
    when: When


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigField:
    """One config value: its type, its bounds, its default."""

    name: str
    type: ConfigType
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: float | None = None
    exclusive_maximum: float | None = None
    enum: tuple[object, ...] = ()
    default: object = MISSING

    def check(self, value: object, where: str) -> object:
        """The value, a whole number made a float where a number is meant.

        Raises:
            KindError: ``E_KIND_CONFIG`` if it has the wrong type, is not finite, or is out of bounds.
        """
        if not isinstance(value, _TYPES[self.type]) or (isinstance(value, bool) and self.type != "boolean"):
            raise self._error(f"must be {_ARTICLE[self.type]}", value, where)
        if self.enum and value not in self.enum:
            raise self._error(f"must be one of {', '.join(map(repr, self.enum))}", value, where)
        if isinstance(value, str) and len(value) > MAX_CONFIG_STRING:
            raise self._error(f"must have at most {MAX_CONFIG_STRING} characters", value, where)
        if isinstance(value, bool | str):
            return value
        assert isinstance(value, int | float)
        self._check_number(value, where)
        return float(value) if self.type == "number" else value

    def _check_number(self, value: float, where: str) -> None:
        # A whole number beyond every float would overflow below, so it is looked at before it is converted.
        if self.type == "number" and not abs(value) <= _LARGEST_NUMBER:
            raise self._error("must be finite in float32", value, where)
        if self.type == "integer" and abs(value) > MAX_CONFIG_INTEGER:
            raise self._error(f"must be at most {MAX_CONFIG_INTEGER}", value, where)
        for bound, allowed, words in (
            (self.minimum, operator.ge, "must be at least"),
            (self.maximum, operator.le, "must be at most"),
            (self.exclusive_minimum, operator.gt, "must be greater than"),
            (self.exclusive_maximum, operator.lt, "must be less than"),
        ):
            if bound is not None and not allowed(value, bound):
                raise self._error(f"{words} {bound}", value, where)

    def _error(self, expected: str, found: object, where: str) -> KindError:
        shown = "a very long number" if isinstance(found, int) and abs(found) > 10**40 else repr(found)
        return KindError(
            "E_KIND_CONFIG", f"config value {self.name!r} {expected}", where=where, expected=expected, found=shown
        )


_TYPES: dict[str, tuple[type, ...]] = {"integer": (int,), "number": (int, float), "boolean": (bool,), "string": (str,)}
_ARTICLE = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a string"}
