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
from typing import TYPE_CHECKING, Any

from deltahub.converters.architecture import Architecture, architecture
from deltahub.converters.checkpoint import Checkpoint
from deltahub.converters.combining import Method
from deltahub.converters.computing import Computed, resolve_tensors
from deltahub.converters.jobs import Live, gather, refuse_live
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deltahub.backbones import BackboneFiles, Setting
    from deltahub.identity import IdentityReport
    from deltahub.package import Package, Probe

__all__ = ["MergeReport", "merge"]

REPLAYED = 4 << 30
"""Bytes of a checkpoint up to which a probe is replayed without being asked for: it needs the whole model."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did.

    Attributes:
        folder: the new checkpoint.
        changed: tensors that were computed, by their names in files.
        added: tensors that the backbone did not have.
        live: what was baked in, as a package beside the weights: module and path of each part.
        copied: bytes that were copied as they are.
        written: bytes of all weight files.
        resumed: weight files that an interrupted run had finished.
        identity: how far the backbone was compared.
        probe: greatest difference for each output of the package's probe; ``None`` where it was not replayed.
        seconds: wall time.
    """

    folder: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    live: tuple[str, ...]
    copied: int
    written: int
    resumed: int
    identity: IdentityReport | None
    probe: Mapping[str, float] | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is merged into what."""

    packages: list[Package]
    method: Method
    files: BackboneFiles
    source: dict[str, Any]
    settings: list[Setting]
    dtype: torch.dtype | None
    bake: bool

    def digest(self, max_shard_bytes: int | None) -> str:
        """What the new weight files follow from."""
        import hashlib
        import json

        from deltahub import __version__

        stats = [(path.name, path.stat()) for path in self.files.files]
        facts = [
            __version__,
            [hashlib.sha256(package.manifest.to_bytes()).hexdigest() for package in self.packages],
            [self.method.document(), self.method.weights],
            [str(self.dtype), max_shard_bytes, self.bake],
            [[name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def merge(
    deltas: Package | str | os.PathLike[str] | Sequence[Package | str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    backbone: str | os.PathLike[str] | None = None,
    weights: float | Sequence[float] = 1.0,
    method: str = "sum",
    density: float | Sequence[float] | None = None,
    scale: float = 1.0,
    seed: int = 0,
    bake: bool = False,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int | None = None,
    verify: str = "touched",
    replay: bool | None = None,
    architecture_of: nn.Module | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Write a checkpoint with deltas in its weights, which any library loads without DeltaHub.

    A run that was killed or interrupted is taken up again by the same call: whole weight files are kept.

    Args:
        deltas: packages, or folders or Hub names of packages; they act in this order, and their effects add up.
        out: the new folder.
        backbone: the backbone's folder, Hub name, or an address that fsspec opens; by default what the first package
            names.
        weights: a factor on each delta's effect, or one for all.
        method: how several deltas are combined: ``sum``, ``task_arithmetic``, ``linear``, ``ties``, ``dare_linear``,
            ``dare_ties`` or ``slerp``, see :mod:`deltahub.converters.combining`. Of these, plain sums are what has been
            found to gain reliably (arXiv:2511.21437).
        density: the share of each delta that ``ties`` (0.2 by default) and ``dare`` (1) keep; one, or one for each.
        scale: multiplies the combined delta of ``task_arithmetic``, ``ties`` and ``dare``.
        seed: of what ``dare`` drops.
        bake: keep what has no merged form beside the weights, as a package that :func:`deltahub.load` opens.
        dtype: of the new checkpoint's floating tensors; by default each keeps its own. Computed in float32 at least.
        max_shard_bytes: spread the tensors over files of at most this size; by default as the backbone's are.
        verify: how far the backbone is compared with what each package declares (``structure``, ``touched``, ``full``).
        replay: whether the probe of a single package is replayed on the new checkpoint before it is put in its place,
            which needs the memory of the model; by default for up to 4 GiB of weights.
        architecture_of: the backbone's module tree, where no known library can lay it out; on ``meta`` will do.
        overwrite: replace ``out`` if it is there; it stays as it was until the new one is whole.
        progress: told the tensor's name, its number, and how many there are.

    Raises:
        ConverterError: ``E_MERGE_UNMERGEABLE`` with the list of modules that have no merged form, ``E_MERGE_TARGET``,
            ``E_MERGE_TIED``, ``E_MERGE_CONVERTED``, ``E_MERGE_BIAS``, ``E_MERGE_SHAPE``, ``E_MERGE_CONFLICT``,
            ``E_MERGE_METHOD``, ``E_MERGE_NONFINITE``, ``E_MERGE_DTYPE``, ``E_MERGE_OUTPUT``; no folder is left behind.
        IdentityError: this is not the backbone that a delta was made for.
        PackageError: ``E_PACKAGE_PROBE_DIFFERS``.
    """
    from deltahub.backbones import resolve
    from deltahub.converters.packages import opened
    from deltahub.converters.staging import at_hand

    started = time.monotonic()
    several = [deltas] if isinstance(deltas, (str, os.PathLike)) or not isinstance(deltas, Sequence) else list(deltas)
    packages = [opened(one) for one in several]
    factors = _factors(weights, len(packages))
    section = packages[0].manifest.backbone.source
    source = {} if section is None else section.model_dump(by_alias=True, exclude_unset=True)
    with at_hand(backbone, near=_existing(Path(out))) as override:
        work = _Work(
            packages=packages,
            method=Method.make(method, factors, density=density, scale=scale, seed=seed),
            files=resolve(source, override=override),
            source=source,
            settings=[setting for package in packages for setting in package.manifest.settings or ()],
            dtype=_dtype(dtype),
            bake=bake,
        )
        found = _run(
            work,
            Path(out),
            max_shard_bytes=max_shard_bytes,
            verify=verify,
            replay=replay,
            architecture_of=architecture_of,
            overwrite=overwrite,
            progress=progress,
            resumable=override is None or override == os.fspath(backbone or ""),
        )
    return MergeReport(folder=Path(out), seconds=time.monotonic() - started, **found)


def _run(
    work: _Work,
    out: Path,
    *,
    max_shard_bytes: int | None,
    verify: str,
    replay: bool | None,
    architecture_of: nn.Module | None,
    overwrite: bool,
    progress: Callable[[str, int, int], None] | None,
    resumable: bool,
) -> dict[str, Any]:
    from deltahub.converters.carrying import Plan, carry, clear, record

    files, packages, dtype = work.files, work.packages, work.dtype
    digest = work.digest(max_shard_bytes) if resumable else None
    with Checkpoint(files.files) as checkpoint, new_folder(out, overwrite=overwrite, resume=digest) as folder:
        arch = architecture(checkpoint, files=files, source=work.source, settings=work.settings, model=architecture_of)
        jobs, live = gather(packages, work.method, arch)
        if not work.bake:
            refuse_live(live)
        computed, more = resolve_tensors(jobs, arch, checkpoint, dtype, work.method, bake=work.bake)
        live += more
        identity = _verify(packages, files, computed, checkpoint, verify)
        plan = Plan.make(checkpoint, computed, dtype=dtype, max_shard_bytes=max_shard_bytes)
        place, source = _lay_out(work, folder, baked=bool(live))
        clear(place, (file.name for file in plan.files))
        resumed = plan.write(place, checkpoint, progress)
        carry(files, place, source=work.source, settings=work.settings, dtype=dtype, retitle=bool(plan.added))
        parts = tuple(f"{one.module}/{one.path}" for one in live)
        record(folder, packages, work.method, plan, identity, parts)
        probe = _probe(work)
        if live:
            _bake(work, folder, live, arch, source=source, weights=[place / f.name for f in plan.files], probe=probe)
        shown = None
        if probe is not None and (replay or (replay is None and plan.written <= REPLAYED)):
            shown = _replay(folder if live else place, work.source, probe, baked=bool(live))
    return {
        "changed": tuple(sorted(computed)),
        "added": tuple(sorted(plan.added)),
        "live": parts,
        "copied": plan.copied,
        "written": plan.written,
        "resumed": resumed,
        "identity": identity,
        "probe": shown,
    }


def _existing(path: Path) -> Path:
    """The nearest folder that is there: on the disk that the output goes to."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _lay_out(work: _Work, folder: Path, *, baked: bool) -> tuple[Path, dict[str, Any]]:
    """Where in the new folder the weights go, and what a manifest there says of its source.

    What is baked into the denoiser of a pipeline is useful with the pipeline around it.
    """
    source = {key: value for key, value in work.source.items() if key == "class"}
    if not baked or not work.source.get("pipeline"):
        return folder, source
    from deltahub.backbones.pipelines import surroundings
    from deltahub.converters.carrying import clear

    name = str(work.source["subfolder"])
    clear(folder, [name])
    surroundings(work.source, work.files.folder, folder)
    place = folder / name
    place.mkdir(exist_ok=True)
    return place, source | {"pipeline": work.source["pipeline"], "subfolder": name}


def _probe(work: _Work) -> Probe | None:
    """What the new checkpoint must give: the probe of a single package that is merged as it was published."""
    if len(work.packages) != 1 or not work.method.sequential or work.method.weights != (1.0,):
        return None
    probe = work.packages[0].probe()
    own = None if work.dtype is None else str(work.dtype).removeprefix("torch.")
    return probe if probe is None or own is None or own in probe.tolerance else None


def _bake(work: _Work, folder: Path, live: Sequence[Live], arch: Architecture, **options: Any) -> None:
    from deltahub.converters.baking import bake

    bake(folder, work.packages, live, work.method, arch, **options)


def _replay(folder: Path, source: Mapping[str, Any], probe: Probe, *, baked: bool) -> dict[str, float]:
    """Load what was written as its user will, and compare with the publisher's numbers."""
    from deltahub.backbones import build, denoiser_of, resolve
    from deltahub.loading import load, replay

    model: Any
    if baked:
        model = load(folder)
        model = model if (inner := denoiser_of(model)) is None else inner[1]
    else:
        own = {"class": source["class"]} if source.get("class") else {}
        model = build(own, resolve(own, override=folder)).model
    return replay(model, probe)


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
