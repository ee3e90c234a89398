"""``deltahub recipe …``: whole trainings that end in a package."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import Json, app, show

recipe = typer.Typer(help="Whole trainings that end in a package.", no_args_is_help=True)
app.add_typer(recipe, name="recipe")


@recipe.command()
def distil(
    model: Annotated[str, typer.Argument(help="A pipeline of diffusers: a folder, or a repository.")],
    out: Annotated[
        Path, typer.Option("--out", help="Where the package and the log go; a checkpoint there is resumed.")
    ],
    preset: Annotated[str, typer.Option(help="What takes the place of attention: a preset's name.")],
    images: Annotated[
        Path | None, typer.Option(help="A folder of images with captions; random maps by default.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 60_000,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 512,
    mode: Annotated[str, typer.Option(help="stream, or teacher: each layer by itself.")] = "stream",
    loss: Annotated[str, typer.Option(help="released, or paper.")] = "released",
    supervised: Annotated[float, typer.Option(help="Weight of the error against the noise.")] = 1.0,
    features: Annotated[float, typer.Option(help="Weight of the hidden states.")] = 0.001,
    lr: Annotated[float, typer.Option()] = 3e-4,
    warmup: Annotated[int, typer.Option()] = 500,
    pool: Annotated[
        str, typer.Option(help="avg can be exported with open sizes; adaptive is what was released.")
    ] = "avg",
    cold: Annotated[bool, typer.Option("--cold", help="Do not start from the teacher's own weights.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no, fp16 or bf16.")] = "no",
    save_every: Annotated[int, typer.Option()] = 1000,
    device: Annotated[str | None, typer.Option(help="cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: Json = False,
) -> None:
    """Distil a pipeline's self-attention into what a preset says."""
    from deltahub.recipes import Options
    from deltahub.recipes.whole import distil_pipeline

    options = Options(
        steps=steps,
        mode=mode,
        loss=loss,
        supervised=supervised,
        features=features,
        lr=lr,
        warmup=warmup,
        checkpointing=checkpointing,
        mixed_precision=mixed_precision,
        save_every=save_every,
    )

    def progress(step: int, of: int, terms: Mapping[str, float]) -> None:
        if step % max(1, of // 100) == 0:
            typer.echo(f"{step}/{of}  " + "  ".join(f"{k} {v:.4g}" for k, v in terms.items()), err=True)

    found = distil_pipeline(
        model,
        out,
        preset=preset,
        images=images,
        options=options,
        batch=batch,
        size=size,
        pool=pool,
        warm=not cold,
        device=device,
        seed=seed,
        progress=progress,
    )
    ends = {name: dict(zip(("first", "last"), found.change(name), strict=True)) for name in found.history}
    show({"package": str(found.folder / "package"), "losses": ends}, as_json, _lines)


def _lines(found: Any) -> list[str]:
    rows = [f"{name}: {ends['first']:.4g} becomes {ends['last']:.4g}" for name, ends in found["losses"].items()]
    return [*rows, f"package: {found['package']}"]
