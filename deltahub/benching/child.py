"""One contestant's turn: a fresh process that builds a model, does one task, and prints what it measured as JSON."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from typing import Any

__all__ = ["main"]

_MARK = "deltahub-bench: "


def main(arguments: list[str] | None = None) -> int:
    """Read one JSON object (``side``, ``tasks``, ``model``, ``targets``, ``rank``, …) and do as it says."""
    said: dict[str, Any] = json.loads((arguments or sys.argv[1:])[0])
    os.environ["OMP_NUM_THREADS"] = str(said.get("threads", 1))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-cache-") as cache:
        os.environ["DELTAHUB_CACHE"] = cache
        found = _measured(said)
    sys.stdout.write(f"{_MARK}{json.dumps(found)}\n")
    return 0


def _measured(said: dict[str, Any]) -> dict[str, Any]:
    import torch

    from deltahub.benching.models import model_of
    from deltahub.benching.sides import SIDES, paths_on
    from deltahub.benching.stopwatch import Timing
    from deltahub.benching.tasks import TASKS

    torch.set_num_threads(int(said.get("threads", 1)))
    model = model_of(said["model"])
    side = SIDES[said["side"]](model, paths_on(model, said.get("targets")), int(said.get("rank", 16)))
    found = {}
    for task in said["tasks"]:
        for name, value in TASKS[task](side, said).items():
            found[f"{task}: {name}"] = {"cpu": value.cpu, "wall": value.wall} if isinstance(value, Timing) else value
        side.clear()
    return found


if __name__ == "__main__":
    sys.exit(main())
