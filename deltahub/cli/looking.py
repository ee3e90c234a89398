"""Looking at things: a package, a backbone, a backbone's identity."""

from __future__ import annotations

__all__: list[str] = []

import sys
from pathlib import Path
from typing import Annotated

import typer

from deltahub.cli.base import (
    Cache,
    Endpoint,
    Json,
    LockFile,
    Offline,
    PolicyFile,
    RequireSignature,
    Revision,
    SignedBy,
    Token,
    app,
    as_table,
    as_text,
    demands,
    show,
)


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(help="A package or a backbone: a folder, or a repository, user/name or user/name@revision.")
    ],
    backbone: Annotated[
        str | None, typer.Option(help="Show a package inside this backbone: a folder or a repository.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Show a package inside the backbone that it names.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the tree as a picture, too.", metavar="FILE")] = None,
    png: Annotated[Path | None, typer.Option(help="The same picture as pixels.", metavar="FILE")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the explorer's page, too.", metavar="FILE")] = None,
    revision: Revision = None,
    endpoint: Endpoint = None,
    token: Token = None,
    cache_dir: Cache = None,
    offline: Offline = False,
    lock: LockFile = None,
    policy: PolicyFile = None,
    signed_by: SignedBy = None,
    require_signature: RequireSignature = False,
    as_json: Json = False,
) -> None:
    """Show what a package or a backbone is made of.

    A tree with equal parts folded: modules, parameters, dtypes, and where each delta sits and what it does there.
    No weights are fetched: a backbone's architecture is built without values.
    """
    from deltahub.inspecting import inspect as run
    from deltahub.inspecting import to_png, to_svg, to_text

    found = run(
        source,
        backbone=backbone if backbone is not None else whole,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
        **demands(lock=lock, policy=policy, signed_by=signed_by, require_signature=require_signature),
    )
    if svg is not None:
        svg.write_text(to_svg(found), encoding="utf-8")
    if png is not None:
        png.write_bytes(to_png(found))
    if html is not None:
        from deltahub.explorer import page

        html.write_text(page(found), encoding="utf-8")
    if as_json:
        typer.echo(as_text(found))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        typer.echo(to_text(found))


@app.command()
def explore(
    source: Annotated[str, typer.Argument(help="A package or a backbone, as for `inspect`.")],
    backbone: Annotated[
        str | None, typer.Option(help="Show a package inside this backbone: a folder or a repository.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Show a package inside the backbone that it names.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to serve it; any that is free by default.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
    revision: Revision = None,
    endpoint: Endpoint = None,
    token: Token = None,
    cache_dir: Cache = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Look around in a browser, and plan a delta.

    Pick modules and a kind; see what it costs, the targets in manifest form, and the line of Python to paste. The
    page is served on this machine alone, to who has the token in its address, until Ctrl-C.
    """
    import time
    import webbrowser

    from deltahub.explorer import page, served
    from deltahub.inspecting import inspect as run

    found = run(
        source,
        backbone=backbone if backbone is not None else whole,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
    )
    with served(page(found), port=port) as address:
        show({"address": address}, as_json, lambda result: [str(result["address"]), "Ctrl-C ends it"])
        if browser and sys.stdout.isatty():
            webbrowser.open(address)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return


@app.command()
def fingerprint(
    source: Annotated[Path, typer.Argument(help="A folder with a checkpoint, or a safetensors file.")],
    exclude: Annotated[list[str] | None, typer.Option(help="A tensor to leave out; may be repeated.")] = None,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights too.")] = False,
    as_json: Json = False,
) -> None:
    """Compute the identity of a backbone."""
    from deltahub.identity import fingerprint as run

    found = run(source, excluded=exclude or (), allow_pickle=allow_pickle)
    names = ("exact", "bf16", "structure", "tensors")
    show(found, as_json, lambda f: as_table((name, getattr(f, name)) for name in names))
