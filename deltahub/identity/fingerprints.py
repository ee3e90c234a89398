"""Computing identities: of folders and files, of live modules, and for a manifest to be written."""

from __future__ import annotations

__all__ = ["Identity", "describe", "fingerprint", "from_files", "from_module", "leaves"]

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deltahub.errors import IdentityError, UsageError
from deltahub.identity.checkpoints import Checkpoint, open_checkpoint
from deltahub.identity.declared import ALGORITHM
from deltahub.identity.locate import Source, weight_files
from deltahub.identity.modules import module_checkpoint
from deltahub.identity.tree import FLOATS, root, structure
from deltahub.tensors import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

_NO_TIES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a backbone is.

    Two are equal when all their tensors are: what is known about aliases does not count.

    Attributes:
        exact: root over the tensors as stored, 64 lower-case hex digits.
        bf16: root with F64, F32 and F16 rounded to BF16.
        structure: digest over names, dtypes and shapes.
        tensors: how many there are.
        tied: aliases left out, each with the name that is kept.
        excluded: names left out.
    """

    exact: str
    bf16: str
    structure: str
    tensors: int
    tied: Mapping[str, str] = field(default_factory=dict, compare=False)
    excluded: tuple[str, ...] = ()

    def to_manifest(self) -> dict[str, Any]:
        """The manifest's ``backbone.identity``; empty ``tied`` and ``excluded`` are left out."""
        found: dict[str, Any] = {
            "algorithm": ALGORITHM,
            "exact": self.exact,
            "bf16": self.bf16,
            "structure": self.structure,
            "tensors": self.tensors,
        }
        if self.tied:
            found["tied"] = dict(sorted(self.tied.items()))
        if self.excluded:
            found["excluded"] = sorted(self.excluded)
        return found


def _identify(found: Checkpoint, tied: Mapping[str, str], excluded: Iterable[str]) -> Identity:
    left_out = frozenset(excluded)
    names = [name for name in found.specs if name not in left_out]
    pairs = found.leaves(names, bf16=True)
    for alias, kept in tied.items():
        if alias in pairs:
            if kept not in pairs or pairs[alias] != pairs[kept]:
                raise IdentityError(
                    "E_BACKBONE_TIED",
                    "two tensors are declared to be one and are not",
                    where=found.where,
                    expected=f"{alias} equal to {kept}",
                )
            names.remove(alias)
    ties = {alias: kept for alias, kept in {**found.ties, **tied}.items() if alias not in left_out}
    return Identity(
        exact=root({name: pairs[name][0] for name in names}).hex(),
        bf16=root({name: pairs[name][1] for name in names}).hex(),
        structure=structure({name: found.specs[name] for name in names}),
        tensors=len(names),
        tied=ties,
        excluded=tuple(sorted(left_out)),
    )


def from_files(
    source: Source,
    *,
    tied: Mapping[str, str] = _NO_TIES,
    excluded: Iterable[str] = (),
    allow_pickle: bool = False,
    cache: bool = True,
) -> Identity:
    """The identity of a folder, a safetensors file, or several.

    Args:
        source: a folder as ``save_pretrained`` writes it (sharded or not), a file, an index, or a list of files.
        tied: aliases to be left out, each with the kept name that it must equal.
        excluded: names to be left out.
        allow_pickle: whether ``.bin`` may be opened, with ``torch.load(weights_only=True)``.
        cache: whether leaves may be kept for the next time, and taken from there.

    Raises:
        IdentityError: the weights cannot be found or contradict each other, or an alias differs.
        TensorFileError: a file is not a strict safetensors file.
    """
    return _identify(open_checkpoint(source, allow_pickle=allow_pickle, cache=cache), tied, excluded)


def from_module(module: nn.Module, *, excluded: Iterable[str] = ()) -> Identity:
    """The identity of a live module: that of the files which ``save_pretrained`` of it would write.

    Raises:
        IdentityError: ``E_IDENTITY_VALUES``: its tensors have no values, or none that files could hold.
    """
    return _identify(module_checkpoint(module), _NO_TIES, excluded)


def _is_module(source: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def fingerprint(
    source: nn.Module | Source, *, excluded: Iterable[str] = (), allow_pickle: bool = False, cache: bool = True
) -> Identity:
    """The identity of a backbone: a folder, a file, several files, or a live module.

    Raises:
        UsageError: ``E_IDENTITY_SOURCE``: there is no such folder or file.
        IdentityError: as :func:`from_files` and :func:`from_module`.
    """
    if _is_module(source):
        return from_module(source, excluded=excluded)  # type: ignore[arg-type]
    if isinstance(source, str | os.PathLike) and not os.path.exists(source):  # noqa: PTH110 - may hold any character
        raise UsageError(
            "E_IDENTITY_SOURCE",
            "there is no such folder or file",
            found=source,
            hint="a repository of the Hub has to be downloaded first",
        )
    return from_files(source, excluded=excluded, allow_pickle=allow_pickle, cache=cache)  # type: ignore[arg-type]


def _leaves(found: Checkpoint, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        if name not in found.specs:
            raise IdentityError("E_IDENTITY_UNKNOWN", "the backbone has no such tensor", where=found.where, found=name)
    pairs = found.leaves(wanted, bf16=True)
    rounded = {name: pairs[name][1].hex() for name in wanted if found.specs[name].dtype in FLOATS}
    return {name: pairs[name][0].hex() for name in wanted}, rounded


def leaves(
    source: nn.Module | Source, names: Iterable[str], *, allow_pickle: bool = False, cache: bool = True
) -> dict[str, str]:
    """Exact leaves, in hex, of some tensors by their names in files; ``E_IDENTITY_UNKNOWN`` if one is not there."""
    return _leaves(_checkpoint(source, allow_pickle=allow_pickle, cache=cache), names)[0]


def _checkpoint(source: nn.Module | Source, *, allow_pickle: bool, cache: bool) -> Checkpoint:
    if _is_module(source):
        return module_checkpoint(source)  # type: ignore[arg-type]
    return open_checkpoint(source, allow_pickle=allow_pickle, cache=cache)  # type: ignore[arg-type]


def describe(
    source: nn.Module | Source,
    *,
    touched: Iterable[str] = (),
    tied: Mapping[str, str] = _NO_TIES,
    excluded: Iterable[str] = (),
    allow_pickle: bool = False,
    cache: bool = True,
) -> dict[str, Any]:
    """What a manifest says of this backbone: ``identity``, ``leaves``, ``leaves_bf16``, and ``files`` if it has any.

    Args:
        source: a folder, a file, several, or a live module.
        touched: names, as in files, of the tensors that the delta touches.
        tied: as in :func:`from_files`.
        excluded: names to be left out.
        allow_pickle: whether ``.bin`` may be opened.
        cache: whether leaves may be kept and used again.

    Returns:
        A part of the manifest's ``backbone``: ``leaves`` are those of the tensors as stored; ``leaves_bf16`` has
        those that rounding changes, so that a half-precision copy can be recognised by them.
    """
    found = _checkpoint(source, allow_pickle=allow_pickle, cache=cache)
    exact, rounded = _leaves(found, touched)
    section: dict[str, Any] = {"identity": _identify(found, tied, excluded).to_manifest()}
    if not _is_module(source):
        paths = weight_files(source, allow_pickle=allow_pickle).files  # type: ignore[arg-type]
        digests = [(path.name, *sha256_file(path)) for path in paths]
        section["files"] = [{"path": name, "size": size, "sha256": digest} for name, size, digest in digests]
    if exact:
        section["leaves"] = exact
    if rounded:
        section["leaves_bf16"] = rounded
    return section
