"""The data model of a manifest: what each member may be, and what they must be together."""

from __future__ import annotations

__all__ = [
    "ALGORITHM",
    "FILE_NAME",
    "REQUIRES",
    "SPEC_VERSION",
    "Backbone",
    "BackboneFile",
    "Compatible",
    "FileEntry",
    "IdentityEntry",
    "Manifest",
    "Module",
    "ProbeEntry",
    "RowsEntry",
    "Setting",
    "Source",
    "json_schema",
    "schema_text",
]

import json
import re
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from deltahub.errors import DeltaHubError, ManifestError, TargetError
from deltahub.limits import DEFAULT, Limits
from deltahub.manifest.fields import (
    ClassName,
    Commit,
    Digest,
    ExtensionName,
    FieldPath,
    HubId,
    Model,
    ModuleName,
    NonEmpty,
    Optional,
    Printable,
    Subfolder,
    Target,
    TensorFilePath,
    Tuple,
    Version,
    problems_of,
    tidy,
)
from deltahub.manifest.filenames import folded
from deltahub.manifest.strict_json import Problem, Step, fail, parse
from deltahub.targets import expand_all

FILE_NAME = "delta.json"
SPEC_VERSION = "1.0"
ALGORITHM = "sha256-tree-1"
REQUIRES: frozenset[str] = frozenset()
"""What a package may demand that its reader knows; version 1.0 defines nothing of this sort."""

_MAJOR = 1
_VERSION = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)", re.ASCII)


class FileEntry(Model):
    """A file with its size in bytes and its SHA-256."""

    path: TensorFilePath
    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class Source(Model):
    """Where a backbone can be had. ``class_`` is looked up in a loader's own list and never imported by name."""

    hub: Optional[HubId] = None
    commit: Optional[Commit] = None
    subfolder: Optional[Subfolder] = None
    class_: Optional[ClassName] = Field(default=None, alias="class")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        """Let Python say ``class_``; in JSON that is an unknown member like any other."""
        if info.context is None and isinstance(value, dict) and "class_" in value:
            return {("class" if name == "class_" else name): item for name, item in value.items()}
        return value


class IdentityEntry(Model):
    """What a backbone is: the two roots over its tensors, its structure, and what they leave out."""

    algorithm: Literal["sha256-tree-1"]
    exact: Digest
    bf16: Digest
    structure: Digest
    tensors: Annotated[int, Field(ge=0)]
    tied: Optional[dict[Printable, Printable]] = None
    excluded: Optional[Tuple[Printable]] = None


class Compatible(Model):
    """Another identity that the publisher vouches for, such as a quantised copy."""

    root: Digest
    relation: Printable
    method: Optional[Printable] = None


class BackboneFile(Model):
    """A file of a backbone that the publisher saw; it may be of any format."""

    path: Printable
    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class Backbone(Model):
    """The model that a delta was trained against."""

    source: Optional[Source] = None
    identity: IdentityEntry
    files: Optional[Tuple[BackboneFile]] = None
    leaves: Optional[dict[Printable, Digest]] = None
    leaves_bf16: Optional[dict[Printable, Digest]] = None
    compatible: Optional[Tuple[Compatible]] = None


class RowsEntry(Model):
    """The outputs of a host that a module is on: those ``r`` with ``start <= r % period < stop``."""

    start: Annotated[int, Field(ge=0)]
    stop: Annotated[int, Field(ge=1)]
    period: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.start < self.stop <= self.period:
            raise PydanticCustomError(
                "E_MANIFEST_FIELD",
                "{what}",
                {"what": "these are no rows of a period", "expected": "start < stop <= period"},
            )
        return self

    @property
    def numbers(self) -> tuple[int, int, int]:
        return (self.start, self.stop, self.period)


class Module(Model):
    """One kind with one config at some targets. Modules apply in the order of the list."""

    name: ModuleName
    kind: Printable
    version: Annotated[int, Field(ge=1)]
    config: dict[str, Any]
    targets: NonEmpty[Target]
    inputs: Optional[NonEmpty[Target]] = None
    rows: Optional[RowsEntry] = None
    stack: Optional[Annotated[int, Field(ge=1)]] = None
    removes: Optional[Tuple[Printable]] = None

    @cached_property
    def paths(self) -> tuple[str, ...]:
        """The exact paths that ``targets`` stand for, in order.

        Raises:
            TargetError: as :func:`deltahub.targets.expand_all`; never after :meth:`Manifest.parse`.
        """
        return tuple(expand_all(self.targets))

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The exact paths that ``inputs`` stand for, in order; none where the targets read their own."""
        return tuple(expand_all(self.inputs or ()))


class Setting(Model):
    """A field of the backbone's configuration that changes with the delta, and the value that it replaces."""

    on: Literal["config", "processor", "scheduler"]
    path: FieldPath
    was: Any
    value: Any


class ProbeEntry(Model):
    """The file of known inputs and outputs, and the greatest absolute difference per dtype."""

    file: TensorFilePath
    tolerance: dict[Literal["float32", "bfloat16", "float16", "float64"], Annotated[float, Field(gt=0)]]


class Manifest(Model):
    """A whole manifest. :meth:`parse` and :meth:`to_bytes` are inverse to each other but for white space and order."""

    spec_version: Version
    requires: Annotated[Optional[Tuple[Printable]], Field(json_schema_extra={"maxItems": len(REQUIRES)})] = None
    backbone: Backbone
    modules: NonEmpty[Module]
    kinds: Optional[Tuple[dict[str, Any]]] = None
    settings: Optional[Tuple[Setting]] = None
    files: Tuple[FileEntry]
    probe: Optional[ProbeEntry] = None
    extensions: Optional[dict[ExtensionName, Any]] = None

    @classmethod
    def parse(cls, data: bytes, *, where: str = FILE_NAME, limits: Limits = DEFAULT) -> Self:
        """Read a manifest and check everything about it that needs neither the files nor the backbone.

        Args:
            data: the bytes of ``delta.json``.
            where: what to call it in errors.
            limits: what to accept at most.

        Raises:
            ManifestError: with the path into the document; all problems of one step at once: first of the bytes,
                then of the JSON, then of the version, then of the members, then of what they say together.
            TargetError: a target does not parse, stands for too much, or comes twice.
        """
        document = parse(data, where=where, max_bytes=limits.manifest_bytes, max_depth=limits.manifest_depth)
        if not isinstance(document, dict):
            raise ManifestError("E_MANIFEST_JSON", "a manifest is a JSON object", where=where)
        _check_version(document, where)
        try:
            manifest = cls.model_validate(document, context={"json": True})
        except ValidationError as error:
            raise fail(problems_of(error), where) from None
        problems = manifest.problems(limits=limits)
        if problems:
            raise fail(problems, where)
        return manifest

    def to_bytes(self) -> bytes:
        """Write the manifest as UTF-8 JSON: the same bytes for the same content, members in the declared order.

        What is written is parsed again, so that nothing is published that a reader would refuse.

        Raises:
            ManifestError: the manifest holds what no manifest may hold.
            TargetError: as :meth:`parse`.
        """
        document = self.model_dump(mode="python", by_alias=True, exclude_unset=True)
        try:
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            data = (text + "\n").encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            raise ManifestError("E_MANIFEST_FIELD", f"the manifest cannot be written as JSON: {error}") from None
        type(self).parse(data)
        return data

    def problems(self, *, limits: Limits = DEFAULT) -> list[Problem]:
        """Everything that is wrong in what the members say together, though each is well formed."""
        return [*self._module_problems(limits), *self._file_problems(), *self._other_problems()]

    def module(self, name: str) -> Module:
        """Return the module of this name; ``KeyError`` if there is none."""
        return {module.name: module for module in self.modules}[name]

    @property
    def tensor_files(self) -> tuple[FileEntry, ...]:
        """The listed files that hold the delta's own tensors: all but the probe's."""
        return tuple(file for file in self.files if self.probe is None or file.path != self.probe.file)

    def _module_problems(self, limits: Limits) -> list[Problem]:
        found: list[Problem] = []
        names: set[str] = set()
        left = limits.targets_count
        for i, module in enumerate(self.modules):
            if module.name in names:
                found.append(_twice(("modules", i, "name"), f"two modules are called {module.name!r}"))
            names.add(module.name)
            member = "targets"
            try:
                paths = expand_all(module.targets, limit=left, where=f"modules[{i}].targets")
                left -= len(paths)
                member = "inputs"
                sources = expand_all(module.inputs or (), limit=left, where=f"modules[{i}].inputs")
                left -= len(sources)
            except TargetError as error:
                place: tuple[Step, ...] = ("modules", i, member, *_indices(error.where))
                found.append(_problem(place, error))
                if error.code == "E_TARGET_EXPANSION":
                    break
                continue
            module.__dict__ |= {"paths": tuple(paths), "sources": tuple(sources)}
            if module.inputs and len(sources) != len(paths):
                what = "inputs and targets stand for different numbers of paths"
                place = ("modules", i, "inputs")
                found.append(
                    Problem(path=place, code="E_MANIFEST_FIELD", what=what, expected=len(paths), found=len(sources))
                )
        return found

    def _file_problems(self) -> list[Problem]:
        found: list[Problem] = []
        seen: dict[str, str] = {}
        for i, file in enumerate(self.files):
            place = ("files", i, "path")
            other = seen.setdefault(folded(file.path), file.path)
            if other is not file.path:
                what = "two paths are equal, or would be one file on some systems"
                found.append(Problem(path=place, code="E_MANIFEST_PATH", what=what, found=[other, file.path]))
        if self.probe is not None and all(file.path != self.probe.file for file in self.files):
            what = "the probe's file is not among the files"
            found.append(Problem(path=("probe", "file"), code="E_MANIFEST_FIELD", what=what, found=self.probe.file))
        return found

    def _other_problems(self) -> list[Problem]:
        found: list[Problem] = []
        kinds: set[str] = set()
        for i, document in enumerate(self.kinds or ()):
            kind = f"{document.get('kind')!r}, version {document.get('version')!r}"
            if kind in kinds:
                found.append(_twice(("kinds", i), f"the kind {kind} comes twice"))
            kinds.add(kind)
        fields: set[tuple[str, str]] = set()
        for i, setting in enumerate(self.settings or ()):
            if (setting.on, setting.path) in fields:
                found.append(_twice(("settings", i), f"{setting.on}.{setting.path} is set twice"))
            fields.add((setting.on, setting.path))
        tied = self.backbone.identity.tied or {}
        for name, kept in tied.items():
            if kept in tied:
                what = "a tensor is tied to one that is itself tied"
                path = ("backbone", "identity", "tied", name)
                found.append(Problem(path=path, code="E_MANIFEST_FIELD", what=what, found=kept))
        return found


def _twice(path: tuple[Step, ...], what: str) -> Problem:
    return Problem(path=path, code="E_MANIFEST_DUPLICATE", what=what)


def _problem(path: tuple[Step, ...], error: DeltaHubError) -> Problem:
    return Problem(
        path=path,
        code=error.code,
        what=error.what,
        expected=error.expected,
        found=error.found,
        error=type(error),
        also=error.also,
    )


def _indices(where: object) -> tuple[int, ...]:
    """Read the last index back out of ``modules[0].targets[3]``."""
    text = str(where).rpartition("[")[2].rstrip("]")
    return (int(text),) if text.isdigit() else ()


def _check_version(document: dict[str, Any], where: str) -> None:
    """Refuse what is of another major version, or demands what this reader lacks, before any member is looked at."""
    version = document.get("spec_version")
    if isinstance(version, str) and _VERSION.fullmatch(version):
        major = version.partition(".")[0]
        if major != str(_MAJOR):
            raise ManifestError(
                "E_MANIFEST_VERSION",
                f"the package is of version {version}",
                where=f"{where}: spec_version",
                expected=f"{_MAJOR}.x",
                found=version,
                hint="update deltahub" if int(major[:9]) > _MAJOR else "this was never a published version",
            )
        requires = document.get("requires")
        if isinstance(requires, list):
            unknown = sorted({item for item in requires if isinstance(item, str)} - REQUIRES)
            if unknown:
                raise ManifestError(
                    "E_MANIFEST_REQUIRES",
                    "the package demands what this reader does not know",
                    where=f"{where}: requires",
                    expected=sorted(REQUIRES) or "nothing",
                    found=unknown,
                    hint="update deltahub",
                )


def json_schema() -> dict[str, Any]:
    """The shape of a manifest as JSON Schema 2020-12; what needs more than one member to judge is not in it."""
    schema = tidy(Manifest.model_json_schema(by_alias=True))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://deltahub.dev/spec/1.0/manifest.schema.json",
        **schema,
        "title": "The manifest of a DeltaHub package, version 1.0",
    }


def schema_text() -> str:
    """``spec/manifest.schema.json``, which is this text and is never edited by hand."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=True) + "\n"
