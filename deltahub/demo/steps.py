"""How a demonstration talks: numbered steps with their time, their bytes, and the checks that they passed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

__all__ = ["CheckFailed", "Step", "Steps", "amount", "folder_bytes"]


class CheckFailed(Exception):  # noqa: N818 - it is the outcome of a demonstration, not an error of the library
    """A check did not hold; the demonstration ends there."""


def amount(size: float) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def folder_bytes(folder: Path) -> int:
    """Bytes of the regular files below a folder; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


class Step:
    """What happens in one step; printed when it is over."""

    def __init__(self) -> None:
        self.bytes: int | None = None
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        """Say a fact."""
        self.lines.append(escape(text))

    def check(self, text: str, passed: bool) -> None:  # noqa: FBT001 - reads as a sentence
        """State what must hold.

        Raises:
            CheckFailed: it does not.
        """
        self.lines.append(f"[green]✓[/green] {escape(text)}" if passed else f"[red]✗ {escape(text)}[/red]")
        if not passed:
            raise CheckFailed(text)


class Steps:
    """A numbered list of steps on a console."""

    def __init__(self, console: Console, *, first: int = 1) -> None:
        self.console = console
        self.number = first

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Time a step, and print it with its facts and checks, failed ones included."""
        step = Step()
        began = time.perf_counter()
        try:
            yield step
        finally:
            seconds = time.perf_counter() - began
            size = "" if step.bytes is None else f", {amount(step.bytes)}"
            head = f"[bold]{self.number:>2}  {escape(title)}[/bold]  [cyan]{seconds:.2f} s{size}[/cyan]"
            self.console.print(head, highlight=False, soft_wrap=True)
            for line in step.lines:
                self.console.print(Padding(line, (0, 0, 0, 4)), highlight=False)
            self.console.file.flush()  # the next lines may come from another process
            self.number += 1
