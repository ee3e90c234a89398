"""Every error that DeltaHub raises: one tree, one shape, a stable code.

A message says what is wrong, where (a path into a file, a module path), what was
expected and what was found, and what to do about it. The codes, their causes and
their remedies are data in ``spec/errors/*.toml``; the codes are normative, the
messages are not.
"""

from __future__ import annotations

__all__ = [
    "BackboneError",
    "ConverterError",
    "DeltaHubError",
    "HostError",
    "HubError",
    "IdentityError",
    "InjectionError",
    "KindError",
    "ManifestError",
    "PackageError",
    "SignatureError",
    "TargetError",
    "TensorFileError",
    "UsageError",
    "printable",
]

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_LONGEST = 400
_MOST = 20


def printable(value: object) -> str:
    """Render untrusted text for a terminal: escape what does not print, cut what is long.

    Names in a package may hold control or bidirectional characters; shown raw they
    could rewrite the line that warns about them.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 4 :]} ({len(text)} characters)"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class DeltaHubError(Exception):
    """Base of all errors of this package.

    Args:
        code: stable code such as ``E_MANIFEST_DUPLICATE_KEY``, listed in ``spec/errors``.
        what: one sentence that says what is wrong.
        where: the file, path into the document, module path or tensor concerned.
        expected: what would have been right.
        found: what was there instead.
        hint: what the reader can do.
        also: further problems of the same document, one line each.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
        also: Sequence[str] = (),
    ) -> None:
        self.code = code
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.hint = hint
        self.also = tuple(also)
        super().__init__(code, what, where, expected, found, hint, self.also)

    def __reduce__(self) -> tuple[object, ...]:
        given = (self.code, self.what, self.where, self.expected, self.found, self.hint, self.also)
        return (_rebuild, (type(self), *given))

    def __str__(self) -> str:
        parts = [f"[{self.code}] {printable(self.what)}"]
        for label, value in (
            ("where", self.where),
            ("expected", self.expected),
            ("found", self.found),
            ("do", self.hint),
        ):
            if value is not None:
                parts.append(f"  {label + ':':<10}{printable(value)}")
        parts += [f"  also:     {printable(line)}" for line in self.also[:_MOST]]
        if len(self.also) > _MOST:
            parts.append(f"  and {len(self.also) - _MOST} more")
        return "\n".join(parts)


def _rebuild(
    cls: type[DeltaHubError],
    code: str,
    what: str,
    where: object,
    expected: object,
    found: object,
    hint: str | None,
    also: Sequence[str],
) -> DeltaHubError:
    """Unpickle an error: its keyword-only arguments do not fit ``BaseException``'s own scheme."""
    return cls(code, what, where=where, expected=expected, found=found, hint=hint, also=also)


class TensorFileError(DeltaHubError):
    """A safetensors file is malformed, hostile, cut, or holds what it should not."""


class ManifestError(DeltaHubError):
    """A manifest is not valid JSON, not valid by the schema, or contradicts itself."""


class TargetError(DeltaHubError):
    """A target does not parse, expands too far, names nothing, or names something twice."""


class IdentityError(DeltaHubError):
    """A backbone is not the one that was declared, or its identity cannot be computed."""


class KindError(DeltaHubError):
    """A kind document, its config, its expressions or its tensors are wrong."""


class HostError(DeltaHubError):
    """A module of the backbone cannot host what was asked of it."""


class PackageError(DeltaHubError):
    """A package on disk is incomplete, altered, or cannot be written."""


class InjectionError(DeltaHubError):
    """A delta cannot be attached, detached, merged or combined as asked."""


class BackboneError(DeltaHubError):
    """A backbone cannot be found, rebuilt, or may not be."""


class HubError(DeltaHubError):
    """A repository cannot be reached, read or written."""


class SignatureError(DeltaHubError):
    """A signature is missing, malformed, made by nobody who is trusted, or made over something else."""


class ConverterError(DeltaHubError):
    """A checkpoint cannot be converted without loss, or at all."""


class UsageError(DeltaHubError):
    """A public function or the command line was called with something that makes no sense."""
