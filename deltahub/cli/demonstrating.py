"""``deltahub --version`` and ``deltahub demo``."""

from __future__ import annotations

__all__: list[str] = []

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from deltahub import __version__
from deltahub.cli.base import Json, app, show


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training text.")] = 3,
    as_json: Json = False,
) -> None:
    """Play a delta's whole life on a real model.

    Offline: train, publish, load, merge, refuse.
    """
    from deltahub.demo import run

    if not as_json:
        raise typer.Exit(run(epochs=epochs))
    from rich.console import Console

    began = time.perf_counter()
    with _told_elsewhere():
        code = run(epochs=epochs, console=Console(stderr=True))
    show({"passed": code == 0, "seconds": round(time.perf_counter() - began, 1)}, as_json, lambda _: ())
    raise typer.Exit(code)


@contextmanager
def _told_elsewhere() -> Iterator[None]:
    """What this process and those that it starts write to standard output goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
