"""``python -m benchmarks.figures``: what the last runs of merging and diffs found, as a page of the documentation."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness import OUT

__all__ = ["main"]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "merging.md"
NAMES = ("merge", "merge_large", "diff")
HEAD = """# Merges and diffs, measured

Written by `python -m benchmarks.figures` from the last runs of `python -m benchmarks merge merge_large diff`. A shared
machine of two cores, never idle: its load stands under each table. Times of one row are comparable, and of different
tables are not.
"""


def main(page: Path = PAGE, out: Path = OUT) -> int:
    """Write the page out of those reports that are there."""
    parts = [HEAD]
    for name in NAMES:
        path = out / f"{name}.md"
        if path.is_file():
            parts.append(path.read_text(encoding="utf-8").strip() + "\n")
    page.write_text("\n".join(parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
