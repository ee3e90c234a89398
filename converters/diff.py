"""Diffs: what a fine-tuned checkpoint has that its backbone has not, as a package.

Both checkpoints are walked parameter by parameter; only modules that differ are listed. Three forms:

- ``exact``: kind ``assign``, every touched module as the fine-tune has it, bit for bit. As large as what changed;
  :func:`deltahub.converters.pack` brings it down to what the difference is worth.
- ``lowrank``: kind ``lora``, from a randomised SVD of each weight's difference, to a rank or to a share of its energy
  (the sum of squares). What no rank up to the limit reaches, and everything that is not a matrix, stays exact.
- ``dense``: kind ``diff``, the differences themselves in float32, which a user's scale can turn up and down.

What is written is read back and held against the fine-tune: the report says, per parameter, what is lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, write_entries
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.package import Package

__all__ = ["DiffReport", "Loss", "diff"]

_FORMS = ("exact", "lowrank", "dense")
_OVERSAMPLE = 16


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What became of one parameter.

    Attributes:
        name: its live name.
        form: ``exact``, ``lowrank`` or ``dense``.
        rank: of a low-rank form, else 0.
        relative: Frobenius norm of the error over that of the difference; 0 if it is exact.
        largest: the greatest absolute error.
    """

    name: str
    form: str
    rank: int
    relative: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class DiffReport:
    """What a diff found.

    Attributes:
        package: the package.
        parameters: those that differ.
        untouched: how many are equal.
    """

    package: Package
    parameters: tuple[Loss, ...]
    untouched: int


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 256,
    overwrite: bool = False,
) -> DiffReport:
    """Write the difference between two checkpoints of one architecture as a package.

    Args:
        base: the backbone: a folder or a Hub name.
        tuned: the fine-tuned checkpoint.
        out: the package's folder.
        form: ``exact``, ``lowrank`` or ``dense``.
        rank: of each low-rank update.
        energy: instead of a rank, the share of each difference's energy to keep, such as 0.95.
        max_rank: where ``energy`` gives up and keeps the parameter exactly.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_DIFF_FORM`` for options that make no sense; ``E_DIFF_PARAMETER`` with the parameters that no
            kind can set; ``E_DIFF_SHAPE`` for parameters of another shape; ``E_DIFF_EQUAL`` if nothing differs.
    """
    _check_options(form, rank, energy)
    old, new = Base.of_folder(base), Base.of_folder(tuned)
    try:
        if old.source["class"] != new.source["class"]:
            settings = _labels(old, new)
            wanted = str(new.source["class"])
            old.close()
            old = Base.of_folder(base, class_name=wanted, settings=settings)
        touched, untouched = _compare(old, new)
        if not touched:
            raise ConverterError("E_DIFF_EQUAL", "the two checkpoints are equal", where=tuned)
        entries: list[Entry] = []
        losses: list[Loss] = []
        for path, names in touched.items():
            made, lost = _module(path, names, old, new, form=form, rank=rank, energy=energy, max_rank=max_rank)
            entries += made
            losses += lost
        package = write_entries(out, entries, old, overwrite=overwrite)
    finally:
        old.close()
        new.close()
    return DiffReport(package=package, parameters=tuple(losses), untouched=untouched)


def _check_options(form: str, rank: int | None, energy: float | None) -> None:
    wrong = None
    if form not in _FORMS:
        wrong = f"the form is one of {', '.join(_FORMS)}"
    elif (form == "lowrank") != (rank is not None or energy is not None) or (rank is not None and energy is not None):
        wrong = "a low-rank diff, and no other, takes either a rank or an energy"
    elif rank is not None and rank < 1:
        wrong = "a rank is 1 at least"
    elif energy is not None and not 0 < energy < 1:
        wrong = "an energy lies between 0 and 1"
    if wrong is not None:
        raise ConverterError("E_DIFF_FORM", wrong, found=f"form={form!r}, rank={rank}, energy={energy}")


def _labels(old: Base, new: Base) -> list[dict[str, object]]:
    """A head of another size is a setting of the backbone's configuration."""
    from deltahub.backbones.files import read_json

    assert old.files is not None
    assert new.files is not None
    before, after = (read_json(one.files.folder / "config.json") for one in (old, new) if one.files is not None)
    was, value = (c.get("num_labels", len(c.get("id2label") or (0, 0))) for c in (before, after))
    return [] if was == value else [{"on": "config", "path": "num_labels", "was": was, "value": value}]


def _compare(old: Base, new: Base) -> tuple[dict[str, list[str]], int]:
    """Names of the parameters that differ, by module, and how many do not.

    Raises:
        ConverterError: ``E_DIFF_PARAMETER``, ``E_DIFF_SHAPE``.
    """
    from deltahub.hosts import BLOCK

    touched: dict[str, list[str]] = {}
    untouched, seen = 0, set[str]()
    wrong: list[str] = []
    for live, _ in new.arch.model.named_parameters(remove_duplicate=False):
        group = new.arch.tied.get(live, (live,))
        if live in new.arch.converted or live in old.arch.converted:
            wrong.append(f"{live}: the library makes it out of other tensors than the files hold")
            continue
        if group[0] in seen:
            continue
        seen.add(group[0])
        if _equal(old, new, live):
            untouched += 1
            continue
        path, _, name = live.rpartition(".")
        view = new.arch.host(path).view if path else BLOCK
        if view is BLOCK or name not in {"weight", "bias"}:
            wrong.append(f"{live}: no kind of delta sets it")
        else:
            touched.setdefault(path, []).append(name)
    if wrong:
        raise ConverterError(
            "E_DIFF_PARAMETER",
            f"{len(wrong)} parameter(s) differ that no delta can hold",
            found=wrong[0],
            also=wrong[1:],
        )
    return touched, untouched


def _equal(old: Base, new: Base, live: str) -> bool:
    """Whether a parameter has the same dtype, shape and bytes in both; compared in pieces."""
    a, b = old.stored(live), new.stored(live)
    if b is None:
        raise ConverterError("E_DIFF_SHAPE", "the fine-tuned checkpoint lacks a parameter", where=live)
    if a is None:
        return False
    (one, first), (two, second) = a, b
    if first.info.shape != second.info.shape:
        raise ConverterError(
            "E_DIFF_SHAPE",
            "a parameter has another shape in the fine-tuned checkpoint",
            where=live,
            expected=list(first.info.shape),
            found=list(second.info.shape),
            hint="a resized vocabulary cannot be said as a delta of this backbone",
        )
    if first.info.dtype != second.info.dtype:
        return False
    step = 8 << 20
    return all(
        one.read(first.file, first.info.begin + at, min(step, first.nbytes - at))
        == two.read(second.file, second.info.begin + at, min(step, second.nbytes - at))
        for at in range(0, first.nbytes, step)
    )


def _module(
    path: str,
    names: Sequence[str],
    old: Base,
    new: Base,
    *,
    form: str,
    rank: int | None,
    energy: float | None,
    max_rank: int,
) -> tuple[list[Entry], list[Loss]]:
    host = new.arch.host(path)
    after = {"weight": new.weight(path)} | ({"bias": new.value(f"{path}.bias")} if host.shape.bias else {})
    before = {"weight": old.weight(path)} | ({"bias": old.value(f"{path}.bias")} if host.shape.bias else {})
    if any(value is None for value in before.values()):
        form = "exact"  # a head that the backbone does not have
    values = {name: value for name, value in after.items() if value is not None}
    if form == "dense":
        return _dense(path, names, before, values)
    if form == "lowrank" and "weight" in names and host.shape.family in {"linear", "conv", "embedding"}:
        found = _lowrank(path, before["weight"], values["weight"], rank, energy, max_rank)
        if found is not None and not host.shape.grouped:
            entry, loss = found
            entries, losses = [entry], [loss]
            if "bias" in names:
                more, lost = _bias(path, before["bias"], values["bias"])
                entries.append(more)
                losses.append(lost)
            return entries, losses
    tensors = {name: value.contiguous() for name, value in values.items()}
    losses = [Loss(name=f"{path}.{name}", form="exact", rank=0, relative=0.0, largest=0.0) for name in names]
    return [Entry(path=path, kind="assign", tensors=tensors)], losses


def _loss(name: str, form: str, rank: int, wanted: Tensor, made: Tensor, start: Tensor) -> Loss:
    """What is lost between the fine-tune and the backbone with this delta, both in float64."""
    error = (start.double() + made.double()) - wanted.double()
    change = (wanted.double() - start.double()).norm()
    return Loss(
        name=name,
        form=form,
        rank=rank,
        relative=float(error.norm() / change) if float(change) else 0.0,
        largest=float(error.abs().max()) if error.numel() else 0.0,
    )


def _dense(
    path: str, names: Sequence[str], before: Mapping[str, Tensor | None], after: Mapping[str, Tensor]
) -> tuple[list[Entry], list[Loss]]:
    tensors: dict[str, Tensor] = {}
    losses = []
    for name, value in after.items():
        start = before[name]
        assert start is not None
        tensors[name] = (value.double() - start.double()).float().contiguous()
        if name in names:
            losses.append(_loss(f"{path}.{name}", "dense", 0, value, tensors[name], start))
    return [Entry(path=path, kind="diff", config={"scale": 1.0}, tensors=tensors)], losses


def _bias(path: str, before: Tensor | None, after: Tensor) -> tuple[Entry, Loss]:
    assert before is not None
    value = (after.double() - before.double()).float()
    entry = Entry(path=path, kind="bias", config={"scale": 1.0}, tensors={"value": value})
    return entry, _loss(f"{path}.bias", "dense", 0, after, value, before)


def _lowrank(
    path: str, before: Tensor | None, after: Tensor, rank: int | None, energy: float | None, max_rank: int
) -> tuple[Entry, Loss] | None:
    """A low-rank update; ``None`` where its energy needs more than ``max_rank``, or more room than the weight."""
    assert before is not None
    shape = after.shape
    change = (after.double() - before.double()).float().reshape(shape[0], -1)
    smallest = min(change.shape)
    total = float(change.double().square().sum())
    for size in [rank] if rank is not None else list(_ranks(min(max_rank, smallest))):
        u, s, v = _svd(change, min(size, smallest))
        kept = s.double().square().cumsum(0) / total
        if energy is None:
            count = len(s)
        elif float(kept[-1]) < energy:
            continue
        else:
            count = int((kept < energy).sum()) + 1
        if count * sum(change.shape) >= change.numel() and energy is not None:
            return None
        root = s[:count].sqrt()
        up, down = (u[:, :count] * root).contiguous(), (root[:, None] * v[:, :count].T).contiguous()
        loss = _loss(
            f"{path}.weight", "lowrank", count, after.reshape(shape[0], -1), up @ down, before.reshape(shape[0], -1)
        )
        tensors = {"down": down.reshape(count, *shape[1:]), "up": up}
        return Entry(path=path, kind="lora", config={"rank": count, "scale": 1.0}, tensors=tensors), loss
    return None


def _ranks(limit: int) -> Iterator[int]:
    size = 8
    while size < limit:
        yield size
        size *= 4
    yield limit


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular triples: randomised with two power iterations (arXiv:0909.4061) where that is cheaper."""
    import torch

    if rank + _OVERSAMPLE >= min(matrix.shape) // 2:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same checkpoints give the same package
        u, s, v = torch.svd_lowrank(matrix, q=rank + _OVERSAMPLE, niter=2)
    return u[:, :rank], s[:rank], v[:, :rank]
