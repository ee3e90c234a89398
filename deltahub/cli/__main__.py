"""``python -m deltahub.cli``."""

from __future__ import annotations

__all__: list[str] = []

from deltahub.cli import main

if __name__ == "__main__":
    main()
