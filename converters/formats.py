"""Foreign formats by name, and which of them a path holds."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from deltahub.errors import ConverterError, UsageError

if TYPE_CHECKING:
    from deltahub.package import Package

__all__ = ["Converter", "convert", "export_", "formats", "import_", "sniff"]

GROUP = "deltahub.converters"
_BUILT_IN = (
    "adapterhub", "delta_conv", "diffusers", "gguf", "ip_adapter", "kohya", "mlx", "opendelta", "peft",
    "textual_inversion", "torchtune",
)  # fmt: skip
"""Formats of this distribution: they are found where nothing is installed, too."""


class Converter(Protocol):
    """A foreign format. A module serves; ``export_`` may be missing."""

    def sniff(self, path: Path) -> bool:
        """Whether a file or folder is of this format; it looks at names and configurations, never at pickles."""

    def import_(self, path: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Package:
        """Make a package of it."""


@cache
def formats() -> Mapping[str, Converter]:
    """All formats by name. Those of other distributions are imported when they are asked for by this call."""
    found: dict[str, Converter] = {}
    for name in _BUILT_IN:
        found[name] = cast(Converter, import_module(f"deltahub.converters.{name}"))
    for entry in entry_points(group=GROUP):
        if entry.name not in found:
            found[entry.name] = entry.load()
    return dict(sorted(found.items()))


def sniff(path: str | os.PathLike[str]) -> str:
    """The name of the format that a file or folder is of.

    Raises:
        ConverterError: ``E_CONVERT_FORMAT`` for none, or several.
    """
    place = Path(path)
    names = [name for name, converter in formats().items() if converter.sniff(place)]
    if len(names) != 1:
        raise ConverterError(
            "E_CONVERT_FORMAT",
            "this is of several formats" if names else "this is of no format that is known",
            where=place,
            expected=", ".join(formats()),
            found=", ".join(names) or None,
            hint="name the format" if names else None,
        )
    return names[0]


def import_(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, from_: str | None = None, **options: Any
) -> Package:
    """Make a package out of a foreign checkpoint.

    Args:
        path: the checkpoint.
        out: the package's folder.
        from_: its format; found out by default.
        options: ``backbone``, ``allow_pickle``, ``overwrite``, and what the format's own ``import_`` takes.

    Raises:
        ConverterError: it cannot be converted without loss, and nothing is written.
    """
    run = _format(from_ or sniff(path)).import_
    return run(path, out, **_known(run, options))


def export_(package: Package | str | os.PathLike[str], out: str | os.PathLike[str], *, to: str, **options: Any) -> Path:
    """Make a foreign checkpoint out of a package.

    Raises:
        ConverterError: the format cannot say what the package computes; nothing is written.
    """
    converter = _format(to)
    write = getattr(converter, "export_", None)
    if write is None:
        raise ConverterError("E_CONVERT_FORMAT", "packages cannot be written in this format", found=to)
    return cast(Path, write(package, out, **_known(write, options)))


def convert(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, to: str | None = None, **options: Any
) -> Path:
    """Convert: into a package by default, and out of one where ``to`` names a format."""
    if to is not None and to != "package":
        return export_(path, out, to=to, **options)
    return import_(path, out, **options).path


def _known(run: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a format knows; those that say nothing (``None`` or ``False``) are left out.

    Raises:
        UsageError: ``E_USAGE_OPTION`` for one that it does not know.
    """
    parameters = inspect.signature(run).parameters
    said = {name: value for name, value in options.items() if value is not None and value is not False}
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return said
    wrong = sorted(said.keys() - parameters.keys())
    if wrong:
        known = ", ".join(name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY)
        raise UsageError("E_USAGE_OPTION", "the format has no such option", expected=known, found=", ".join(wrong))
    return said


def _format(name: str) -> Converter:
    try:
        return formats()[name]
    except KeyError:
        raise ConverterError(
            "E_CONVERT_FORMAT", "there is no such format", expected=", ".join(formats()), found=name
        ) from None
