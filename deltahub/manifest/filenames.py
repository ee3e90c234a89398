"""Which file names a package may hold: those that mean one file inside it, on every system."""

from __future__ import annotations

__all__ = ["folded", "problem_of"]

import unicodedata

from deltahub.limits import DEFAULT

_RESERVED = frozenset({"CON", "PRN", "AUX", "NUL"}) | {f"{d}{n}" for d in ("COM", "LPT") for n in "123456789"}


def folded(path: str) -> str:
    """Return what two paths have in common when some file system takes them for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def problem_of(path: str) -> str | None:
    """Say what is wrong with a relative path in a package, or None.

    The same answer on every system: what is a drive, a device or a second spelling anywhere is refused everywhere.
    """
    if len(path) > DEFAULT.manifest_text_length:
        return f"it is longer than {DEFAULT.manifest_text_length} characters"
    for name in path.split("/"):
        if not name:
            return "a name in it is empty, or it is absolute"
        if name in {".", ".."}:
            return "it leads out of the package or in a circle"
        if not name.isprintable():
            return "a character in it does not print"
        if "\\" in name or ":" in name:
            return "it holds a backslash or a colon, as paths of other systems do"
        if name[-1] in ". ":
            return "a name in it ends in a dot or a space"
        if name.split(".")[0].rstrip(" ").upper() in _RESERVED:
            return f"{name!r} is a device on some systems"
    return None
