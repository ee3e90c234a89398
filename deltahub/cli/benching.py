"""``deltahub bench``: measure on a backbone of one's own."""

from __future__ import annotations

__all__: list[str] = []

from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import Json, app, show


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A backbone: a folder, a repository, or shape:12 for a synthetic one.")],
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Modules, as attach takes them; several times for several.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    pairs: Annotated[int, typer.Option(min=1, help="Processes of each library that count.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Calls that count in each process.")] = 5,
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths of forward passes; 0 for none.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder for bench.md and bench.json.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a LoRA's life on a backbone, beside peft if it is installed, in processes that take turns."""
    from deltahub.benching import bench as measure
    from deltahub.benching.report import markdown

    lengths = [1, 128] if tokens is None else [count for count in tokens if count]
    report = measure(model, targets, rank=rank, pairs=pairs, repeats=repeats, tokens=lengths)
    if out is not None:
        report.write_to(out)

    def lines(found: Any) -> list[str]:
        return markdown(found).splitlines()

    show(report.data(), as_json, lines)
