"""Merging: deltas written into a checkpoint, from disk to disk, without ever holding the model.

The backbone's files are walked tensor by tensor. What no delta touches is copied as bytes, by the kernel where it can;
what one touches is read, changed and written in blocks of rows (:mod:`deltahub.merging`), which gives the bits that
merging in memory gives. What is held is a block, or one tensor where an equation needs all of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltahub.converters.architecture import architecture
from deltahub.converters.checkpoint import Checkpoint
from deltahub.converters.jobs import Computed, gather, resolve_tensors
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deltahub.backbones import BackboneFiles
    from deltahub.identity import IdentityReport
    from deltahub.package import Package

__all__ = ["MergeReport", "merge"]


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did.

    Attributes:
        folder: the new checkpoint.
        changed: tensors that were computed, by their names in files.
        added: tensors that the backbone did not have.
        copied: bytes that were copied as they are.
        written: bytes of all weight files.
        identity: how far the backbone was compared.
        seconds: wall time.
    """

    folder: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    copied: int
    written: int
    identity: IdentityReport | None
    seconds: float


def merge(
    deltas: Package | str | os.PathLike[str] | Sequence[Package | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    backbone: str | os.PathLike[str] | None = None,
    weights: float | Sequence[float] = 1.0,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int | None = None,
    verify: str = "touched",
    architecture_of: nn.Module | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Write a checkpoint with deltas in its weights, which any library loads without DeltaHub.

    Args:
        deltas: packages, or folders or Hub names of packages; they act in this order, and their effects add up.
        out: the new folder.
        backbone: the backbone's folder or Hub name; by default what the first package names.
        weights: a factor on each delta's effect, or one for all.
        dtype: of the new checkpoint's floating tensors; by default each keeps its own. Computed in float32 at least.
        max_shard_bytes: spread the tensors over files of at most this size; by default as the backbone's are.
        verify: how far the backbone is compared with what each package declares (``structure``, ``touched``, ``full``).
        architecture_of: the backbone's module tree, where no known library can lay it out; on ``meta`` will do.
        overwrite: replace ``out`` if it is there; it stays as it was until the new one is whole.
        progress: told the tensor's name, its number, and how many there are.

    Raises:
        ConverterError: ``E_MERGE_UNMERGEABLE`` with the list of modules that have no merged form, ``E_MERGE_TARGET``,
            ``E_MERGE_TIED``, ``E_MERGE_CONVERTED``, ``E_MERGE_BIAS``, ``E_MERGE_SHAPE``, ``E_MERGE_CONFLICT``,
            ``E_MERGE_NONFINITE``, ``E_MERGE_DTYPE``, ``E_MERGE_OUTPUT``; no folder is left behind.
        IdentityError: this is not the backbone that a delta was made for.
    """
    from deltahub.backbones import resolve
    from deltahub.converters.carrying import Plan, carry, record
    from deltahub.converters.packages import opened

    started = time.monotonic()
    several = [deltas] if isinstance(deltas, (str, os.PathLike)) or not isinstance(deltas, Sequence) else list(deltas)
    packages = [opened(one) for one in several]
    factors = _factors(weights, len(packages))
    section = packages[0].manifest.backbone.source
    source = {} if section is None else section.model_dump(by_alias=True, exclude_unset=True)
    files = resolve(source, override=os.fspath(backbone) if backbone is not None else None)
    settings = [setting for package in packages for setting in package.manifest.settings or ()]
    with Checkpoint(files.files) as checkpoint, new_folder(out, overwrite=overwrite) as folder:
        arch = architecture(checkpoint, files=files, source=source, settings=settings, model=architecture_of)
        jobs = gather(packages, factors, arch)
        computed = resolve_tensors(jobs, arch, checkpoint, _dtype(dtype))
        identity = _verify(packages, files, computed, checkpoint, verify)
        plan = Plan.make(checkpoint, computed, dtype=_dtype(dtype), max_shard_bytes=max_shard_bytes)
        plan.write(folder, checkpoint, progress)
        carry(files, folder, source=source, settings=settings, dtype=_dtype(dtype), retitle=bool(plan.added))
        record(folder, packages, factors, plan, identity)
    return MergeReport(
        folder=Path(out),
        changed=tuple(sorted(computed)),
        added=tuple(sorted(plan.added)),
        copied=plan.copied,
        written=plan.written,
        identity=identity,
        seconds=time.monotonic() - started,
    )


def _factors(weights: float | Sequence[float], count: int) -> list[float]:
    import math

    factors = [float(weights)] * count if isinstance(weights, (int, float)) else [float(w) for w in weights]
    if len(factors) != count or not all(map(math.isfinite, factors)):
        raise ConverterError(
            "E_MERGE_WEIGHTS", "each delta needs one finite weight", expected=f"{count} numbers", found=list(factors)
        )
    return factors


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
    ):  # fmt: skip
        raise ConverterError(
            "E_MERGE_DTYPE",
            "a checkpoint cannot be written in this dtype",
            expected="float32, bfloat16, float16 or float64",
            found=dtype,
        )
    return found


def _verify(
    packages: Sequence[Package],
    files: BackboneFiles,
    computed: Mapping[str, Computed],
    checkpoint: Checkpoint,
    level: str,
) -> IdentityReport | None:
    """Compare the backbone with what each package declares; the first package's report is kept."""
    from deltahub.identity import Level, check

    asked = Level.named(level)
    touched = [name for name in computed if name in checkpoint]
    reports = []
    for package in packages:
        section = package.manifest.backbone
        declared = set(section.leaves or ())
        reports.append(
            check(
                section,
                files=list(files.files),
                level=asked,
                touched=[name for name in touched if name in declared] if declared else None,
                source={"hub": files.hub, "commit": files.commit},
            )
        )
    return reports[0] if reports else None
