"""Which modules a delta acts on: how authors select them, and how their paths are written into a package.

A package holds exact paths with two abbreviations, ``{a,b}`` and ``{0..11}`` (:func:`expand`). Authors may use
suffixes, globs, types and functions (:func:`select`) because what these select is resolved, shown and stored as paths
(:func:`abbreviate`).
"""

from __future__ import annotations

__all__ = [
    "SITE_PREFIX",
    "Selector",
    "abbreviate",
    "backbone_modules",
    "check_path",
    "class_names",
    "expand",
    "expand_all",
    "select",
]

from deltahub.targets.authoring import Selector, abbreviate, select
from deltahub.targets.patterns import check_path, expand, expand_all
from deltahub.targets.walking import SITE_PREFIX, backbone_modules, class_names
