"""The patterns of a package: exact paths with two abbreviations, expanded to a finite list without the model at hand.

A package holds *exact paths* such as ``encoder.layer.0.attention.self.query``, names of letters, digits, ``_`` and
``-`` joined by dots, with two abbreviations: ``{a,b}`` for a and for b, and ``{0..11}`` for twelve numbers. ``.`` is
the backbone itself. There are no globs and no regular expressions: those run forever on the right input, and mean
something else on the next version of a model.
"""

from __future__ import annotations

__all__ = ["ROOT", "Group", "check_path", "expand", "expand_all", "multiply", "parse"]

import itertools
import re
from typing import TYPE_CHECKING

from deltahub.errors import TargetError
from deltahub.limits import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = "."
"""The path of the backbone itself."""

Group = tuple[str, ...] | range
"""What stands between braces: names, or numbers."""

_STRAY = re.compile(r"[^A-Za-z0-9_.-]", re.ASCII)
_STRAY_STARS = re.compile(r"[^A-Za-z0-9_.*-]", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_NAME_STARS = re.compile(r"[A-Za-z0-9_*-]+", re.ASCII)
_RANGE = re.compile(r"(0|[1-9][0-9]*)\.\.(0|[1-9][0-9]*)", re.ASCII)


def expand(pattern: str, *, limit: int = DEFAULT.targets_count) -> list[str]:
    """List the paths that a pattern stands for, the last group varying fastest.

    Takes time linear in the pattern and in the list; the length of the list is known, and refused, before it is made.

    Raises:
        TargetError: ``E_TARGET_SYNTAX``, ``E_TARGET_EXPANSION``, ``E_TARGET_DUPLICATE``.
    """
    paths = multiply(parse(pattern), limit)
    if len(set(paths)) != len(paths):
        seen: set[str] = set()
        twice = next(path for path in paths if path in seen or seen.add(path))  # type: ignore[func-returns-value]
        raise TargetError("E_TARGET_DUPLICATE", f"{twice!r} comes twice out of one pattern", found=pattern)
    return paths


def expand_all(patterns: Iterable[str], *, limit: int = DEFAULT.targets_count, where: str | None = None) -> list[str]:
    """List the paths that several patterns stand for together; a path that comes twice is an error.

    Args:
        patterns: patterns of a package.
        limit: the greatest number of paths, over all patterns.
        where: the path into a document that holds the list; an error names the element, ``where[3]``.

    Raises:
        TargetError: as :func:`expand`; every further problem is in its ``also``.
    """
    problems: list[TargetError] = []
    origin: dict[str, int] = {}
    patterns = list(patterns)
    for index, pattern in enumerate(patterns):
        try:
            paths = expand(pattern, limit=limit - len(origin))
        except TargetError as error:
            error.where = f"{where}[{index}]" if where else None
            problems.append(error)
            if error.code == "E_TARGET_EXPANSION":
                break
            continue
        twice = next((path for path in paths if path in origin), None)
        if twice is not None:
            problems.append(
                TargetError(
                    "E_TARGET_DUPLICATE",
                    f"{twice!r} is a target twice",
                    where=f"{where}[{index}]" if where else None,
                    found=[patterns[origin[twice]], pattern],
                    hint="leave it in one of the two patterns",
                )
            )
        for path in paths:
            origin.setdefault(path, index)
    if problems:
        first, *others = problems
        first.also = tuple(f"[{e.code}] {e.where or 'target'}: {e.what}" for e in others)
        raise first
    return list(origin)


def check_path(path: str) -> str:
    """Return a path that a package may name; anything with an abbreviation, a glob or a stray character is refused.

    Raises:
        TargetError: ``E_TARGET_SYNTAX``, ``E_TARGET_EXPANSION``.
    """
    pieces = parse(path)
    if len(pieces) != 1 or not isinstance(pieces[0], str):
        raise TargetError("E_TARGET_SYNTAX", "an exact path has no braces", found=path)
    return multiply(pieces, 1)[0]


def parse(pattern: str, *, stars: bool = False) -> list[str | Group]:
    """Cut a pattern into literal text and groups, in one pass.

    Args:
        pattern: the text.
        stars: whether ``*`` may stand in it, as authors write it.

    Raises:
        TargetError: ``E_TARGET_SYNTAX``, ``E_TARGET_EXPANSION``.
    """
    if pattern == ROOT:
        return [ROOT]
    stray = _STRAY_STARS if stars else _STRAY
    pieces: list[str | Group] = []
    skeleton: list[str] = []
    at = 0
    while at < len(pattern):
        if pattern[at] == "{":
            end = pattern.find("}", at)
            if end < 0:
                raise _syntax(pattern, at, "this brace is never closed")
            pieces.append(_group(pattern, at, end, _NAME_STARS if stars else _NAME))
            skeleton.append("x")
            at = end + 1
        else:
            end = pattern.find("{", at)
            end = len(pattern) if end < 0 else end
            found = stray.search(pattern, at, end)
            if found is not None:
                raise _syntax(pattern, found.start(), f"{found[0]!r} is no part of a path")
            pieces.append(pattern[at:end])
            skeleton.append(pattern[at:end])
            at = end
    if not all("".join(skeleton).split(".")):
        raise TargetError("E_TARGET_SYNTAX", "a name of a target is empty", found=pattern, hint=_HINT)
    return pieces


def _group(pattern: str, start: int, end: int, name: re.Pattern[str]) -> Group:
    body = pattern[start + 1 : end]
    bounds = _RANGE.fullmatch(body)
    if bounds is not None:
        if max(map(len, bounds.groups())) > DEFAULT.targets_digits:
            raise TargetError("E_TARGET_EXPANSION", "a number in a range is too long", found=pattern)
        low, high = map(int, bounds.groups())
        if high < low:
            raise _syntax(pattern, start, "a range goes from the smaller number to the greater one")
        return range(low, high + 1)
    names = tuple(body.split(","))
    for text in names:
        if not name.fullmatch(text):
            raise _syntax(pattern, start, f"{text!r} is no name and no range")
    if len(names) == 1:
        raise _syntax(pattern, start, "braces around a single name say nothing")
    return names


_HINT = "a package holds paths, {a,b} and {0..11}; deltahub.attach also takes suffixes, * and **, and stores the paths"


def _syntax(pattern: str, at: int, what: str) -> TargetError:
    return TargetError("E_TARGET_SYNTAX", f"{what} (character {at + 1})", found=pattern, hint=_HINT)


def multiply(pieces: Sequence[str | Group], limit: int) -> list[str]:
    """Multiply the groups out, after the number and the length of the paths are known to be in bounds.

    Raises:
        TargetError: ``E_TARGET_EXPANSION``.
    """
    count, longest = 1, 0
    for piece in pieces:
        if isinstance(piece, str):
            longest += len(piece)
        else:
            count *= len(piece)
            longest += len(str(piece[-1])) if isinstance(piece, range) else max(map(len, piece))
        if count > limit or longest > DEFAULT.targets_path_length:
            raise TargetError(
                "E_TARGET_EXPANSION",
                "targets stand for too many paths" if count > limit else "a path is too long",
                expected=f"at most {limit} paths, of {DEFAULT.targets_path_length} characters",
            )
    columns = [[piece] if isinstance(piece, str) else list(map(str, piece)) for piece in pieces]
    return ["".join(row) for row in itertools.product(*columns)]
