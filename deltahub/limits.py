"""The limits of the format, read from ``spec/limits.toml``: numbers that a caller may raise and a package never can."""

from __future__ import annotations

__all__ = ["DEFAULT", "Limits"]

import tomllib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a reader accepts. Every number is a maximum; ``dataclasses.replace`` makes another set.

    Attributes:
        manifest_bytes: size of ``delta.json``.
        manifest_depth: arrays and objects inside one another.
        manifest_name_length: characters of a module's name.
        manifest_text_length: characters of a tensor's or a file's name.
        targets_count: paths over all modules of a manifest.
        targets_path_length: characters of one expanded path.
        targets_digits: digits of a number in a range such as ``{0..11}``.
        tensors_header_bytes: the JSON header of one safetensors file.
        tensors_count: tensors in one file.
        package_shard_bytes: a writer starts the next file beyond this.
        package_entries: names in a package's folder.
    """

    manifest_bytes: int
    manifest_depth: int
    manifest_name_length: int
    manifest_text_length: int
    targets_count: int
    targets_path_length: int
    targets_digits: int
    tensors_header_bytes: int
    tensors_count: int
    package_shard_bytes: int
    package_entries: int


def _read() -> Limits:
    document = tomllib.loads(files("deltahub.spec").joinpath("limits.toml").read_text(encoding="utf-8"))
    return Limits(**{f"{room}_{name}": value for room, table in document.items() for name, value in table.items()})


DEFAULT = _read()
