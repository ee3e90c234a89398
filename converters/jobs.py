"""What a merge has to do: the changes of each module, and where its parameters lie in the files.

Everything that can be refused is refused here, before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltahub.converters.architecture import Architecture, HostModule
from deltahub.converters.checkpoint import Checkpoint
from deltahub.converters.shards import Source
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deltahub.manifest import Module
    from deltahub.merging import Change, Merging
    from deltahub.package import Package

__all__ = ["FLOATS", "Computed", "Job", "gather", "resolve_tensors"]

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(kw_only=True)
class Job:
    """What is to become of one module: its changes in order, and who asked for each."""

    host: HostModule
    owners: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def reads(self, name: str) -> bool:
        """Whether what the module has now as ``weight`` or ``bias`` matters for what it will have."""
        symbol = "W" if name == "weight" else "b"
        for change in self.changes:
            port = change.ports.get(name)
            if port is not None:
                return change.strength != 1.0 or symbol in port.uses
        return True


def gather(packages: Sequence[Package], factors: Sequence[float], arch: Architecture) -> dict[str, Job]:
    """All changes by module path, in order; what cannot be merged is refused as a whole, with the list.

    Raises:
        ConverterError: ``E_MERGE_UNMERGEABLE``, ``E_MERGE_TARGET``, ``E_MERGE_CONFLICT``.
    """
    jobs: dict[str, Job] = {}
    unmergeable: list[str] = []
    for number, (package, factor) in enumerate(zip(packages, factors, strict=True)):
        for module in package.manifest.modules:
            owner = module.name if len(packages) == 1 else f"{number}:{module.name}"
            unmergeable += _gather_module(package, module, factor, owner, arch, jobs)
    if unmergeable:
        raise ConverterError(
            "E_MERGE_UNMERGEABLE",
            f"{len(unmergeable)} part(s) have no merged form",
            found=unmergeable[0],
            hint="keep these deltas live: deltahub.load attaches them",
            also=unmergeable[1:],
        )
    for path, job in jobs.items():
        _check_conflict(path, job)
    return jobs


def _gather_module(
    package: Package, module: Module, factor: float, owner: str, arch: Architecture, jobs: dict[str, Job]
) -> list[str]:
    from deltahub.sites import Bound, change_of

    kind = package.registry.get(module.kind, module.version)
    config = kind.check_config(module.config)
    stored = package.tensors(module.name)
    left = []
    for path in module.paths:
        host = arch.host(path)
        if not kind.mergeable(config, host.shape) or module.removes:
            left.append(f"{owner}: {kind.name} at {path} ({host.type_name})")
            continue
        bound = Bound(kind, config, host.shape)
        tensors = stored[path]
        names = list(kind.tensors(config, host.shape, known={n: tuple(t.shape) for n, t in tensors.items()}))
        job = jobs.setdefault(path, Job(host=host))
        job.changes.append(change_of(bound, names, [tensors[name] for name in names], factor))
        job.owners.append(owner)
    return left


def _check_conflict(path: str, job: Job) -> None:
    """Two that overwrite one parameter contradict each other, as they do when they are attached."""
    setter: dict[str, str] = {}
    for change, owner in zip(job.changes, job.owners, strict=True):
        for name in ("weight", "bias"):
            port = change.ports.get(name)
            if port is None or port.uses & {"W", "b"}:
                continue
            if name in setter:
                raise ConverterError(
                    "E_MERGE_CONFLICT",
                    f"{setter[name]} and {owner} both set this parameter",
                    where=f"{path}.{name}",
                    hint="merge one of them",
                )
            setter[name] = owner


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A tensor to be computed: its shape as stored, its dtype, whether it is new, and its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    new: bool
    source: Source


def resolve_tensors(
    jobs: Mapping[str, Job], arch: Architecture, checkpoint: Checkpoint, dtype: torch.dtype | None
) -> dict[str, Computed]:
    """The tensors of the checkpoint that change, by name, and how each is computed.

    Raises:
        ConverterError: a parameter has no place in the files, or is shared, or cannot be computed with.
    """
    from deltahub.hosts import BLOCK
    from deltahub.merging import Merging, stored_transposed

    found: dict[str, Computed] = {}
    for path, job in jobs.items():
        view, shape = job.host.view, job.host.shape
        weight = shape.weight_shape
        if view is BLOCK or weight is None:
            raise ConverterError("E_MERGE_UNMERGEABLE", "this module has no weight of its own", where=path)
        merging = Merging(job.changes, weight, transposed=stored_transposed(view.canonical))
        places: dict[str, str | None] = {}
        for name, wanted in (("weight", merging.sets_weight), ("bias", merging.sets_bias)):
            if wanted:
                places[name] = _place(job, name, arch, checkpoint)
        fallback = _float_dtype(checkpoint, places, arch, path)
        for name, stored in places.items():
            source = _Blocks(job, merging, name, arch, checkpoint, dtype, fallback)
            target = stored or f"{path}.{name}"
            if target in found:
                raise ConverterError("E_MERGE_NAMES", "two modules write this tensor", where=target)
            found[target] = Computed(shape=source.shape, dtype=source.dtype, new=stored is None, source=source)
    return found


def _float_dtype(
    checkpoint: Checkpoint, places: Mapping[str, str | None], arch: Architecture, path: str
) -> torch.dtype:
    """The dtype of a module's tensors in the files; of a new module, that of most of the checkpoint."""
    from collections import Counter

    from deltahub.tensors import torch_dtype

    for stored in [*places.values(), arch.stored.get(f"{path}.weight")]:
        if stored is not None and checkpoint[stored].info.dtype in FLOATS:
            return torch_dtype(checkpoint[stored].info.dtype)
    sizes: Counter[str] = Counter()
    for one in checkpoint.values():
        if one.info.dtype in FLOATS:
            sizes[one.info.dtype] += one.nbytes
    return torch_dtype(sizes.most_common(1)[0][0] if sizes else "F32")


def _place(job: Job, name: str, arch: Architecture, checkpoint: Checkpoint) -> str | None:
    """Where a parameter lies in the files; ``None`` for one that is new and set as a whole."""
    live = f"{job.host.path}.{name}"
    if name == "bias" and not job.host.shape.bias:
        raise ConverterError(
            "E_MERGE_BIAS",
            "this module has no bias, and no class that loads the checkpoint would give it one",
            where=live,
            found=", ".join(job.owners),
            hint="keep the delta live",
        )
    if live in arch.tied:
        raise ConverterError(
            "E_MERGE_TIED",
            "merging would change another module too: the parameter is tied",
            where=live,
            found=", ".join(other for other in arch.tied[live] if other != live),
            hint="keep the delta live, or untie the backbone first",
        )
    if live in arch.converted:
        raise ConverterError(
            "E_MERGE_CONVERTED",
            "the library makes this parameter out of other tensors than the files hold",
            where=live,
            hint="merge in memory: deltahub.load(..., merge=True), then save_pretrained",
        )
    stored = arch.stored.get(live)
    reads = job.reads(name)
    expected = _live_shape(job, name)
    if stored is None:
        if reads:
            raise ConverterError(
                "E_MERGE_MISSING",
                "the checkpoint does not hold this parameter: there is nothing to add to",
                where=live,
            )
        return None
    info = checkpoint[stored].info
    if reads and (info.dtype not in FLOATS or info.shape != expected):
        quantised = info.dtype not in FLOATS
        raise ConverterError(
            "E_MERGE_QUANTISED" if quantised else "E_MERGE_SHAPE",
            "the files hold this parameter in a form that cannot be added to",
            where=stored,
            expected=f"a floating tensor of shape {list(expected)}",
            found=f"{info.dtype} {list(info.shape)}",
            hint="merge into the original, unquantised backbone" if quantised else None,
        )
    return stored


def _live_shape(job: Job, name: str) -> tuple[int, ...]:
    """The shape in which the library stores a parameter."""
    import torch

    shape = job.host.shape.weight_shape
    assert shape is not None
    if name == "bias":
        return (shape[0],)
    return tuple(job.host.view.stored(torch.empty(shape, device="meta")).shape)


class _Blocks:
    """One parameter of a module, block by block."""

    def __init__(
        self,
        job: Job,
        merging: Merging,
        name: str,
        arch: Architecture,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None,
        fallback: torch.dtype,
    ) -> None:
        self.job, self.merging, self.name, self.checkpoint = job, merging, name, checkpoint
        self.shape = _live_shape(job, name)
        self.stored = {one: arch.stored.get(f"{job.host.path}.{one}") for one in ("weight", "bias")}
        self.own = fallback
        self.dtype = dtype or fallback
        # A value that is only overwritten may be missing, or of another shape: nothing of it is read.
        self.fresh = not job.reads(name)

    def blocks(self) -> Iterator[Tensor]:
        for block in self._blocks():
            _check_finite(block, self.job, self.name)
            yield block.contiguous()

    def _blocks(self) -> Iterator[Tensor]:
        merging, view = self.merging, self.job.host.view
        if merging.axis is None:
            weight = view.canonical(self._read("weight"))
            bias = None if self.stored["bias"] is None else self._read("bias")
            new, changed = merging.changed(weight, bias, self.dtype)
            if self.name == "weight":
                yield view.stored(new)
            else:
                assert changed is not None
                yield changed
        elif self.name == "bias":
            new_bias = merging.bias(self._read("bias"), self.own, self.dtype)
            assert new_bias is not None
            yield new_bias
        else:
            for at in merging.pieces():
                yield view.stored(merging.weight(view.canonical(self._read("weight", at)), at, self.dtype))

    def _read(self, name: str, at: tuple[int, int] | None = None) -> Tensor:
        """Some stored rows, or zeros in their place where they are about to be overwritten."""
        import torch

        stored = self.stored[name]
        if (name == self.name and self.fresh) or stored is None:
            shape = _live_shape(self.job, name)
            rows = shape if at is None else (at[1] - at[0], *shape[1:])
            return torch.zeros(rows, dtype=self.own)
        return self.checkpoint.rows(stored, *(at or ()))


def _check_finite(block: Tensor, job: Job, name: str) -> None:
    # The extremes of a block are finite exactly if all of it is, and cost a thirtieth of asking every element.
    if block.numel() and not all(bool(one.isfinite()) for one in block.aminmax()):
        raise ConverterError(
            "E_MERGE_NONFINITE",
            "the merged values are not finite",
            where=f"{job.host.path}.{name}",
            found=f"{str(block.dtype).removeprefix('torch.')}, merged from {', '.join(job.owners)}",
            hint="the delta or the backbone holds NaN or infinity, or the values are too large for this dtype",
        )
