"""Giving packages away: the card, the signature, the push."""

from __future__ import annotations

__all__: list[str] = []

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import Endpoint, Json, Revision, Token, app, show


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

    show(found, as_json, lines)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="The folder that holds delta.json.")],
    repo_id: Annotated[
        str | None, typer.Argument(help="Where it will be published: user/name; the folder's name by default.")
    ] = None,
    summary: Annotated[str | None, typer.Option(help="A sentence or two for the top of the page.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="As the Hub calls it: apache-2.0, mit, …")] = None,
    language: Annotated[list[str] | None, typer.Option(help="An ISO code; may be repeated.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Training data on the Hub; may be repeated.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER, as accuracy=0.91; may be repeated.")] = None,
    evaluated_on: Annotated[str | None, typer.Option(help="What the metrics were measured on.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A further tag; may be repeated.")] = None,
    as_json: Json = False,
) -> None:
    """Write the model card of a package.

    It can then be read, edited and signed before the push.
    Your own text and metadata in a README.md that is there already are kept.
    """
    from deltahub.hub import CardDetails, write_card

    details = CardDetails(
        license=licence,
        language=tuple(language or ()),
        datasets=tuple(dataset or ()),
        metrics=dict(_metric(text) for text in metric or ()),
        evaluated_on=evaluated_on,
        summary=summary,
        tags=tuple(tag or ()),
    )
    path = write_card(folder, repo_id or folder.resolve().name, details=details)
    show({"path": path}, as_json, lambda result: [str(result["path"])])


def _metric(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not NAME=NUMBER", param_hint="--metric") from None


@app.command()
def sign(
    folder: Annotated[Path, typer.Argument(help="The package; its model card is signed too, so it should be final.")],
    key: Annotated[
        Path | None, typer.Option(help="Your private key, in PEM, on P-256, P-384 or P-521.", metavar="FILE")
    ] = None,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign as who you are: Sigstore certifies it. Opens a browser to log in.")
    ] = False,
    identity_token: Annotated[
        str | None,
        typer.Option(help="For --keyless: an OpenID Connect token, no browser.", envvar="SIGSTORE_IDENTITY_TOKEN"),
    ] = None,
    trust_config: Annotated[
        Path | None, typer.Option(help="For --keyless: another Sigstore than the public one.", metavar="FILE")
    ] = None,
    password: Annotated[
        str | None,
        typer.Option(help="Asked for where it is needed.", envvar="DELTAHUB_KEY_PASSWORD"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign everything in a package's folder, with a key or with an identity.

    `deltahub verify --signed-by` checks a key, `--policy` a key or an identity.
    The signature is an OpenSSF Model Signing bundle, model.sig. A key is made with
    openssl ecparam -name prime256v1 -genkey -noout -out key.pem
    """
    from deltahub.sign import sign as run
    from deltahub.sign import sign_keyless

    if keyless == (key is not None):
        raise typer.BadParameter("give --key FILE or --keyless, one of the two", param_hint="--key")
    if key is None:
        found = sign_keyless(folder, identity_token=identity_token, trust_config=trust_config)
        show(found, as_json, lambda result: _signed(result, f"as {result.signer}"))
        return
    if password is None and sys.stdin.isatty() and _encrypted(key):
        password = typer.prompt("Password of the key", hide_input=True, err=True)
    found = run(folder, key, password=None if password is None else password.encode())
    show(found, as_json, lambda result: _signed(result, f"with key {result.fingerprint[:16]}"))


def _signed(result: Any, how: str) -> Iterable[str]:
    yield f"{len(result.files)} file(s) signed {how}"
    yield "push the folder as it is now: another card would need another signature"


def _encrypted(key: Path) -> bool:
    try:
        return b"ENCRYPTED" in key.read_bytes()[:4096]
    except OSError:
        return False  # reading it will fail again, and say why
