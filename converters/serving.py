"""Packages as servers of language models take them: PEFT's layout within the limits of each engine.

The limits are data (``spec/engines.toml``). What an engine would drop in silence is refused with the reason; ranks are
filled up with zeros, scales go into the second factor, and alpha is the rank, so that no two readers can differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry
from deltahub.converters.low_rank import padded, plain
from deltahub.errors import ConverterError, UsageError

__all__ = ["engine", "engines", "for_engine", "low_rank_only"]

logger = logging.getLogger("deltahub")


@cache
def engines() -> Mapping[str, Mapping[str, Any]]:
    """The limits of each engine, by name."""
    import tomllib
    from importlib.resources import files

    return tomllib.loads(files("deltahub.spec").joinpath("engines.toml").read_text(encoding="utf-8"))


def engine(name: str) -> Mapping[str, Any]:
    """The limits of one.

    Raises:
        UsageError: ``E_USAGE_ENGINE``.
    """
    try:
        return engines()[name]
    except KeyError:
        raise UsageError(
            "E_USAGE_ENGINE", "no such engine is known", expected=", ".join(engines()), found=name
        ) from None


def low_rank_only(
    entries: Sequence[Entry], base: Base | None, *, title: str, most: int, approximate: int | None
) -> list[Entry]:
    """All sites as plain low-rank updates with a scale of 1; what is lost is said.

    Args:
        entries: the sites.
        base: the backbone, needed for approximations.
        title: of whoever will read them, for messages.
        most: the largest rank.
        approximate: the rank of approximations; ``None`` refuses what is no such update.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with everything that cannot be said, and why.
    """
    found, wrong = [], []
    for entry in entries:
        made = plain(entry, base, most=most, rank=approximate)
        if isinstance(made, str):
            wrong.append(made)
            continue
        found.append(made.entry)
        if made.error:
            logger.warning("%s: approximated, %.2g of its size is lost", entry.path, made.error)
    _refuse(title, wrong)
    paths = [entry.path for entry in found]
    _refuse(title, [f"two updates at {path}" for path in sorted({p for p in paths if paths.count(p) > 1})])
    return found


def _refuse(title: str, reasons: Sequence[str]) -> None:
    if reasons:
        raise ConverterError(
            "E_CONVERT_EXPORT",
            f"{title} cannot serve what this package computes",
            found=reasons[0],
            hint="merge the package into its backbone and serve that",
            also=tuple(reasons[1:]),
        )


def for_engine(name: str, entries: Sequence[Entry], base: Base | None, *, approximate: int | None) -> list[Entry]:
    """The sites of a package within an engine's limits.

    Args:
        name: of the engine.
        entries: the sites.
        base: the backbone, where it is at hand.
        approximate: as for :func:`low_rank_only`.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT``.
        UsageError: ``E_USAGE_ENGINE``.
    """
    limits = engine(name)
    saved = [entry for entry in entries if entry.kind == "assign" and _last(entry) in limits.get("saved", ())]
    others = [entry for entry in entries if entry not in saved]
    known, embeddings = limits.get("modules"), limits.get("embeddings", ())
    wrong = [f"{e.kind} at {e.path}: it knows no {_last(e)}" for e in others if known and _last(e) not in known]
    for entry in others:
        family = base.arch.host(entry.path).shape.family if base is not None else "linear"
        if family not in {"linear", "embedding"} or any(v.ndim > 2 for v in entry.tensors.values()):
            wrong.append(f"{entry.kind} at {entry.path}: it takes linear layers only")
        elif family == "embedding" and _last(entry) not in embeddings:
            wrong.append(f"{entry.kind} at {entry.path}: it takes no embeddings")
    _refuse(limits["title"], wrong)
    made = low_rank_only(others, base, title=limits["title"], most=limits["most"], approximate=approximate)
    if not made:
        _refuse(limits["title"], ["there is no low-rank update in it"])
    largest = max(int(entry.config["rank"]) for entry in made)
    least = max(int(limits["least"]), largest if limits["uniform"] else 0)
    made = [padded(entry, least) for entry in made]
    rank = next((one for one in limits.get("ranks", ()) if one >= largest), max(largest, least))
    if "settings" in limits:
        logger.info("%s: start it with %s", limits["title"], limits["settings"].format(rank=rank, name="NAME=PATH"))
    return [*made, *saved]


def _last(entry: Entry) -> str:
    return entry.path.rpartition(".")[2]
