"""What replaced modules see and give, in the teacher and in the student; and the losses between the two."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltahub.delta import Delta

__all__ = ["Seen", "distance", "first", "min_snr", "watch"]


@dataclass(kw_only=True)
class Seen:
    """One forward pass at the places that are compared.

    Attributes:
        calls: arguments and keyword arguments of each replaced module, by its path.
        outputs: what each place gave, by the path of the replaced module that it belongs to.
    """

    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def first(out: Any) -> Tensor:
    """The tensor that is meant: a model's or module's first output."""
    if isinstance(out, Tensor):
        return out
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out[next(iter(out))]
    return found


@contextlib.contextmanager
def watch(model: nn.Module, delta: Delta, *, around: bool) -> Iterator[Seen]:
    """Record the next forward pass.

    Args:
        model: the model that the delta is attached to.
        delta: whose hosts are watched.
        around: record the hidden states behind the enclosing block, residual included, instead of a module's own
            output.
    """
    seen = Seen()
    handles = []

    def before(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.calls.setdefault(path, (args, dict(kwargs)))

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            seen.outputs.setdefault(path, first(out))  # recomputation under checkpointing comes again

        return hook

    for site in delta.sites:
        host = model.get_submodule(site.path)
        place = model.get_submodule(site.path.rpartition(".")[0]) if around else host
        handles.append(host.register_forward_pre_hook(before(site.path), with_kwargs=True))
        handles.append(place.register_forward_hook(after(site.path)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Sum over places of the mean squared difference, in single precision."""
    terms = [F.mse_loss(student[path].float(), teacher[path].detach().float()) for path in teacher]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """The paper's weight of a sample: ``min(gamma * snr, 1)``, its ratio of signal to noise being ``snr``."""
    return (gamma * snr).clamp(max=1.0)
