"""Getting packages: found, pulled, verified, and written down in a lock file."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from deltahub.cli.base import (
    Cache,
    Endpoint,
    Json,
    LockFile,
    Offline,
    Package,
    PolicyFile,
    RequireSignature,
    Revision,
    SignedBy,
    Token,
    app,
    as_table,
    demands,
    show,
)


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

    def lines(found: Any) -> Iterable[str]:
        if not found:
            return ["nothing found"]
        head = ["repository", "kinds", "backbone", "downloads", "updated"]
        rows = [[h.repo_id, ", ".join(h.kinds), h.base_model or "", h.downloads, h.updated] for h in found]
        if backbone is not None:  # how sure it is that this is the same backbone
            head.insert(1, "match")
            for row, hit in zip(rows, found, strict=True):
                row.insert(1, hit.match or "")
        return as_table([head, *rows])

    show(hits, as_json, lines)


@app.command()
def pull(
    source: Package,
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
    """Fetch a package and check every byte of it."""
    from deltahub.hub import pull as run

    found = run(
        source,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
        **demands(lock=lock, policy=policy, signed_by=signed_by, require_signature=require_signature),
    )
    result = {
        "path": found.path,
        "repo_id": found.repo_id,
        "commit": found.commit,
        "sha256": found.sha256,
        "signer": found.signature.signer if found.signature else None,
        "files": {entry.path: entry.size for entry in found.manifest.files},
    }
    show(result, as_json, lambda r: as_table((key, r[key]) for key in ("path", "commit", "sha256", "signer") if r[key]))


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
    lock: LockFile = None,
    policy: PolicyFile = None,
    signed_by: SignedBy = None,
    require_signature: RequireSignature = False,
    as_json: Json = False,
) -> None:
    """Check a package and its backbone, and replay its probe.

    Every file is hashed, the backbone is checked, the delta is put on it, and the publisher's own forward pass
    must come out with the publisher's numbers.
    """
    from deltahub.opening import verify as run

    report = run(
        source,
        backbone=backbone,
        level=level,
        revision=revision,
        endpoint=endpoint,
        token=token,
        cache_dir=cache_dir,
        local_files_only=offline,
        **demands(lock=lock, policy=policy, signed_by=signed_by, require_signature=require_signature),
    )
    show(report, as_json, lambda r: str(r).splitlines())


@app.command()
def lock(
    sources: Annotated[list[str], typer.Argument(help="Packages: user/name, user/name@revision, a mirror.")],
    out: Annotated[Path, typer.Option(help="The lock file to write.", metavar="FILE")] = Path("deltahub.lock"),
    endpoint: Endpoint = None,
    token: Token = None,
    cache_dir: Cache = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Write down what exactly packages are now.

    The lock file holds commits, digests and backbones; `--lock` of the other verbs, and load(lock=…) in Python,
    take just that or refuse.
    """
    from deltahub.hub import lock_of
    from deltahub.hub import pull as run

    options: dict[str, Any] = {"endpoint": endpoint, "token": token, "cache_dir": cache_dir}
    found = lock_of([run(source, local_files_only=offline, **options) for source in sources])
    found.write(out)

    def lines(result: Any) -> Iterable[str]:
        yield from as_table((entry.source, entry.commit or entry.manifest) for entry in result.packages)
        yield f"written to {out}"

    show(found, as_json, lines)
