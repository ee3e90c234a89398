"""What a diff loses: the package is applied to the backbone, parameter by parameter, and held against the fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltahub.converters.base import Base
from deltahub.converters.combining import Method
from deltahub.converters.jobs import Job, gather
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.package import Package

__all__ = ["Loss", "bits_equal", "losses"]

_FORMS = {
    "assign": "exact",
    "tokens": "exact",
    "diff": "dense",
    "lora": "lowrank",
    "sparse": "sparse",
    "diff-sign": "sign",
    "diff-int8": "int8",
}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What became of one parameter.

    Attributes:
        name: its live name.
        form: ``exact``, ``dense``, ``lowrank``, ``sparse``, ``sign`` or ``int8``.
        rank: of a low-rank form, else 0.
        numbers: how many it has.
        bits: for each of them in the package.
        relative: Frobenius norm of the error over that of the difference; 0 if it is exact.
        largest: the greatest absolute error.
    """

    name: str
    form: str
    rank: int
    numbers: int
    bits: float
    relative: float
    largest: float


def losses(package: Package, old: Base, new: Base, touched: Mapping[str, Sequence[str]], *, exact: bool) -> list[Loss]:
    """The loss of each parameter that differs.

    Raises:
        ConverterError: ``E_DIFF_VERIFY`` where something that has to be exact is not.
    """
    jobs, _ = gather([package], Method.make("sum", [1.0]), new.arch)
    found = []
    for path, names in touched.items():
        made = _applied(jobs[path], old, new)
        for name in names:
            after = new.weight(path) if name == "weight" else new.value(f"{path}.bias")
            before = old.weight(path) if name == "weight" else old.value(f"{path}.bias")
            assert after is not None
            loss = _loss(package, jobs[path], name, made[name], before, after)
            if exact and (loss.largest != 0 or not bits_equal(made[name], after)):
                raise ConverterError(
                    "E_DIFF_VERIFY", "what was written does not give back the fine-tune", where=loss.name
                )
            found.append(loss)
    return found


def _applied(job: Job, old: Base, new: Base) -> dict[str, Tensor]:
    """A module's new weight and bias, in float32 at least, before they are rounded to what the fine-tune has."""
    import torch

    from deltahub.merging import Merging, stored_transposed

    path, shape = job.host.path, job.host.shape.weight_shape
    assert shape is not None
    merging = Merging(job.changes, shape, transposed=stored_transposed(job.host.view.canonical))
    weight, bias = old.weight(path), old.value(f"{path}.bias") if job.host.shape.bias else None
    if weight is None or tuple(weight.shape) != tuple(shape):
        weight = torch.zeros(shape)  # set as a whole
        bias = torch.zeros(shape[0]) if job.host.shape.bias else None
    wide = torch.promote_types(weight.dtype, torch.float32)
    made, own = merging.whole(weight.to(wide), None if bias is None else bias.to(wide))
    return {"weight": made} | ({} if own is None else {"bias": own})


def bits_equal(made: Tensor, after: Tensor) -> bool:
    """Whether values become the very bits of others once they are rounded to their dtype."""
    import torch

    rounded = made.to(after.dtype).contiguous()
    return torch.equal(rounded.view(torch.uint8), after.contiguous().view(torch.uint8))


def _loss(package: Package, job: Job, name: str, made: Tensor, before: Tensor | None, after: Tensor) -> Loss:
    fits = before is not None and before.shape == after.shape
    start = before.double() if fits and before is not None else 0.0 * after.double()
    error = made.double() - after.double()
    change = (after.double() - start).norm()
    form, rank, size = "exact", 0, 0
    for module in package.manifest.modules:
        tensors = package.tensors(module.name).get(job.host.path, {})
        of_bias = {"bias", "value"}  # of `assign`, `diff` and `bias`
        own = [value for key, value in tensors.items() if (key in of_bias) == (name == "bias")]
        size += sum(value.nbytes for value in own)
        if own and name == "weight":
            form, rank = _FORMS[module.kind], int(module.config.get("rank", 0))
        elif own:
            form = "dense" if module.kind == "diff" or float(error.abs().max()) else "exact"
    return Loss(
        name=f"{job.host.path}.{name}",
        form=form,
        rank=rank,
        numbers=after.numel(),
        bits=8 * size / max(1, after.numel()),
        relative=float(error.norm() / change) if float(change) else 0.0,
        largest=float(error.abs().max()) if error.numel() else 0.0,
    )
