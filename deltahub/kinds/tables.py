"""Strict reading of tables: every key is asked for by name and type, and what is left over is unknown."""

from __future__ import annotations

import math
from typing import TypeVar, cast

from deltahub.errors import KindError
from deltahub.kinds.fields import MISSING
from deltahub.kinds.ops import nearest

__all__ = ["MAX_ITEMS", "Table", "plain"]

T = TypeVar("T")

MAX_ITEMS = 64


def plain(value: object, depth: int = 0) -> bool:
    """Whether a value is of JSON's data model, not too deep and without infinities."""
    if depth > 8:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(plain(v, depth + 1) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | str) or (isinstance(value, int) and abs(value) < 2**63)


class Table:
    """A table that is read key by key, so that what is left is unknown."""

    def __init__(self, data: object, where: str, path: str) -> None:
        self.where, self.path = where, path
        if not isinstance(data, dict):
            raise self.error("must be a table", data)
        self.data = dict(data)
        self.known: list[str] = []

    def error(self, what: str, found: object = None, key: str = "") -> KindError:
        path = ".".join(part for part in (self.path, key) if part)
        return KindError(
            "E_KIND_DOCUMENT",
            f"{path or 'the document'} {what}",
            where=self.where,
            found=None if found is None else repr(found),
        )

    def take(self, key: str, kind: type[T] | tuple[type[T], ...], words: str, default: object = MISSING) -> T:
        self.known.append(key)
        if key not in self.data:
            if default is MISSING:
                raise self.error(f"is missing; it must be {words}", key=key)
            return cast(T, default)
        value = self.data.pop(key)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(f"must be {words}", value, key)
        return value

    def table(self, key: str) -> dict[str, Table]:
        """A table of tables."""
        outer: dict[str, object] = self.take(key, dict, "a table", {})
        if len(outer) > MAX_ITEMS:
            raise self.error(f"has more than {MAX_ITEMS} entries", key=key)
        path = f"{self.path}.{key}" if self.path else key
        return {name: Table(value, self.where, f"{path}.{name}") for name, value in outer.items()}

    def finish(self) -> None:
        for key in self.data:
            raise self.error(f"is unknown{nearest(key, self.known)}", key=key)
