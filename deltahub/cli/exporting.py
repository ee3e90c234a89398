"""Graphs for other runtimes: written, proved, and run."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import Endpoint, Json, Offline, Package, Revision, Token, app, show
from deltahub.cli.converting import Backbone, Out, Overwrite

_exports = typer.Typer(help="Write a delta with its backbone for another runtime.", no_args_is_help=True)
_runs = typer.Typer(help="Run what was exported.", no_args_is_help=True)
app.add_typer(_exports, name="export")
app.add_typer(_runs, name="run")


@_exports.command("onnx")
def export_onnx(
    package: Package,
    out: Out,
    form: Annotated[str, typer.Option(help="merged, live or swappable.")] = "merged",
    task: Annotated[str | None, typer.Option(help="What the graph is for; as the model's class says.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float16.")] = None,
    opset: Annotated[int | None, typer.Option(min=18, help="Version of ONNX's operators.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Greatest difference from PyTorch.")] = None,
    backbone: Backbone = None,
    verify: Annotated[str, typer.Option(help="How the backbone is checked: structure, touched or full.")] = "touched",
    overwrite: Overwrite = False,
    revision: Revision = None,
    endpoint: Endpoint = None,
    token: Token = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Export to ONNX, run it in ONNX Runtime, and compare with PyTorch; beyond tolerance nothing is written."""
    from deltahub.converters.onnx import export_onnx as run

    options: dict[str, Any] = {
        "backbone": backbone, "revision": revision, "endpoint": endpoint, "token": token, "local_files_only": offline,
        "verify": verify,
    }  # fmt: skip
    found = run(
        package, out, form=form, task=task, dtype=dtype, opset=opset, tolerance=tolerance, overwrite=overwrite,
        **options,
    )  # fmt: skip

    def lines(result: Any) -> Iterable[str]:
        yield from str(result).splitlines()
        for one in result.parity:
            yield f"  {one.graph}  {one.output}  {one.case}  {one.difference:.2g} of at most {one.allowed:.2g}"

    show(found, as_json, lines)


Approximate = Annotated[
    int | None, typer.Option(min=1, help="Rank to cut to what has no low rank; what is lost is said.")
]


@_exports.command("peft")
def export_peft(
    package: Package,
    out: Out,
    target: Annotated[str | None, typer.Option(help="Who shall take it: vllm, lorax, tgi or trtllm.")] = None,
    approximate: Approximate = None,
    backbone: Backbone = None,
    as_json: Json = False,
) -> None:
    """Write an adapter of PEFT, within the limits of the server that shall take it."""
    _foreign(package, out, as_json, to="peft", target=target, approximate=approximate, backbone=backbone)


@_exports.command("mlx")
def export_mlx(
    package: Package, out: Out, approximate: Approximate = None, backbone: Backbone = None, as_json: Json = False
) -> None:
    """Write an adapter of MLX-LM."""
    _foreign(package, out, as_json, to="mlx", approximate=approximate, backbone=backbone)


@_exports.command("gguf")
def export_gguf(
    package: Package,
    out: Out,
    backbone: Annotated[str, typer.Option(help="A folder, or a repository: it tells names and heads.")],
    dtype: Annotated[str | None, typer.Option(help="float32 or float16.")] = None,
    approximate: Approximate = None,
    as_json: Json = False,
) -> None:
    """Write a LoRA that llama.cpp loads; --out is a file."""
    _foreign(package, out, as_json, to="gguf", dtype=dtype, approximate=approximate, backbone=backbone)


def _foreign(package: str, out: Path, as_json: bool, **options: Any) -> None:
    from deltahub.converters import export_

    show({"path": str(export_(package, out, **options))}, as_json, lambda result: [result["path"]])


@_runs.command("onnx")
def run_onnx(
    folder: Annotated[Path, typer.Argument(help="What `deltahub export onnx` wrote.")],
    inputs: Annotated[Path | None, typer.Option(help="A safetensors file with the inputs.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the outputs are written.")] = None,
    ids: Annotated[str | None, typer.Option(help="Token ids of one row, such as 101,7592,102.")] = None,
    generate: Annotated[int, typer.Option(min=0, help="Generate so many tokens.")] = 0,
    delta: Annotated[list[str] | None, typer.Option(help="A delta of a swappable export; may be repeated.")] = None,
    provider: Annotated[str, typer.Option(help="auto, cuda, tensorrt, directml, coreml or cpu.")] = "auto",
    as_json: Json = False,
) -> None:
    """Check an export, and run it on a provider that works; without inputs, say what it takes."""
    from deltahub.converters.onnx.running import run_folder

    found = run_folder(
        folder, inputs=inputs, out=out, ids=ids, generate=generate, deltas=delta or (), provider=provider
    )

    def lines(result: Any) -> Iterable[str]:
        yield result["provider"]
        for name, said in result["result"].items():
            yield f"{name}  {said}"

    show(found, as_json, lines)
