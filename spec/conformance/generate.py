"""Write the vectors whose bytes and numbers are computed, and keep all vector files in one layout.

    python spec/conformance/generate.py            # rewrite
    python spec/conformance/generate.py --check    # exit status 1 if a file would change

Expected values come from :mod:`reference`, plain NumPy and hashlib code in this folder's own words; nothing
of an implementation is imported.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["dump"]

WIDTH = 110


def dump(value: Any, indent: int = 0) -> str:
    """JSON with whatever fits on one line kept there, so that a vector reads like a sentence."""
    flat = json.dumps(value, ensure_ascii=True)
    if not isinstance(value, dict | list) or not value or len(flat) + indent <= WIDTH:
        return flat
    pad, end = " " * (indent + 2), " " * indent
    if isinstance(value, list):
        if all(isinstance(item, int | float) for item in value):
            return flat
        return "[\n" + ",\n".join(pad + dump(item, indent + 2) for item in value) + f"\n{end}]"
    members = (f"{pad}{json.dumps(key)}: {dump(item, indent + 2)}" for key, item in value.items())
    return "{\n" + ",\n".join(members) + f"\n{end}}}"
