"""Looking at things: the kinds, a package, a backbone's identity."""

from __future__ import annotations

__all__: list[str] = []

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import (
    Cache,
    Endpoint,
    Json,
    Offline,
    Package,
    Revision,
    Token,
    app,
    as_bytes,
    as_plain,
    as_table,
    show,
)


@app.command()
def kinds(
    name: Annotated[str | None, typer.Argument(help="One kind; all of them by default.")] = None, as_json: Json = False
) -> None:
    """List the kinds of delta, or show the document of one."""
    from deltahub import kinds as room

    if name is not None:
        show(room.get(name).document.source, as_json, _document)
        return
    documents = [room.get(known).document for known in room.names()]
    rows = [
        {"kind": d.name, "version": d.version, "hosts": sorted(d.hosts), "title": d.title, "reference": d.reference}
        for d in documents
    ]
    show(rows, as_json, lambda r: as_table((d["kind"], ", ".join(d["hosts"]), d["title"]) for d in r))


def _document(source: Mapping[str, Any]) -> Iterable[str]:
    """Outline a kind's document: one line per value, with dots for nesting."""
    for key, value in source.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{line}" for line in _document(value))
        else:
            yield f"{key} = {json.dumps(as_plain(value), ensure_ascii=False)}"


@app.command()
def inspect(
    source: Package,
    revision: Revision = None,
    endpoint: Endpoint = None,
    token: Token = None,
    cache_dir: Cache = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what a package holds, without its backbone."""
    from deltahub.inspecting import inspect as run

    found = run(
        source,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
    )
    show(found, as_json, _inspection)


def _inspection(found: Any) -> Iterable[str]:
    origin = found.backbone.get("source") or {}
    at = f"@{origin['commit'][:12]}" if origin.get("commit") else ""
    yield f"package     {found.source}" + (f"@{found.commit[:12]}" if found.commit else "")
    yield f"format      {found.spec_version}" + (f", requires {', '.join(found.requires)}" if found.requires else "")
    yield f"backbone    {origin.get('hub', '(not said where)')}{at} {origin.get('class', '')}".rstrip()
    yield f"parameters  {found.parameters:,} in {len(found.files)} file(s), {as_bytes(sum(found.files.values()))}"
    if found.kinds:
        yield f"own kinds   {', '.join(found.kinds)} (data in the package; no code)"
    for setting in found.settings:
        yield f"setting     {setting['on']}.{setting['path']}: {setting['was']!r} becomes {setting['value']!r}"
    yield f"probe       {'yes' if found.probe else 'no'}"
    yield ""
    head = ("module", "kind", "sites", "parameters", "targets")
    rows = [(m.name, f"{m.kind}@{m.version}", m.sites, f"{m.parameters:,}", " ".join(m.targets)) for m in found.modules]
    yield from as_table([head, *rows])


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
