"""``deltahub --version`` and ``deltahub demo``."""

from __future__ import annotations

__all__: list[str] = []

from typing import Annotated

import typer

from deltahub import __version__
from deltahub.cli.base import app


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
) -> None:
    """Play a delta's whole life on a real model.

    Offline: train, publish, load, merge, refuse.
    """
    from deltahub.demo import run

    raise typer.Exit(run(epochs=epochs))
