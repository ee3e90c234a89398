"""The command line: thin, every verb calls a public function and prints what it returns.

``--json`` prints one JSON document to standard output. An error of DeltaHub goes to standard error, without
a traceback, and the exit code is 1; a command line that makes no sense is 2.
"""

from __future__ import annotations

__all__ = ["app", "main"]

import dataclasses
import enum
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deltahub import __version__
from deltahub.errors import DeltaHubError, printable


class _Group(TyperGroup):
    """Prints DeltaHub's own errors instead of their tracebacks."""

    def invoke(self, ctx: Any) -> Any:  # the context's class depends on typer's version
        try:
            return super().invoke(ctx)
        except DeltaHubError as error:
            if ctx.find_root().meta.get("json"):
                names = ("code", "what", "where", "expected", "found", "hint", "also")
                typer.echo(_json({"error": {name: getattr(error, name) for name in names}}))
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    help="Deltas over frozen backbones: publish, fetch, verify, load.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _remember(ctx: typer.Context, value: bool) -> bool:
    ctx.find_root().meta["json"] = value
    return value


Json = Annotated[bool, typer.Option("--json", callback=_remember, is_eager=True, help="Print one JSON document.")]
Package = Annotated[str, typer.Argument(help="A folder, or a repository: user/name, user/name@revision.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")]
Endpoint = Annotated[str | None, typer.Option(help="Address of another Hub.", envvar="DELTAHUB_ENDPOINT")]
Token = Annotated[str | None, typer.Option(help="Token for the Hub; the one you logged in with by default.")]
Cache = Annotated[Path | None, typer.Option("--cache-dir", help="Where downloads are kept.")]
Offline = Annotated[bool, typer.Option("--offline", help="Ask no Hub; take what is in the cache.")]


def _plain(value: Any) -> Any:
    """Turn results into what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def _show(result: Any, as_json: bool, lines: Callable[[Any], Iterable[str]]) -> None:
    """Print a result: as JSON, or as the lines that a reader wants."""
    if as_json:
        typer.echo(_json(result))
        return
    for line in lines(result):
        typer.echo(printable(line))


def _table(rows: Iterable[Iterable[object]]) -> list[str]:
    """Columns as wide as their widest cell; the last is as long as it is."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def _bytes(size: int) -> str:
    return f"{size} B" if size < 1000 else f"{size / 1000:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


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
def kinds(
    name: Annotated[str | None, typer.Argument(help="One kind; all of them by default.")] = None, as_json: Json = False
) -> None:
    """List the kinds of delta, or show the document of one."""
    from deltahub import kinds as room

    if name is not None:
        _show(room.get(name).document.source, as_json, _document)
        return
    documents = [room.get(known).document for known in room.names()]
    rows = [
        {"kind": d.name, "version": d.version, "hosts": sorted(d.hosts), "title": d.title, "reference": d.reference}
        for d in documents
    ]
    _show(rows, as_json, lambda r: _table((d["kind"], ", ".join(d["hosts"]), d["title"]) for d in r))


def _document(source: Mapping[str, Any]) -> Iterable[str]:
    """Outline a kind's document: one line per value, with dots for nesting."""
    for key, value in source.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{line}" for line in _document(value))
        else:
            yield f"{key} = {json.dumps(_plain(value), ensure_ascii=False)}"


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
    _show(found, as_json, _inspection)


def _inspection(found: Any) -> Iterable[str]:
    origin = found.backbone.get("source") or {}
    at = f"@{origin['commit'][:12]}" if origin.get("commit") else ""
    yield f"package     {found.source}" + (f"@{found.commit[:12]}" if found.commit else "")
    yield f"format      {found.spec_version}" + (f", requires {', '.join(found.requires)}" if found.requires else "")
    yield f"backbone    {origin.get('hub', '(not said where)')}{at} {origin.get('class', '')}".rstrip()
    yield f"parameters  {found.parameters:,} in {len(found.files)} file(s), {_bytes(sum(found.files.values()))}"
    if found.kinds:
        yield f"own kinds   {', '.join(found.kinds)} (data in the package; no code)"
    for setting in found.settings:
        yield f"setting     {setting['on']}.{setting['path']}: {setting['was']!r} becomes {setting['value']!r}"
    yield f"probe       {'yes' if found.probe else 'no'}"
    yield ""
    head = ("module", "kind", "sites", "parameters", "targets")
    rows = [(m.name, f"{m.kind}@{m.version}", m.sites, f"{m.parameters:,}", " ".join(m.targets)) for m in found.modules]
    yield from _table([head, *rows])


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
    _show(found, as_json, lambda f: _table((name, getattr(f, name)) for name in names))


@app.command()
def pull(
    source: Package,
    revision: Revision = None,
    endpoint: Endpoint = None,
    token: Token = None,
    cache_dir: Cache = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Fetch a package and check every byte of it."""
    from deltahub.hub import pull as run

    found = run(
        source,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
    )
    result = {
        "path": found.path,
        "repo_id": found.repo_id,
        "commit": found.commit,
        "sha256": found.sha256,
        "files": {entry.path: entry.size for entry in found.manifest.files},
    }
    _show(result, as_json, lambda r: _table((key, r[key]) for key in ("path", "commit", "sha256") if r[key]))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="The folder that holds delta.json.")],
    repo_id: Annotated[str, typer.Argument(help="The repository: user/name.")],
    private: Annotated[bool | None, typer.Option(help="Make a new repository private, or not.")] = None,
    revision: Revision = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit's message.")] = None,
    endpoint: Endpoint = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Verify a package and publish it in one commit."""
    from deltahub.hub import push as run

    found = run(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        endpoint=endpoint,
        token=token,
    )

    def lines(result: Any) -> Iterable[str]:
        yield result.pr_url or result.url
        yield f"{len(result.changed)} file(s) changed" if result.changed else "nothing changed, no commit was made"
        yield from (f"left behind: {name}" for name in result.ignored)

    _show(found, as_json, lines)


@app.command()
def search(
    text: Annotated[str | None, typer.Argument(help="Words to look for.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A folder or a repository: deltas for this backbone.")] = None,
    kind: Annotated[str | None, typer.Option(help="A kind of delta, such as lora.")] = None,
    author: Annotated[str | None, typer.Option(help="A user or an organisation.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    endpoint: Endpoint = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Find deltas on a Hub."""
    from deltahub.hub import search as run

    hits = run(backbone=backbone, kind=kind, author=author, text=text, limit=limit, endpoint=endpoint, token=token)
    _show(hits, as_json, lambda r: _table((h.repo_id, ", ".join(h.kinds), h.base_model or "") for h in r))


@app.command()
def verify(
    source: Package,
    backbone: Annotated[str | None, typer.Option(help="A folder or repository instead of the package's own.")] = None,
    level: Annotated[str, typer.Option(help="How the backbone is checked: structure, touched or full.")] = "touched",
    revision: Revision = None,
    endpoint: Endpoint = None,
    token: Token = None,
    cache_dir: Cache = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Check a package, its backbone, and that it does what its publisher saw."""
    from deltahub.loading import verify as run

    report = run(
        source,
        backbone=backbone,
        level=level,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
    )
    _show(report, as_json, lambda r: str(r).splitlines())


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training text.")] = 3,
) -> None:
    """Play a delta's whole life on a real model, offline: train, publish, load, merge, refuse."""
    from deltahub.demo import run

    raise typer.Exit(run(epochs=epochs))


def main() -> None:
    """Run the command line of this process."""
    app()


if __name__ == "__main__":
    main()
