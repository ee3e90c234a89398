r"""The patterns of a package: exact paths with two abbreviations, expanded to a finite list without the model at hand.

A package holds *exact paths* such as ``encoder.layer.0.attention.self.query`` with two abbreviations,
``{a,b}`` and ``{0..11}``, which may share one pair of braces: ``{0..3,8,head}``. The grammar, in characters::

    pattern   = component *( "." component )
    component = 1*( name / group )
    group     = "{" item *( "," item ) "}"          ; more than one path comes of it
    item      = name / number ".." number           ; ascending, both ends included, no leading zeros
    name      = 1*( any printable character that is no space and none of . / { } , * ? [ ] ( ) | \ ^ $ + " ' ` )

There are no globs and no regular expressions: those run forever on the right input, and mean something else on the
next version of a model.
"""

from __future__ import annotations

__all__ = ["Group", "check_path", "expand", "expand_all", "multiply", "parse"]

import itertools
import re
from typing import TYPE_CHECKING

from deltahub.errors import TargetError
from deltahub.limits import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Group = tuple[str | range, ...]
"""What stands between braces."""

_REGEXP = frozenset("*?[]()|\\^$+")
_STRAY = re.compile(r"""[][*?()|\\^$+/"'`\s]""")
_RANGE = re.compile(r"(0|[1-9][0-9]*)\.\.(0|[1-9][0-9]*)", re.ASCII)


def expand(pattern: str, *, limit: int = DEFAULT.targets_count) -> list[str]:
    """List the paths that a pattern stands for, the last group varying fastest.

    Takes time linear in the pattern and in the list; the length of the list is known, and refused, before it is made.

    Raises:
        TargetError: ``E_TARGET_SYNTAX``, ``E_TARGET_REGEXP``, ``E_TARGET_EXPANSION``, ``E_TARGET_TWICE``.
    """
    paths = multiply(parse(pattern), limit)
    if len(set(paths)) != len(paths):
        seen: set[str] = set()
        twice = next(path for path in paths if path in seen or seen.add(path))  # type: ignore[func-returns-value]
        raise TargetError("E_TARGET_TWICE", f"{twice!r} comes twice out of one pattern", found=pattern)
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
                    "E_TARGET_TWICE",
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
        TargetError: ``E_TARGET_SYNTAX``, ``E_TARGET_REGEXP``, ``E_TARGET_EXPANSION``.
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
        TargetError: ``E_TARGET_SYNTAX``, ``E_TARGET_REGEXP``, ``E_TARGET_EXPANSION``.
    """
    pieces: list[str | Group] = []
    skeleton: list[str] = []
    at = 0
    while at < len(pattern):
        if pattern[at] == "{":
            end = pattern.find("}", at)
            if end < 0:
                raise _syntax(pattern, at, "this brace is never closed")
            pieces.append(_group(pattern, at, end, stars=stars))
            skeleton.append("x")
            at = end + 1
        else:
            end = pattern.find("{", at)
            end = len(pattern) if end < 0 else end
            _check_text(pattern, at, end, extra="},", stars=stars)
            pieces.append(pattern[at:end])
            skeleton.append(pattern[at:end])
            at = end
    if not all("".join(skeleton).split(".")):
        raise TargetError("E_TARGET_SYNTAX", "a name between the dots of a target is empty", found=pattern)
    return pieces


def _group(pattern: str, start: int, end: int, *, stars: bool) -> Group:
    items: list[str | range] = []
    at = start + 1
    for text in pattern[start + 1 : end].split(","):
        if not text:
            raise _syntax(pattern, at, "a name is missing between these braces")
        bounds = _RANGE.fullmatch(text)
        if bounds is not None:
            if max(map(len, bounds.groups())) > DEFAULT.targets_digits:
                raise TargetError("E_TARGET_EXPANSION", "a number in a range is too long", found=pattern)
            low, high = map(int, bounds.groups())
            if high <= low:
                raise _syntax(pattern, at, "a range goes from a smaller to a greater number")
            items.append(range(low, high + 1))
        else:
            _check_text(pattern, at, at + len(text), extra=".{", stars=stars)
            items.append(text)
        at += len(text) + 1
    if len(items) == 1 and isinstance(items[0], str):
        raise _syntax(pattern, start, "braces around a single name say nothing")
    return tuple(items)


def _check_text(pattern: str, start: int, end: int, *, extra: str, stars: bool) -> None:
    text = pattern[start:end]
    for match in _STRAY.finditer(text):
        c = match[0]
        if c in _REGEXP and not (stars and c == "*"):
            raise TargetError(
                "E_TARGET_REGEXP",
                f"{c!r} is no part of a path: globs and regular expressions are refused"
                if not stars
                else f"{c!r} is no part of a path: regular expressions are refused",
                expected="a path, {a,b} or {0..11}" + (", with * and ** as wildcards" if stars else ""),
                found=pattern,
                hint=None if stars else "let deltahub.attach select the modules: it stores the paths",
            )
        if c not in _REGEXP:
            raise _syntax(pattern, start + match.start(), f"{c!r} may not stand here")
    for c in extra:
        if c in text:
            raise _syntax(pattern, start + text.index(c), f"{c!r} may not stand here")
    if not text.isprintable():
        raise _syntax(pattern, start, "a character that does not print may not stand here")


def _syntax(pattern: str, at: int, what: str) -> TargetError:
    return TargetError("E_TARGET_SYNTAX", f"{what} (character {at + 1})", found=pattern)


def multiply(pieces: Sequence[str | Group], limit: int) -> list[str]:
    """Multiply the groups out, after the number and the length of the paths are known to be in bounds.

    Raises:
        TargetError: ``E_TARGET_EXPANSION``, or ``E_TARGET_SYNTAX`` for a name that starts with two underscores.
    """
    count, longest = 1, 0
    for piece in pieces:
        if isinstance(piece, str):
            longest += len(piece)
        else:
            count *= sum(1 if isinstance(item, str) else len(item) for item in piece)
            longest += max(len(item) if isinstance(item, str) else len(str(item[-1])) for item in piece)
        if count > limit or longest > DEFAULT.targets_path_length:
            raise TargetError(
                "E_TARGET_EXPANSION",
                "a target stands for too many paths" if count > limit else "a path is too long",
                expected=f"at most {limit} paths of {DEFAULT.targets_path_length} characters",
            )
    columns = [
        [piece]
        if isinstance(piece, str)
        else [text for item in piece for text in ([item] if isinstance(item, str) else map(str, item))]
        for piece in pieces
    ]
    paths = ["".join(row) for row in itertools.product(*columns)]
    for path in paths:
        if path.startswith("__") or ".__" in path:
            raise TargetError("E_TARGET_SYNTAX", "a name that starts with two underscores is no module's", found=path)
    return paths
