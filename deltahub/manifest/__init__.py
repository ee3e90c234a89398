"""The manifest of a package: a data model that parses strictly, checks itself, and writes itself back.

Members that this version does not know are kept, with their values, wherever they stand, so that a package that was
rewritten by an older program loses nothing. Members that it knows have exactly the type that is asked for.
"""

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
    "Setting",
    "Source",
    "json_schema",
    "schema_text",
]

from deltahub.manifest.document import (
    ALGORITHM,
    FILE_NAME,
    REQUIRES,
    SPEC_VERSION,
    Backbone,
    BackboneFile,
    Compatible,
    FileEntry,
    IdentityEntry,
    Manifest,
    Module,
    ProbeEntry,
    Setting,
    Source,
    json_schema,
    schema_text,
)
