"""Out of packages and into them: merged checkpoints, diffs, foreign formats, packing."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import Json, app, as_bytes, show

Backbone = Annotated[str | None, typer.Option(help="A folder, or a repository: org/name, org/name@revision.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The new folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it is there.")]


@app.command()
def merge(
    packages: Annotated[list[str], typer.Argument(help="Folders or repositories; they act in this order.")],
    out: Out,
    backbone: Backbone = None,
    weight: Annotated[
        list[float] | None, typer.Option(help="A factor for each package; one for all by default.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="sum, task_arithmetic, linear, ties, dare_linear, dare_ties or slerp.")
    ] = "sum",
    density: Annotated[float | None, typer.Option(help="Share of each delta that ties and dare keep.")] = None,
    scale: Annotated[float, typer.Option(help="Multiplies the combined delta.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    bake: Annotated[bool, typer.Option("--bake", help="Keep what cannot be merged beside the weights.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as the backbone by default.")] = None,
    max_shard_bytes: Annotated[int | None, typer.Option(help="Size of a file at most; as the backbone's.")] = None,
    verify: Annotated[str, typer.Option(help="structure, touched or full.")] = "touched",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with deltas in its weights, without ever holding the model."""
    from deltahub.converters import merge as run

    factors = weight or [1.0]
    found = run(
        packages,
        out,
        backbone=backbone,
        weights=factors[0] if len(factors) == 1 else factors,
        method=method,
        density=density,
        scale=scale,
        seed=seed,
        bake=bake,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        verify=verify,
        overwrite=overwrite,
    )

    def lines(result: Any) -> Iterable[str]:
        yield f"{result.folder}: {as_bytes(result.written)} in {result.seconds:.1f} s"
        yield f"{len(result.changed)} tensor(s) changed, {len(result.added)} added, {as_bytes(result.copied)} copied"
        if result.live:
            yield f"{len(result.live)} part(s) stay live, in a package beside the weights"
        yield str(result.identity)
        if result.probe is not None:
            yield f"the probe's numbers come out: within {max(result.probe.values()):.3g}"

    show(found, as_json, lines)


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The backbone: a folder or a repository.")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned checkpoint.")],
    out: Out,
    form: Annotated[str, typer.Option(help="exact, dense, lowrank, sparse, dare, sign, int8 or auto.")] = "exact",
    rank: Annotated[int | None, typer.Option(help="Of a low-rank diff.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of the difference that a low-rank diff keeps.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of elements that a sparse diff keeps.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    bits: Annotated[float | None, typer.Option(help="For auto: bits for each number, on average.")] = None,
    error: Annotated[float | None, typer.Option(help="For auto: greatest relative error of a weight.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write the difference between two checkpoints as a package."""
    from deltahub.converters import diff as run

    found = run(
        base,
        tuned,
        out,
        form=form,
        rank=rank,
        energy=energy,
        density=density,
        seed=seed,
        bits=bits,
        error=error,
        overwrite=overwrite,
    )

    def lines(result: dict[str, Any]) -> Iterable[str]:
        yield f"{result['folder']}: {len(result['parameters'])} parameter(s) differ, {result['untouched']} do not"
        yield f"{result['bits']:.2f} bits for each number of these"
        for one in result["parameters"]:
            if one.form != "exact":
                shape = f"{one.form}, rank {one.rank}" if one.rank else one.form
                yield (
                    f"{one.name}: {shape}, {one.bits:.2f} bits, relative error {one.relative:.2g}, "
                    f"largest {one.largest:.2g}"
                )

    document = {
        "folder": str(out), "parameters": found.parameters, "untouched": found.untouched, "bits": found.bits,
    }  # fmt: skip
    show(document, as_json, lines)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A foreign checkpoint; with --to, a package.")],
    out: Out,
    to: Annotated[str | None, typer.Option(help="The format to write; a package by default.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The format to read; found out by default.")] = None,
    backbone: Backbone = None,
    alpha: Annotated[float | None, typer.Option(help="Of a LoRA file that has none.")] = None,
    place: Annotated[
        list[int] | None, typer.Option(help="The token whose row an embedding takes; once for each of its vectors.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="With --to peft: vllm, lorax, tgi or trtllm.")] = None,
    approximate: Annotated[int | None, typer.Option(min=1, help="Rank to cut to what has no low rank.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickles, without running code.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Bring a checkpoint of another library into a package, or a package into another library's format."""
    from deltahub.converters import export_, import_

    options: dict[str, Any] = {} if backbone is None else {"backbone": backbone}
    if to is not None:
        export_(source, out, to=to, target=target, approximate=approximate, **options)
    else:
        given = {"alpha": alpha, "places": place or None, "allow_pickle": allow_pickle, "overwrite": overwrite}
        import_(source, out, from_=from_, **given, **options)
    show({"path": str(out)}, as_json, lambda result: [result["path"]])


@app.command()
def combine(
    packages: Annotated[list[str], typer.Argument(help="Folders or repositories of packages for one backbone.")],
    out: Out,
    weight: Annotated[
        list[float] | None, typer.Option(help="A factor for each package; one for all by default.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Recompress low-rank updates to this rank.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or keep this share of each update's energy.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Keep targets that fit this glob, or a module.")] = None,
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW: parts of targets, with --backbone.")] = None,
    backbone: Backbone = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Add, subtract, scale, recompress, cast, split or rename packages, without their backbone."""
    from deltahub.converters import combine as run

    pairs = [one.partition("=")[::2] for one in rename or ()]
    if any(not old for old, _ in pairs):
        raise typer.BadParameter("write OLD=NEW", param_hint="--rename")
    factors = weight or [1.0]
    found = run(
        packages,
        out,
        weights=factors[0] if len(factors) == 1 else factors,
        rank=rank,
        energy=energy,
        dtype=dtype,
        only=only or (),
        rename=dict(pairs) or None,
        backbone=backbone,
        overwrite=overwrite,
    )
    shown = {"path": str(out), "bytes": found.size, "modules": [module.name for module in found.manifest.modules]}
    show(shown, as_json, lambda result: [f"{result['path']}: {as_bytes(result['bytes'])}"])


@app.command()
def pack(
    package: Annotated[str, typer.Argument(help="A folder or a repository.")],
    out: Out,
    backbone: Annotated[str, typer.Option(help="What it was made for: a folder or a repository.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Code a package's tensors against its backbone, without loss."""
    from deltahub.converters import pack as run

    found = run(package, out, backbone=backbone, overwrite=overwrite)

    def lines(result: Any) -> Iterable[str]:
        yield f"{result.folder}: {as_bytes(result.before)} became {as_bytes(result.after)}"
        if result.coded:
            yield f"{result.bits:.2f} bits for each of {result.coded} weights"

    show(found, as_json, lines)


@app.command()
def unpack(
    packed: Annotated[Path, typer.Argument(help="A packed package.")],
    out: Out,
    backbone: Annotated[str, typer.Option(help="What it was made for: a folder or a repository.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Restore a packed package, byte for byte."""
    from deltahub.converters import unpack as run

    run(packed, out, backbone=backbone, overwrite=overwrite)
    show({"path": str(out)}, as_json, lambda result: [result["path"]])
