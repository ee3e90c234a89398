"""What all verbs share: the application, its options, its errors, and how a result is printed."""

from __future__ import annotations

__all__ = [
    "Cache",
    "Endpoint",
    "Json",
    "LockFile",
    "Offline",
    "Package",
    "PolicyFile",
    "RequireSignature",
    "Revision",
    "SignedBy",
    "Token",
    "app",
    "as_bytes",
    "as_plain",
    "as_table",
    "as_text",
    "cut",
    "demands",
    "show",
    "watched",
]

import dataclasses
import enum
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deltahub.errors import DeltaHubError, printable


class _Group(TyperGroup):
    """Prints DeltaHub's own errors instead of their tracebacks."""

    def invoke(self, ctx: Any) -> Any:  # the context's class depends on typer's version
        try:
            with watched():
                return super().invoke(ctx)
        except DeltaHubError as error:
            if ctx.find_root().meta.get("json"):
                names = ("code", "what", "where", "expected", "found", "hint", "also")
                typer.echo(as_text({"error": {name: getattr(error, name) for name in names}}))
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    help="Deltas over frozen backbones: publish, fetch, verify, load.",
    epilog="`deltahub VERB --help` says what a verb takes. Every verb prints one JSON document with --json.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def watched() -> Iterator[None]:
    """Show what takes long on a terminal; where standard error is piped, say nothing and load nothing."""
    if not sys.stderr.isatty():
        yield
        return
    from deltahub.cli.bars import Bars
    from deltahub.progress import listening

    with Bars() as bars, listening(bars):
        yield


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
LockFile = Annotated[
    Path | None, typer.Option("--lock", help="A lock file: take exactly what it names, or refuse.", metavar="FILE")
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="A trust policy, in TOML: who must have signed what.", metavar="FILE")
]
SignedBy = Annotated[
    Path | None, typer.Option(help="A public key, in PEM: refuse what it did not sign.", metavar="FILE")
]
RequireSignature = Annotated[
    bool, typer.Option("--require-signature", help="Refuse what nobody signed whom --policy or --signed-by names.")
]


def demands(
    *,
    lock: Path | None = None,
    policy: Path | None = None,
    signed_by: Path | None = None,
    require_signature: bool = False,
) -> dict[str, Any]:
    """What a user demands of a package, as the keyword arguments ``lock`` and ``policy`` of the public functions."""
    found: dict[str, Any] = {}
    if lock is not None:
        from deltahub.hub import Lock

        found["lock"] = Lock.read(lock)
    if policy is not None or signed_by is not None:
        from deltahub.sign import Policy, Signer

        trusted = Policy.read(policy) if policy is not None else Policy()
        if signed_by is not None:
            signer = Signer(name=signed_by.stem, key=_key(signed_by))
            trusted = Policy(signers=(signer,), require=("*",))
        elif require_signature:
            trusted = dataclasses.replace(trusted, require=("*",))
        found["policy"] = trusted
    elif require_signature:
        raise typer.BadParameter(
            "say whose signature counts: give --policy or --signed-by", param_hint="--require-signature"
        )
    return found


def _key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"the key cannot be read: {error}", param_hint="--signed-by") from None


def as_plain(value: Any) -> Any:
    """Turn results into what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, Iterable):
        return [as_plain(v) for v in value]
    return str(value)


def as_text(value: Any) -> str:
    """One JSON document."""
    return json.dumps(as_plain(value), indent=2, ensure_ascii=False)


def show(result: Any, as_json: bool, lines: Callable[[Any], Iterable[str]]) -> None:
    """Print a result: as JSON, or as the lines that a reader wants."""
    if as_json:
        typer.echo(as_text(result))
        return
    for line in lines(result):
        typer.echo(printable(line))


def as_table(rows: Iterable[Iterable[object]]) -> list[str]:
    """Columns as wide as their widest cell; the last is as long as it is."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def as_bytes(size: float) -> str:
    """A size as people read it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"


def cut(text: str, length: int) -> str:
    """A text that is at most so long."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
