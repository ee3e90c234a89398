"""From what goes into one module to what comes out of another: a span as a host.

What goes in is held from the time when the one module is called to the time when the other has run, by thread, so that
threads, recomputation under gradient checkpointing, copies, ``torch.compile`` and ``torch.export`` need no care.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import nn

from deltahub.errors import HostError
from deltahub.hosts import BLOCK, view_of
from deltahub.kinds.host_shape import HostShape

__all__ = ["Held", "Span", "check_ports", "shape_of"]


class Held(threading.local):
    """A value that each thread has its own of. Pickles and copies as an empty one."""

    x: Any = None

    def __reduce__(self) -> tuple[object, ...]:
        return (Held, ())


class Span:
    """An input on its way from one module to another. Pickles and copies as its two ends.

    Args:
        delta: name of the delta.
        source: path of the module whose input it is.
        target: path of the module whose output is changed.
    """

    __slots__ = ("_held", "delta", "source", "target")

    def __init__(self, *, delta: str, source: str, target: str) -> None:
        self._held = Held()
        self.delta = delta
        self.source = source
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (_span, (self.delta, self.source, self.target))

    def put(self, x: Any) -> None:
        """The source was called with this."""
        self._held.x = x

    def take(self) -> Any:
        """What the source was called with; it is held no longer.

        Raises:
            HostError: ``E_HOST_SPAN`` where the source has not run since.
        """
        x = self._held.x
        self._held.x = None
        if x is None:
            raise HostError(
                "E_HOST_SPAN",
                "this module ran, and the one whose input the delta reads has not run before it",
                where=self.target,
                expected=f"{self.source} first",
                hint="call the model that the delta was attached to",
            )
        return x


def _span(delta: str, source: str, target: str) -> Span:
    return Span(delta=delta, source=source, target=target)


def _width(module: nn.Module, path: str, *, of_input: bool) -> int | None:
    slot: Any = module.__dict__.get("_deltahub")
    base = type(module) if slot is None else slot.base
    view = view_of(module, base)
    shape = view.shape(module, base)
    if shape.channels_first or (of_input and shape.family == "embedding"):
        raise HostError(
            "E_HOST_SPAN",
            "a span goes between modules whose channels lie along the last axis",
            where=f"{path} ({base.__name__})",
            found=f"a {view.name.lower()}",
        )
    return shape.d_in if of_input and view is not BLOCK and shape.family != "norm" else shape.d_out


def shape_of(source: nn.Module, target: nn.Module, paths: tuple[str, str]) -> HostShape:
    """A span as a host: a block from the width of the one's input to that of the other's output.

    Args:
        source: the module whose input is read.
        target: the module whose output is changed.
        paths: theirs.

    Raises:
        HostError: ``E_HOST_SPAN`` for a module whose channels are not along the last axis.
    """
    d_in = _width(source, paths[0], of_input=True)
    return HostShape(family="block", d_in=d_in, d_out=_width(target, paths[1], of_input=False))


def check_ports(kind: str, ports: Mapping[str, object], path: str) -> None:
    """Refuse a kind that does more to a span than change what comes out of it.

    Raises:
        HostError: ``E_HOST_SPAN``.
    """
    if set(ports) != {"output"}:
        raise HostError(
            "E_HOST_SPAN",
            f"kind {kind!r} cannot act from one module to another: it has equations for more than the output",
            where=path,
            found=", ".join(sorted(ports)),
        )
