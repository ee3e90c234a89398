"""Which deltas act on a model: for everybody, and for a thread that has chosen otherwise for a while.

A server answers requests in several threads on one model, each inside a ``deltahub.using`` block of its own. What a
block chooses is its thread's alone, kept where a compiled graph can see that it changed: reading it is one look-up.
"""

from __future__ import annotations

import threading

__all__ = ["Switch"]


class _Here(threading.local):
    """This thread's own choice; ``None`` outside any block."""

    key: str | None = None


class Switch:
    """Which deltas act, shared by all sites of a model: one string to compare, one number per delta.

    Attributes:
        key: names of the active deltas, joined by a line feed, in order, for threads without a block of their own.
            While one thread alone has a block open, they follow it: the workers that it starts (autograd's, which
            compute checkpointed layers again; data parallel replicas) see what it sees. Else it is ``base``.
        base: what acts outside every block.
        here: ``here.key`` is this thread's own choice, ``None`` for none.
        strength: user's scale of each delta; 1 where absent.
    """

    __slots__ = ("_blocks", "_lock", "base", "here", "key", "strength")

    def __init__(self) -> None:
        self.key = self.base = ""
        self.here = _Here()
        self.strength: dict[str, float] = {}
        self._blocks: dict[int, list[str]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.base, self.strength))

    def __deepcopy__(self, memo: dict[int, object]) -> Switch:
        return _rebuild(self.base, dict(self.strength))

    @property
    def chosen(self) -> str:
        """What acts in this thread now."""
        own = self.here.key
        return self.key if own is None else own

    def choose(self, key: str) -> None:
        """Let other deltas act: until the end of this thread's innermost block, for everybody outside any."""
        with self._lock:
            mine = self._blocks.get(threading.get_ident())
            if mine:
                mine[-1] = self.here.key = key
            else:
                self.base = key
            self._settle()

    def enter(self, key: str) -> None:
        """Open a block of this thread."""
        with self._lock:
            self._blocks.setdefault(threading.get_ident(), []).append(key)
            self.here.key = key
            self._settle()

    def leave(self) -> None:
        """Close this thread's innermost block."""
        with self._lock:
            mine = self._blocks[threading.get_ident()]
            mine.pop()
            self.here.key = mine[-1] if mine else None
            if not mine:
                del self._blocks[threading.get_ident()]
            self._settle()

    def _settle(self) -> None:
        alone = len(self._blocks) == 1
        self.key = next(iter(self._blocks.values()))[-1] if alone else self.base


def _rebuild(base: str, strength: dict[str, float]) -> Switch:
    made = Switch()
    made.key = made.base = base
    made.strength = strength
    return made
