"""Diffs: what a fine-tuned checkpoint has that its backbone has not, as a package.

Both checkpoints are walked parameter by parameter; only modules that differ are listed, and large values are read when
they are written, so neither model is ever held. ``exact`` gives back the fine-tune bit for bit, as large as what
changed (:func:`deltahub.converters.pack` brings it down to what the difference is worth); the other forms of
:mod:`deltahub.converters.forms` take less room, and ``auto`` chooses among them by a budget.

What was written is applied to the backbone and held against the fine-tune; the report says what each parameter loses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, write_entries
from deltahub.converters.forms import FORMS, LOSSY, Form, best, options, pending, weight_entry
from deltahub.converters.reconstructing import Loss, bits_equal, losses
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.package import Package

__all__ = ["DiffReport", "Loss", "diff"]

_SMALL = 1024
"""Elements of a weight below which a lossy form saves nothing worth its loss."""


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

    @property
    def bits(self) -> float:
        """Bits for each number that differs or lies in a tensor with one that does."""
        return sum(one.bits * one.numbers for one in self.parameters) / sum(one.numbers for one in self.parameters)


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int = 256,
    density: float | None = None,
    seed: int = 0,
    bits: float | None = None,
    error: float | None = None,
    overwrite: bool = False,
) -> DiffReport:
    """Write the difference between two checkpoints of one architecture as a package.

    Args:
        base: the backbone: a folder or a Hub name.
        tuned: the fine-tuned checkpoint.
        out: the package's folder.
        form: ``exact``, ``dense``, ``lowrank``, ``sparse``, ``dare``, ``sign``, ``int8`` or ``auto``. Norms, biases and
            small weights stay exact in all of them, or are kept as a difference in float32.
        rank: of each low-rank update.
        energy: instead of a rank, the share of each difference's energy (sum of squares) to keep, such as 0.95.
        max_rank: where ``energy`` gives up and keeps the parameter exactly.
        density: the share of elements that ``sparse`` and ``dare`` keep; 0.01 by default.
        seed: of what ``dare`` drops.
        bits: for ``auto``: bits for each number of the weights that differ, on average over all of them.
        error: for ``auto`` instead: the greatest relative error of each weight's difference (Frobenius norm).
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_DIFF_FORM`` for options that make no sense; ``E_DIFF_PARAMETER`` with the parameters that no
            kind can set; ``E_DIFF_SHAPE`` for parameters of another shape; ``E_DIFF_EQUAL`` if nothing differs;
            ``E_DIFF_VERIFY`` where an exact form does not give back the fine-tune.
        PackageError: NaN or infinity in the fine-tune, or the folder cannot be written.
    """
    wanted = _form(form, rank, energy, max_rank, density, seed, bits, error)
    old, new = Base.of_folder(base), Base.of_folder(tuned)
    try:
        settings = _settings(old, new)
        if settings or old.source["class"] != new.source["class"]:
            old.close()
            old = Base.of_folder(base, class_name=str(new.source["class"]), settings=settings)
        touched, untouched = _compare(old, new)
        if not touched:
            raise ConverterError("E_DIFF_EQUAL", "the two checkpoints are equal", where=tuned)
        forms = _chosen(touched, old, new, wanted, bits, error)
        entries: list[Entry] = []
        for path, names in touched.items():
            entries += _module(path, names, old, new, forms.get(path, wanted))
        package = write_entries(out, entries, old, overwrite=overwrite)
        try:
            found = losses(package, old, new, touched, exact=form == "exact")
        except BaseException:
            _discard(package)
            raise
    finally:
        old.close()
        new.close()
    return DiffReport(package=package, parameters=tuple(found), untouched=untouched)


def _discard(package: Package) -> None:
    """A package that does not give back what it should is not left behind."""
    import shutil

    package.close()
    shutil.rmtree(package.path)


def _form(
    form: str,
    rank: int | None,
    energy: float | None,
    max_rank: int,
    density: float | None,
    seed: int,
    bits: float | None,
    error: float | None,
) -> Form:
    wrong = None
    if form not in FORMS:
        wrong = f"the form is one of {', '.join(FORMS)}"
    elif (form == "lowrank") != (rank is not None or energy is not None) or (rank is not None and energy is not None):
        wrong = "a low-rank diff, and no other, takes either a rank or an energy"
    elif (rank is not None and rank < 1) or max_rank < 1:
        wrong = "a rank is 1 at least"
    elif energy is not None and not 0 < energy < 1:
        wrong = "an energy lies between 0 and 1"
    elif density is not None and (form not in {"sparse", "dare"} or not 0 < density <= 1):
        wrong = "a sparse diff, and no other, takes a density above 0, of 1 at most"
    elif (form == "auto") != (bits is not None or error is not None) or (bits is not None and error is not None):
        wrong = "auto, and no other form, takes either bits or an error"
    elif not all(one is None or one > 0 for one in (bits, error)):
        wrong = "a budget is above 0"
    if wrong is not None:
        found = f"form={form!r}, rank={rank}, energy={energy}, density={density}, bits={bits}, error={error}"
        raise ConverterError("E_DIFF_FORM", wrong, found=found)
    return Form(name=form, rank=rank, energy=energy, max_rank=max_rank, density=density or 0.01, seed=seed)


def _settings(old: Base, new: Base) -> list[dict[str, object]]:
    """Sizes that differ in the configurations: a head's, and the vocabulary's."""
    from deltahub.backbones.files import read_json

    if old.files is None or new.files is None or not str(new.source["class"]).startswith("transformers."):
        return []
    before, after = (read_json(one.files.folder / "config.json") for one in (old, new) if one.files is not None)
    found: list[dict[str, object]] = []
    if old.source["class"] != new.source["class"]:
        was, value = (c.get("num_labels", len(c.get("id2label") or (0, 0))) for c in (before, after))
        found += [] if was == value else [{"on": "config", "path": "num_labels", "was": was, "value": value}]
    was, value = before.get("vocab_size"), after.get("vocab_size")
    if was != value and isinstance(was, int) and isinstance(value, int):
        found.append({"on": "config", "path": "vocab_size", "was": was, "value": value})
    return found


def _compare(old: Base, new: Base) -> tuple[dict[str, list[str]], int]:
    """Names of the parameters that differ, by module, and how many do not; of tied ones, all names.

    Raises:
        ConverterError: ``E_DIFF_PARAMETER``, ``E_DIFF_SHAPE``.
    """
    from deltahub.hosts import BLOCK

    touched: dict[str, list[str]] = {}
    untouched, seen = 0, set[str]()
    wrong: list[str] = []
    resized = any(setting["path"] == "vocab_size" for setting in old.settings)
    for live, _ in new.arch.model.named_parameters(remove_duplicate=False):
        group = new.arch.tied.get(live, (live,))
        if live in new.arch.converted or live in old.arch.converted:
            wrong.append(f"{live}: the library makes it out of other tensors than the files hold")
            continue
        if group[0] in seen:
            continue
        seen.add(group[0])
        if _equal(old, new, live, resized=resized):
            untouched += 1
            continue
        for member in group:
            path, _, name = member.rpartition(".")
            view = new.arch.host(path).view if path else BLOCK
            if view is BLOCK or name not in {"weight", "bias"}:
                wrong.append(f"{member}: no kind of delta sets it")
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


def _equal(old: Base, new: Base, live: str, *, resized: bool) -> bool:
    """Whether a parameter has the same dtype, shape and bytes in both; compared in pieces."""
    a, b = old.stored(live), new.stored(live)
    if b is None:
        raise ConverterError("E_DIFF_SHAPE", "the fine-tuned checkpoint lacks a parameter", where=live)
    if a is None:
        return False
    (one, first), (two, second) = a, b
    if first.info.shape != second.info.shape:
        if resized:  # the new vocabulary's size is a setting, and the whole of what depends on it in the package
            return False
        raise ConverterError(
            "E_DIFF_SHAPE",
            "a parameter has another shape in the fine-tuned checkpoint",
            where=live,
            expected=list(first.info.shape),
            found=list(second.info.shape),
        )
    if first.info.dtype != second.info.dtype:
        return False
    step = 8 << 20
    return all(
        one.read(first.file, first.info.begin + at, min(step, first.nbytes - at))
        == two.read(second.file, second.info.begin + at, min(step, second.nbytes - at))
        for at in range(0, first.nbytes, step)
    )


def _same_shape(path: str, old: Base, new: Base) -> bool:
    """Whether the backbone has a module's parameters, in the fine-tune's shapes."""
    pairs = [(old.stored(f"{path}.{name}"), new.stored(f"{path}.{name}")) for name in ("weight", "bias")]
    return all(b is None or (a is not None and a[1].info.shape == b[1].info.shape) for a, b in pairs)


def _lossy(path: str, names: Sequence[str], old: Base, new: Base) -> bool:
    """Whether a module's weight may be said in a lossy form."""
    shape = new.arch.host(path).shape
    if "weight" not in names or shape.family not in {"linear", "conv", "embedding"} or shape.grouped:
        return False
    found = new.stored(f"{path}.weight")
    return found is not None and _same_shape(path, old, new) and _numbers(found[1].info.shape) >= _SMALL


def _numbers(shape: Sequence[int]) -> int:
    import math

    return math.prod(shape)


def _change(path: str, old: Base, new: Base) -> Tensor:
    """The difference of a module's weight, canonical, in float32."""
    before, after = old.weight(path), new.weight(path)
    assert before is not None
    assert after is not None
    return (after.double() - before.double()).float()


def _chosen(
    touched: Mapping[str, Sequence[str]], old: Base, new: Base, form: Form, bits: float | None, error: float | None
) -> dict[str, Form]:
    """For ``auto``, the form of each weight; for all others, exactness where a lossy form has no place."""
    lossy = [path for path, names in touched.items() if _lossy(path, names, old, new)]
    plain = Form(name="dense" if form.name == "dense" else "exact")
    found = {path: plain for path in touched if path not in lossy}
    if form.name != "auto":
        return found if form.name in LOSSY else {p: plain for p in touched if not _same_shape(p, old, new)}
    candidates, numbers = {}, 0
    for path in lossy:
        change = _change(path, old, new)
        stored = new.stored(f"{path}.weight")
        assert stored is not None
        numbers += change.numel()
        total = float(change.double().square().sum())
        candidates[path] = (total, options(change, stored[1].nbytes, form.max_rank))
    budget = None if bits is None else int(bits * numbers / 8)
    return found | best(candidates, budget=budget, error=error)


def _module(path: str, names: Sequence[str], old: Base, new: Base, form: Form) -> list[Entry]:
    if not _same_shape(path, old, new):
        form = replace(form, name="exact")
    if form.name == "dense":
        return [_dense(path, old, new)]
    if form.name in LOSSY:
        entry = weight_entry(form, path, lambda: _change(path, old, new))
        if entry is not None:
            return [entry, *([_bias(path, old, new)] if "bias" in names else [])]
    return [_exact(path, names, old, new)]


def _value(base: Base, path: str, name: str) -> Tensor:
    found = base.weight(path) if name == "weight" else base.value(f"{path}.{name}")
    assert found is not None
    return found.contiguous()


def _parts(path: str, new: Base) -> dict[str, tuple[int, ...]]:
    """Canonical shapes of a module's parameters."""
    shape = new.arch.host(path).shape
    assert shape.weight_shape is not None
    return {"weight": tuple(shape.weight_shape)} | ({"bias": (shape.weight_shape[0],)} if shape.bias else {})


def _exact(path: str, names: Sequence[str], old: Base, new: Base) -> Entry:
    """Whole values; where only rows of an embedding differ, these; where only a bias does and can be added, that."""
    if (rows := _few_rows(path, names, old, new)) is not None:
        return rows
    if list(names) == ["bias"] and _same_shape(path, old, new):
        entry = _bias(path, old, new)
        before, after = _value(old, path, "bias"), _value(new, path, "bias")
        if before.dtype == after.dtype and bits_equal(before.float() + entry.tensors["value"], after):
            return entry
    tensors: dict[str, Any] = {}
    for name, shape in _parts(path, new).items():
        dtype = _dtype(new, f"{path}.{name}")
        tensors[name] = pending(dtype, shape, lambda name=name: _value(new, path, name))  # type: ignore[misc]
    return Entry(path=path, kind="assign", tensors=tensors)


def _dtype(base: Base, live: str) -> Any:
    from deltahub.tensors import torch_dtype

    stored = base.stored(live)
    assert stored is not None
    return torch_dtype(stored[1].info.dtype)


def _few_rows(path: str, names: Sequence[str], old: Base, new: Base) -> Entry | None:
    """The rows of an embedding that differ, where they are less than half of it."""
    import torch

    family = new.arch.host(path).shape.family
    if (
        family != "embedding"
        or not _same_shape(path, old, new)
        or _dtype(old, f"{path}.weight") != _dtype(new, f"{path}.weight")
    ):
        return None
    before, after = old.value(f"{path}.weight"), new.value(f"{path}.weight")
    assert before is not None
    assert after is not None
    differ = (before.view(torch.uint8) != after.view(torch.uint8)).any(dim=1).nonzero().flatten()
    if not 0 < 2 * len(differ) < len(after) or len(after) >= 1 << 31:
        return None
    tensors = {"places": differ.to(torch.int32), "rows": after[differ].contiguous()}
    return Entry(path=path, kind="tokens", config={"count": len(differ)}, tensors=tensors)


def _dense(path: str, old: Base, new: Base) -> Entry:
    import torch

    def made(name: str) -> Tensor:
        return (_value(new, path, name).double() - _value(old, path, name).double()).float()

    tensors = {
        name: pending(torch.float32, shape, lambda name=name: made(name))  # type: ignore[misc]
        for name, shape in _parts(path, new).items()
    }
    return Entry(path=path, kind="diff", config={"scale": 1.0}, tensors=tensors)


def _bias(path: str, old: Base, new: Base) -> Entry:
    value = (_value(new, path, "bias").double() - _value(old, path, "bias").double()).float()
    return Entry(path=path, kind="bias", config={"scale": 1.0}, tensors={"value": value})
