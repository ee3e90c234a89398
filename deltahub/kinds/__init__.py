"""Delta kinds: documents turned into functions, with no knowledge of modules, files or injection."""

from __future__ import annotations

from deltahub.kinds.document import Document
from deltahub.kinds.host_shape import FAMILIES, Family, HostShape
from deltahub.kinds.kind import Kind, Port
from deltahub.kinds.layout import TensorSpec
from deltahub.kinds.naming import also_called
from deltahub.kinds.registry import Registry, get, names

__all__ = [
    "FAMILIES",
    "Document",
    "Family",
    "HostShape",
    "Kind",
    "Port",
    "Registry",
    "TensorSpec",
    "also_called",
    "get",
    "names",
]
