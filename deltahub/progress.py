"""How far things are: rooms that take long say so here, and whoever wants to know listens.

Nothing is printed and nothing is counted unless somebody listens; the command line does, on a terminal.
"""

from __future__ import annotations

__all__ = ["Listener", "heard", "listening", "step"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Listener(Protocol):
    """Somebody who wants to know. Its methods are called from any thread."""

    def begin(self, label: str, total: int | None) -> int:
        """A step of so many bytes begins; the number names it."""

    def advance(self, step: int, amount: int) -> None:
        """So many bytes more are done."""

    def end(self, step: int) -> None:
        """The step is over, whatever became of it."""


# Of the whole process, not of a context: the work is done by threads, which inherit none.
_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell this listener of every step inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def heard() -> bool:
    """Whether anybody listens."""
    return bool(_listeners)


@contextmanager
def step(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A step of the work; what it gives is called with the number of bytes that were done.

    Args:
        label: what is done, as people read it.
        total: how many bytes there are; ``None`` where that is not known.
    """
    told = [(listener, listener.begin(label, total)) for listener in tuple(_listeners)]

    def advance(amount: int) -> None:
        for listener, name in told:
            listener.advance(name, amount)

    try:
        yield advance
    finally:
        for listener, name in told:
            listener.end(name)
