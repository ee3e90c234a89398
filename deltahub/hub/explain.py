"""The client's exceptions, and a server's refusals behind them, as errors of this library.

Only the public classes of ``huggingface_hub.errors`` are looked at, the builtin ``ConnectionError`` (which is what
``hf_xet`` raises), and the HTTP library's base class, from which the first derive.
"""

from __future__ import annotations

__all__ = ["explain", "explained"]

import contextlib
from collections.abc import Iterator
from typing import Any

from deltahub.errors import HubError

_TOKEN = "log in with `hf auth login`, set HF_TOKEN, or give token="  # noqa: S105
_GATED = "open the repository's page, accept its conditions, and use a token of that account"
_BY_CLASS = (
    ("GatedRepoError", "E_HUB_GATED", "access to this repository is restricted", _GATED),
    (
        "RepositoryNotFoundError",
        "E_HUB_REPO_NOT_FOUND",
        "there is no such repository, or it is private and you may not see it",
        f"check the name; {_TOKEN}",
    ),
    (
        "RevisionNotFoundError",
        "E_HUB_REVISION_NOT_FOUND",
        "the repository has no such branch, tag or commit",
        "look at the branches and tags on the repository's page",
    ),
    (
        "RemoteEntryNotFoundError",
        "E_HUB_FILE_NOT_FOUND",
        "a file of the package is not in the repository",
        "the repository holds an incomplete package; tell its owner",
    ),
    ("FileMetadataError", "E_HUB_RESPONSE", "the answer is not that of a Hub", "check HF_ENDPOINT or endpoint="),
    (
        "OfflineModeIsEnabled",
        "E_HUB_OFFLINE",
        "this is not in the cache, and requests are switched off",
        "unset HF_HUB_OFFLINE, or pull once while online",
    ),
)
_BY_STATUS = {
    401: ("E_HUB_UNAUTHORIZED", "the Hub wants to know who asks, or does not know this token", _TOKEN),
    403: ("E_HUB_FORBIDDEN", "this account may not do that", "use a token with write access, or create_pr=True"),
    412: (
        "E_HUB_CONFLICT",
        "somebody has committed to the repository in the meantime; nothing was changed",
        "look at the new commit, then push again",
    ),
}


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what the client raises in this context into a :class:`HubError`.

    Args:
        where: repository, revision and file concerned.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        found = explain(error, where)
        if found is None:
            raise
        raise found from error


def explain(error: BaseException, where: str) -> HubError | None:
    """The error that says what the client's exception means; ``None`` if it is not one of the Hub's."""
    from huggingface_hub import errors

    for name, code, what, hint in _BY_CLASS:
        if isinstance(error, getattr(errors, name)):
            return HubError(code, what, where=where, found=_said(error), hint=hint)
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error, where)
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, RuntimeError)):
        return _by_cause(error, where)
    if isinstance(error, (*errors.HfHubHTTPError.__bases__[:1], ConnectionError)):
        return _unreachable(error, where)
    if isinstance(error, errors.XetDownloadError) or "Consistency check failed" in str(error):
        return _broken(error, where)
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return HubError("E_HUB_CARD", "the Hub refuses the card's metadata", where=where, found=_last_line(error))
    return None


def _by_status(error: Any, where: str) -> HubError:
    status = int(error.response.status_code)
    said = _said(error)
    if status in _BY_STATUS:
        code, what, hint = _BY_STATUS[status]
        return HubError(code, what, where=where, found=f"{status}: {said}", hint=hint)
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        hint = f"wait {wait} seconds and try again" if wait else "wait a while and try again"
        return HubError("E_HUB_RATE_LIMITED", "the Hub refuses so many requests", where=where, found=said, hint=hint)
    if status >= 500:
        return HubError(
            "E_HUB_SERVER", "the Hub has a fault of its own", where=where, found=f"{status}: {said}", hint="try later"
        )
    return HubError("E_HUB_REFUSED", "the Hub refuses this request", where=where, found=f"{status}: {said}")


def _by_cause(error: BaseException, where: str) -> HubError:
    """Some exceptions of the client only wrap what happened."""
    cause = error.__cause__
    found = explain(cause, where) if cause is not None else None
    if found is not None:
        return found
    if isinstance(error, RuntimeError):
        return _broken(error, where)
    return HubError(
        "E_HUB_OFFLINE",
        "this is not in the cache, and requests are switched off",
        where=where,
        found=_first_line(error),
        hint="pull once without local_files_only",
    )


def _unreachable(error: BaseException, where: str) -> HubError:
    if "Timeout" in type(error).__name__:
        return HubError(
            "E_HUB_TIMEOUT", "the Hub did not answer in time", where=where, found=_first_line(error), hint="try later"
        )
    return HubError(
        "E_HUB_CONNECTION",
        "the Hub cannot be reached",
        where=where,
        found=_first_line(error),
        hint="check the network, a proxy, HF_ENDPOINT",
    )


def _broken(error: BaseException, where: str) -> HubError:
    return HubError(
        "E_HUB_TRANSFER",
        "the transfer broke off or brought something else than announced",
        where=where,
        found=_first_line(error),
        hint="try again",
    )


def _said(error: BaseException) -> str:
    """The Hub's own words where it had any."""
    return str(getattr(error, "server_message", None) or _first_line(error))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]
