"""JSON, read so that no two readers can differ on it: UTF-8, no name twice, finite numbers, bounded depth."""

from __future__ import annotations

__all__ = ["Problem", "Step", "fail", "parse", "spot"]

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltahub.errors import DeltaHubError, ManifestError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Step = str | int
_LARGEST = 2**53 - 1
_IDENTIFIER = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*", re.ASCII)
_BRACKETS = re.compile(r'"(?:[^"\\]+|\\.)*+\\?(?:"|\Z)|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong with a document, and where in it."""

    path: tuple[Step, ...]
    code: str
    what: str
    expected: object = None
    found: object = None
    error: type[DeltaHubError] = ManifestError
    also: tuple[str, ...] = ()


def spot(path: Iterable[Step]) -> str:
    """Write a path into a document the way a person would: ``modules[0].targets[1]``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _IDENTIFIER.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f"[{json.dumps(step)}]"
    return text


def fail(problems: Sequence[Problem], where: str) -> DeltaHubError:
    """Make one error of all problems of a document, in the order of their places."""
    first, *others = sorted(problems, key=lambda p: [(0, s, "") if isinstance(s, int) else (1, 0, s) for s in p.path])
    also = [*first.also]
    for other in others:
        also += [f"[{other.code}] {spot(other.path)}: {other.what}", *other.also]
    place = spot(first.path)
    return first.error(
        first.code,
        first.what,
        where=f"{where}: {place}" if place else where,
        expected=first.expected,
        found=first.found,
        also=also,
    )


class _Twice(dict[str, Any]):
    """An object that had a name twice."""

    names: tuple[str, ...] = ()


class _Number:
    """A number that is out of bounds."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    marked = _Twice(made)
    marked.names = tuple(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    return marked


def _integer(text: str) -> int | _Number:
    if len(text) <= 17:
        value = int(text)
        if -_LARGEST <= value <= _LARGEST:
            return value
    return _Number(text)


def _number(text: str) -> float | _Number:
    value = float(text)
    return value if math.isfinite(value) else _Number(text)


def _too_deep(text: str, depth: int) -> bool:
    if text.count("[") + text.count("{") <= depth:
        return False
    level = 0
    for match in _BRACKETS.finditer(text):
        if match[0] in "[{":
            level += 1
            if level > depth:
                return True
        elif match[0] in "]}":
            level -= 1
    return False


def parse(data: bytes, *, where: str, max_bytes: int, max_depth: int) -> Any:
    """Read one JSON value. Nothing is taken on trust: not the size, the encoding, the depth, the names, the numbers.

    Raises:
        ManifestError: ``E_MANIFEST_SIZE``, ``E_MANIFEST_ENCODING``, ``E_MANIFEST_DEPTH``, ``E_MANIFEST_JSON``,
            ``E_MANIFEST_DUPLICATE_KEY``, ``E_MANIFEST_NUMBER``; all problems of the last two sorts, and all
            surrogates, are found in one pass.
    """
    if len(data) > max_bytes:
        raise ManifestError(
            "E_MANIFEST_SIZE",
            "the manifest is too large",
            where=where,
            expected=f"at most {max_bytes} bytes",
            found=len(data),
        )
    if data.startswith(b"\xef\xbb\xbf"):
        raise ManifestError("E_MANIFEST_ENCODING", "the manifest begins with a byte order mark", where=where)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ManifestError(
            "E_MANIFEST_ENCODING", f"the manifest is not UTF-8: {error.reason} at byte {error.start}", where=where
        ) from None
    if _too_deep(text, max_depth):
        raise ManifestError(
            "E_MANIFEST_DEPTH", "the manifest is nested too deeply", where=where, expected=f"at most {max_depth} levels"
        )
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_Number
        )
    except json.JSONDecodeError as error:
        raise ManifestError(
            "E_MANIFEST_JSON",
            f"the manifest is not JSON: {error.msg}",
            where=f"{where}, line {error.lineno}, column {error.colno}",
        ) from None
    problems = list(_walk(value, (), surrogates=_SURROGATE.search(text) is not None))
    if problems:
        raise fail(problems, where)
    return value


def _walk(value: Any, path: tuple[Step, ...], *, surrogates: bool) -> Iterator[Problem]:
    if isinstance(value, dict):
        if isinstance(value, _Twice):
            for name in value.names:
                yield Problem(
                    path=(*path, name), code="E_MANIFEST_DUPLICATE_KEY", what=f"{printable(name)!r} is given twice"
                )
        for name, item in value.items():
            if surrogates and not _encodes(name):
                yield Problem(path=path, code="E_MANIFEST_ENCODING", what=f"{printable(name)!r} holds half a character")
            yield from _walk(item, (*path, name), surrogates=surrogates)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index), surrogates=surrogates)
    elif isinstance(value, _Number):
        yield Problem(
            path=path,
            code="E_MANIFEST_NUMBER",
            what="a number is out of bounds",
            expected="a finite number; integers within ±(2^53 - 1)",
            found=value.text,
        )
    elif surrogates and isinstance(value, str) and not _encodes(value):
        yield Problem(path=path, code="E_MANIFEST_ENCODING", what="a string holds half a character (a lone surrogate)")


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
