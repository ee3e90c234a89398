"""How authors select modules, and how the paths that come of it are abbreviated for a package."""

from __future__ import annotations

__all__ = ["Selector", "abbreviate", "select"]

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deltahub.errors import TargetError
from deltahub.limits import DEFAULT
from deltahub.targets.patterns import check_path, multiply, parse

Selector = str | Callable[[str, Any], bool]
"""A suffix, a glob, ``type:Name``, or a function of (path, module)."""

_NUMBER = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_NUMBERED = re.compile(r"(.*?)(0|[1-9][0-9]*)([^0-9]*)", re.ASCII | re.DOTALL)
_NEAREST = 5
_CANDIDATES = 5_000

_Items = tuple[str, ...]
_Row = tuple[int, tuple[_Items, ...]]


# ------------------------------------------------------------------------------------------------------ abbreviate


def abbreviate(paths: Iterable[str]) -> list[str]:
    """Write many paths as few patterns: ``encoder.layer.{0..11}.attention.self.{query,value}``.

    ``expand_all(abbreviate(paths))`` has exactly the elements of ``paths``. Patterns, and the names inside one group,
    keep the order in which their first path was given; numbers come first and ascend. The result depends on nothing
    but ``paths`` in their order.

    Raises:
        TargetError: ``E_TARGET_TWICE`` for a path given twice, ``E_TARGET_SYNTAX`` for what is no path.
    """
    rank: dict[str, int] = {}
    by_depth: dict[int, list[_Row]] = {}
    seen: set[str] = set()
    found: list[tuple[int, str]] = []
    for index, path in enumerate(paths):
        check_path(path)
        if path in seen:
            raise TargetError("E_TARGET_TWICE", f"{path!r} is given twice")
        seen.add(path)
        names = path.split(".")
        for name in names:
            rank.setdefault(name, len(rank))
        by_depth.setdefault(len(names), []).append((index, tuple((name,) for name in names)))
    for depth, rows in by_depth.items():
        inner_first = _written(_merged(rows, range(depth - 1, -1, -1), rank))
        outer_first = _written(_merged(rows, range(depth), rank))
        shorter: list[tuple[int, str]] = min((inner_first, outer_first), key=_cost)
        found += shorter
    return [text for _, text in sorted(found)]


def _merged(rows: list[_Row], positions: Iterable[int], rank: Mapping[str, int]) -> list[_Row]:
    """Unite rows that differ in one component, component after component, until nothing changes.

    Rows are disjoint sets of paths, products of one set of names per component, and stay so.
    """
    positions = list(positions)
    while True:
        before = len(rows)
        for k in positions:
            alike: dict[tuple[_Items, ...], list[tuple[int, _Items]]] = {}
            for index, row in rows:
                alike.setdefault(row[:k] + row[k + 1 :], []).append((index, row[k]))
            rows = [
                (found[0][0], (*rest[:k], _united([items for _, items in found], rank), *rest[k:]))
                for rest, found in alike.items()
            ]
        if len(rows) == before:
            return rows


def _united(parts: list[_Items], rank: Mapping[str, int]) -> _Items:
    if len(parts) == 1:
        return parts[0]
    numbers, names = _split([name for part in parts for name in part])
    return (*map(str, sorted(numbers)), *sorted(names, key=rank.__getitem__))


def _split(items: Iterable[str]) -> tuple[list[int], list[str]]:
    numbers: list[int] = []
    names: list[str] = []
    for item in items:
        if _NUMBER.fullmatch(item) and len(item) <= DEFAULT.targets_digits:
            numbers.append(int(item))
        else:
            names.append(item)
    return numbers, names


def _written(rows: list[_Row]) -> list[tuple[int, str]]:
    return [(index, ".".join(map(_component, row))) for index, row in rows]


def _cost(written: list[tuple[int, str]]) -> tuple[int, int]:
    return len(written), sum(len(text) for _, text in written)


def _component(items: _Items) -> str:
    if len(items) == 1:
        return items[0]
    numbers, names = _split(items)
    if not numbers:
        matches = [_NUMBERED.fullmatch(name) for name in names]
        found = [m.groups() for m in matches if m is not None and len(m[2]) <= DEFAULT.targets_digits]
        if len(found) == len(names) > 2 and len({(before, after) for before, _, after in found}) == 1:
            runs = _runs(sorted(int(number) for _, number, _ in found))
            if len(runs) == 1:
                return f"{found[0][0]}{{{runs[0]}}}{found[0][2]}"
    return f"{{{','.join(_runs(numbers) + names)}}}"


def _runs(numbers: Sequence[int]) -> list[str]:
    """Write ascending numbers as runs: 0, 1, 2, 5, 6 is ``0..2``, ``5``, ``6``."""
    texts: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        texts += [f"{values[0]}..{values[-1]}"] if len(values) > 2 else map(str, values)
    return texts


# ---------------------------------------------------------------------------------------------------------- select


def select(
    modules: Mapping[str, object],
    include: Selector | Iterable[Selector],
    exclude: Selector | Iterable[Selector] = (),
) -> list[str]:
    """Choose modules the way an author speaks of them; the result is a list of exact paths, in the model's order.

    - A path of the model, in full, is that module alone.
    - Any other dotted name is a suffix at a name's boundary: ``self.query`` is
      ``encoder.layer.0.attention.self.query``, never ``…myself.query``. ``**.dense`` means every ``dense``, even
      when the model has one at its top.
    - ``*`` stands for any characters of one name, ``**`` for any number of whole names, ``{a,b}`` and ``{0..11}`` as in
      a package.
    - ``type:Linear`` is every module of that class or of a subclass.
    - A function gets the path and the module.

    What an exclusion matches is left out together with everything inside it.

    Args:
        modules: each module by its path, as ``dict(model.named_modules())``.
        include: what is wanted; each selector must match something.
        exclude: what is not; a selector in words must match something too, for a slip of the pen would train
            what was to be left alone.

    Raises:
        TargetError: ``E_TARGET_NOTHING`` with the nearest names, ``E_TARGET_SYNTAX``.
    """
    modules = {path: module for path, module in modules.items() if path}
    wanted: set[str] = set()
    for selector in _several(include):
        found = _matches(modules, selector)
        if not found:
            raise _nothing(modules, selector)
        wanted |= found
    if not wanted:
        raise TargetError("E_TARGET_NOTHING", "no target was asked for", hint='for instance targets="query"')
    unwanted: set[str] = set()
    for selector in _several(exclude):
        found = _matches(modules, selector)
        if not found and isinstance(selector, str):
            raise _nothing(modules, selector)
        unwanted |= found
    chosen = [path for path in modules if path in wanted and unwanted.isdisjoint(_prefixes(path))]
    if not chosen:
        raise TargetError(
            "E_TARGET_NOTHING", "the exclusions leave nothing of what was selected", found=sorted(wanted)[:5]
        )
    return chosen


def _several(selectors: Selector | Iterable[Selector]) -> list[Selector]:
    if isinstance(selectors, str):
        return [selectors]
    if callable(selectors):
        return [selectors]
    return list(selectors)


def _prefixes(path: str) -> list[str]:
    return [path[:at] for at, c in enumerate(path) if c == "."] + [path]


def _names(cls: type) -> tuple[str, str]:
    return cls.__name__, f"{cls.__module__}.{cls.__qualname__}"


def _matches(modules: Mapping[str, object], selector: Selector) -> set[str]:
    if not isinstance(selector, str):
        return {path for path, module in modules.items() if selector(path, module)}
    if selector.startswith("type:"):
        wanted = selector.removeprefix("type:")
        hits = {c for c in set(map(type, modules.values())) if any(wanted in _names(base) for base in c.__mro__)}
        return {path for path, module in modules.items() if type(module) in hits}
    alternatives = multiply(parse(selector, stars=True), DEFAULT.targets_count)
    exact = {text for text in alternatives if text in modules}
    plain = {text for text in alternatives if "*" not in text} - exact
    endings = tuple(f".{text}" for text in plain)
    found = exact | {path for path in modules if path.endswith(endings)}
    for text in alternatives:
        if "*" in text:
            pattern = ["**", *text.split(".")]
            if any("**" in name and name != "**" for name in pattern):
                raise TargetError("E_TARGET_SYNTAX", "** stands for whole names, between dots", found=selector)
            found |= {path for path in modules if _wild(pattern, path.split("."), "**", _wild_name)}
    return found


def _wild_name(pattern: str, name: str) -> bool:
    return pattern == name or ("*" in pattern and _wild(pattern, name, "*", str.__eq__))


def _wild(pattern: Sequence[str], text: Sequence[str], star: str, same: Callable[[str, str], bool]) -> bool:
    """Match with wildcards, going back to the last one only: at most len(pattern) * len(text) comparisons."""
    p = t = 0
    back = mark = -1
    while t < len(text):
        if p < len(pattern) and pattern[p] == star:
            back, mark = p, t
            p += 1
        elif p < len(pattern) and same(pattern[p], text[t]):
            p += 1
            t += 1
        elif back >= 0:
            mark += 1
            p, t = back + 1, mark
        else:
            return False
    return all(piece == star for piece in pattern[p:])


def _nothing(modules: Mapping[str, object], selector: Selector) -> TargetError:
    if not isinstance(selector, str):
        return TargetError(
            "E_TARGET_NOTHING", "the function chose no module", found=getattr(selector, "__name__", None)
        )
    if selector.startswith("type:"):
        wanted = selector.removeprefix("type:")
        candidates = dict.fromkeys(type(module).__name__ for module in modules.values())
    else:
        wanted = selector
        depth = wanted.count(".") + 1
        candidates = dict.fromkeys(".".join(path.split(".")[-depth:]) for path in modules)
    near = difflib.get_close_matches(wanted, list(candidates)[:_CANDIDATES], n=_NEAREST, cutoff=0.5)
    return TargetError(
        "E_TARGET_NOTHING",
        f"no module of the model matches {selector!r}",
        found=f"nearest: {', '.join(near)}" if near else f"for instance: {', '.join(list(candidates)[:_NEAREST])}",
        hint="print([name for name, _ in model.named_modules()]) lists all names",
    )
