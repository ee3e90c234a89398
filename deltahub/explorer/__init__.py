"""The explorer: one page of HTML that shows a structure, and says what a delta would cost where.

The page is a file that needs nothing else: no network, no fonts, no libraries. Modules are folded, searched and
picked; a kind is chosen; trainable parameters, package size, the manifest's targets and the line of Python that
attaches it follow at once. A package shows its sites, its equations and how its numbers are spread.
"""

from __future__ import annotations

__all__ = ["page", "served"]

from deltahub.explorer.pages import page
from deltahub.explorer.serving import served
