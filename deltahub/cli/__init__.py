"""The command line: thin, every verb calls a public function and prints what it returns.

``--json`` prints one JSON document to standard output. An error of DeltaHub goes to standard error, without
a traceback, and the exit code is 1; a command line that makes no sense is 2. Progress is shown on standard error
where that is a terminal.
"""

from __future__ import annotations

__all__ = ["app", "main"]

import os
import sys

from deltahub.cli import (  # noqa: F401 - each adds its verbs
    benching,
    converting,
    demonstrating,
    doctoring,
    exporting,
    fetching,
    kinds,
    looking,
    publishing,
    training,
)
from deltahub.cli.base import app


def main() -> None:
    """Run the command line of this process."""
    if not sys.stderr.isatty():  # the libraries underneath are to be quiet too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()
