"""Where the parameters that a merge changes lie in the files, and their new values, block by block.

Everything that can be refused is refused here, before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltahub.converters.architecture import Architecture
from deltahub.converters.checkpoint import Checkpoint
from deltahub.converters.combining import Method
from deltahub.converters.jobs import Job, Live
from deltahub.converters.shards import Source
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deltahub.merging import Change, Merging

__all__ = ["FLOATS", "Computed", "resolve_tensors"]

FLOATS = ("F64", "F32", "F16", "BF16")
_LIVE_CODES = frozenset({"E_MERGE_TIED", "E_MERGE_BIAS", "E_MERGE_CONVERTED", "E_MERGE_QUANTISED"})
"""Reasons for which a weight cannot be changed in the files, though a delta beside it can act."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A tensor to be computed: its shape as stored, its dtype, whether it is new, and its blocks."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    new: bool
    source: Source


def resolve_tensors(
    jobs: Mapping[str, Job],
    arch: Architecture,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    method: Method,
    *,
    bake: bool = False,
) -> tuple[dict[str, Computed], list[Live]]:
    """The tensors of the checkpoint that change, by name, and how each is computed; and what is left to stay live.

    Raises:
        ConverterError: a parameter has no place in the files, or is shared, or cannot be computed with.
    """
    found: dict[str, Computed] = {}
    live: list[Live] = []
    for path, job in jobs.items():
        try:
            made = _resolve_module(path, jobs, arch, checkpoint, dtype, method)
        except ConverterError as error:
            if not bake or error.code not in _LIVE_CODES:
                raise
            live += job.live(f"{', '.join(job.owners)} at {path}: {error.what}")
            continue
        for name in made.keys() & found.keys():
            live_name = f"{path}.{name.rpartition('.')[2]}"
            if live_name not in arch.tied:
                raise ConverterError("E_MERGE_NAMES", "two modules write this tensor", where=name)
            made[name] = replace(made[name], source=_Tied(live_name, found[name].source, made[name].source))
        found |= made
    return found, live


def _resolve_module(
    path: str,
    jobs: Mapping[str, Job],
    arch: Architecture,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    method: Method,
) -> dict[str, Computed]:
    from deltahub.hosts import BLOCK
    from deltahub.merging import Merging, stored_transposed

    job = jobs[path]
    view, shape = job.host.view, job.host.shape
    if view is BLOCK or shape.weight_shape is None:
        raise ConverterError("E_MERGE_UNMERGEABLE", "this module has no weight of its own", where=path)
    weight = _canonical_shape(job)
    merging = Merging(job.changes, weight, transposed=stored_transposed(view.canonical))
    combined = not method.sequential
    places: dict[str, str | None] = {}
    for name, wanted in (("weight", merging.sets_weight), ("bias", merging.sets_bias)):
        if wanted:
            # A parameter that only one package has is no matter of combining.
            alone = len(job.packages) == 1 and arch.stored.get(job.host.names[name]) is None
            _check_ties(job, name, jobs, arch)
            places[name] = _place(job, name, arch, checkpoint, reads=job.reads(name) or (combined and not alone))
    fallback = _float_dtype(checkpoint, places, arch, job)
    found: dict[str, Computed] = {}
    for name, stored in places.items():
        kind = _Combined if combined and stored is not None else _Blocks
        source = kind(job, merging, name, arch, checkpoint, dtype, fallback, method)
        found[stored or job.host.names[name]] = Computed(
            shape=source.shape, dtype=source.dtype, new=stored is None, source=source
        )
    return found


def _float_dtype(checkpoint: Checkpoint, places: Mapping[str, str | None], arch: Architecture, job: Job) -> torch.dtype:
    """The dtype of a module's tensors in the files; of a new module, that of most of the checkpoint."""
    from collections import Counter

    from deltahub.tensors import torch_dtype

    for stored in [*places.values(), arch.stored.get(job.host.names["weight"])]:
        if stored is not None and checkpoint[stored].info.dtype in FLOATS:
            return torch_dtype(checkpoint[stored].info.dtype)
    sizes: Counter[str] = Counter()
    for one in checkpoint.values():
        if one.info.dtype in FLOATS:
            sizes[one.info.dtype] += one.nbytes
    return torch_dtype(sizes.most_common(1)[0][0] if sizes else "F32")


def _check_ties(job: Job, name: str, jobs: Mapping[str, Job], arch: Architecture) -> None:
    """A tied parameter may be merged where the deltas change it under all of its names."""
    live = f"{job.host.path}.{name}"
    others = [other for other in arch.tied.get(live, ()) if other != live]
    for other in others:
        path, _, last = other.rpartition(".")
        if path not in jobs or not any(last in change.ports for change in jobs[path].changes):
            raise _tied(live, others)


def _tied(live: str, others: Sequence[str]) -> ConverterError:
    return ConverterError(
        "E_MERGE_TIED",
        "merging would change another module too: the parameter is tied",
        where=live,
        found=", ".join(others),
        hint="keep the delta live, or untie the backbone first",
    )


def _place(job: Job, name: str, arch: Architecture, checkpoint: Checkpoint, *, reads: bool) -> str | None:
    """Where a parameter lies in the files; ``None`` for one that is new and set as a whole."""
    live = job.host.names[name]
    if name == "bias" and not job.host.shape.bias:
        raise ConverterError(
            "E_MERGE_BIAS",
            "this module has no bias, and no class that loads the checkpoint would give it one",
            where=live,
            found=", ".join(job.owners),
            hint="keep the delta live",
        )
    if live in arch.converted:
        raise ConverterError(
            "E_MERGE_CONVERTED",
            "the library makes this parameter out of other tensors than the files hold",
            where=live,
            hint="merge in memory: deltahub.load(..., merge=True), then save_pretrained",
        )
    stored = arch.stored.get(live)
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


def _canonical_shape(job: Job) -> tuple[int, ...]:
    shape = job.host.shape.weight_shape
    assert shape is not None
    return (job.host.stack, *shape) if job.host.stack else shape


def _live_shape(job: Job, name: str) -> tuple[int, ...]:
    """The shape in which the library stores a parameter."""
    import torch

    shape = _canonical_shape(job)
    if name == "bias":
        return shape[: 2 if job.host.stack else 1]
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
        method: Method,
    ) -> None:
        self.job, self.merging, self.name, self.checkpoint, self.method = job, merging, name, checkpoint, method
        self.shape = _live_shape(job, name)
        self.stored = {one: arch.stored.get(job.host.names[one]) for one in ("weight", "bias")}
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


class _Tied:
    """A parameter that modules share, changed in each of them: to the same values, or not at all."""

    def __init__(self, live: str, *sources: Source) -> None:
        self.live, self.sources = live, sources

    def blocks(self) -> Iterator[Tensor]:
        import itertools

        import torch

        for one, other in itertools.zip_longest(*(source.blocks() for source in self.sources)):
            if one is None or other is None or one.shape != other.shape or not torch.equal(one, other):
                raise _tied(self.live, ["a module that another delta, or another part of it, makes something else of"])
            yield one


class _Combined(_Blocks):
    """One parameter of a module that several deltas change each for itself, block by block."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fresh = False
        changes: dict[int, list[Change]] = {}
        for change, (number, _) in zip(self.job.changes, self.job.sites, strict=True):
            changes.setdefault(number, []).append(change)
        self._each = {number: self._merging_of(own) for number, own in changes.items()}

    def _merging_of(self, changes: Sequence[Change]) -> Merging:
        from deltahub.merging import Merging, stored_transposed

        return Merging(changes, self.merging.shape, transposed=stored_transposed(self.job.host.view.canonical))

    def _blocks(self) -> Iterator[Tensor]:
        view = self.job.host.view
        for block in self.method.combine(self._models, self.job.host.names[self.name]):
            rows = block.to(self.dtype)
            yield view.stored(rows) if self.name == "weight" else rows

    def _models(self) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
        """The backbone's block, and what each delta alone would make of it; canonical, in float32."""
        import torch

        wide, view, merging = torch.float32, self.job.host.view, self.merging
        count = range(len(self.method.weights))
        if merging.axis is None:
            weight = view.canonical(self._read("weight"))
            bias = None if self.stored["bias"] is None else self._read("bias")
            own = weight if self.name == "weight" else bias
            assert own is not None
            made = {n: m.changed(weight, bias, wide)[self.name == "bias"] for n, m in self._each.items()}
            yield own.to(wide), [made.get(n) for n in count]
        elif self.name == "bias":
            bias = self._read("bias")
            yield (
                bias.to(wide),
                [
                    self._each[n].bias(bias, self.own, wide) if n in self._each and self._each[n].sets_bias else None
                    for n in count
                ],
            )
        else:
            for at in merging.pieces():
                piece = view.canonical(self._read("weight", at))
                yield (
                    piece.to(wide),
                    [
                        self._each[n].weight(piece, at, wide) if n in self._each and self._each[n].sets_weight else None
                        for n in count
                    ],
                )


def _check_finite(block: Tensor, job: Job, name: str) -> None:
    # The extremes of a block are finite exactly if all of it is, and cost a thirtieth of asking every element.
    if block.numel() and not all(bool(one.isfinite()) for one in block.aminmax()):
        raise ConverterError(
            "E_MERGE_NONFINITE",
            "the merged values are not finite",
            where=job.host.names[name],
            found=f"{str(block.dtype).removeprefix('torch.')}, merged from {', '.join(job.owners)}",
            hint="the delta or the backbone holds NaN or infinity, or the values are too large for this dtype",
        )
