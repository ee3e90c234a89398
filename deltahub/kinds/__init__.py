"""Delta kinds: documents turned into functions, with no knowledge of modules, files or injection."""

from __future__ import annotations

from deltahub.kinds.host_shape import FAMILIES, Family, HostShape

__all__ = ["FAMILIES", "Family", "HostShape"]
