"""Contestants in fresh processes that take turns: what another program does to the machine, it does to both."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltahub.benching.stopwatch import Timing
from deltahub.errors import UsageError

__all__ = ["Contest", "contest", "imports", "sides_here"]

_MARK = "deltahub-bench: "
_IMPORT = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
print((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)
print(len(sys.modules), int("torch" in sys.modules))
"""


@dataclass(kw_only=True)
class Contest:
    """What the processes of each side found, one entry per pair.

    Attributes:
        rounds: for each side, for each of its processes, what it printed.
    """

    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def metrics(self, side: str) -> list[str]:
        """What was timed of a side, in order."""
        return [name for name, value in self.rounds[side][0].items() if isinstance(value, dict)]

    def timing(self, side: str, metric: str) -> Timing:
        """The median of each process."""
        found = [one[metric] for one in self.rounds[side]]
        return Timing(
            cpu=[statistics.median(one["cpu"]) for one in found], wall=[statistics.median(one["wall"]) for one in found]
        )

    def number(self, side: str, metric: str) -> float:
        """The median over all processes of what is not a time."""
        return float(statistics.median(one[metric] for one in self.rounds[side]))

    def has(self, side: str, metric: str) -> bool:
        return side in self.rounds and metric in self.rounds[side][0]


def sides_here() -> tuple[str, ...]:
    """Those contestants that are installed; ours first."""
    return ("deltahub", *(name for name in ("peft",) if importlib.util.find_spec(name) is not None))


def contest(
    tasks: Sequence[str],
    model: str,
    *,
    sides: Sequence[str] | None = None,
    pairs: int = 5,
    warmup: int = 1,
    **options: Any,
) -> Contest:
    """Run tasks once per pair and side, in an order that alternates, after rounds that do not count.

    Args:
        tasks: of :data:`deltahub.benching.tasks.TASKS`; each process does all of them.
        model: as :func:`deltahub.benching.models.model_of` takes it.
        sides: who takes part; all that are installed by default.
        pairs: rounds that count.
        warmup: rounds before them: files come into the system's cache, compiled code onto the disk.
        options: of the tasks, and ``targets``, ``rank``, ``threads``.

    Raises:
        UsageError: ``E_USAGE_BENCH`` with what a process said before it failed.
    """
    names = list(sides or sides_here())
    found = Contest(rounds={name: [] for name in names})
    for turn in range(warmup + pairs):
        for name in names if turn % 2 else reversed(names):
            said = json.dumps({"tasks": list(tasks), "model": model, "side": name, **options})
            result = _child([sys.executable, "-m", "deltahub.benching.child", said])
            line = next(line for line in reversed(result.splitlines()) if line.startswith(_MARK))
            if turn >= warmup:
                found.rounds[name].append(json.loads(line.removeprefix(_MARK)))
    return found


def imports(modules: Sequence[str], *, pairs: int = 5, warmup: int = 1) -> Contest:
    """What ``import`` of each module takes in a fresh interpreter, without the interpreter's own start."""
    found = Contest(rounds={name: [] for name in modules})
    for turn in range(warmup + pairs):
        for name in modules if turn % 2 else reversed(modules):
            cpu, wall, count, torch = _child([sys.executable, "-c", _IMPORT.format(module=name)]).split()[-4:]
            if turn >= warmup:
                one = {"import": {"cpu": [float(cpu)], "wall": [float(wall)]}}
                found.rounds[name].append({**one, "modules": float(count), "torch": float(torch)})
    return found


def _child(command: Sequence[str]) -> str:
    environment: Mapping[str, str] = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise UsageError(
            "E_USAGE_BENCH",
            "a process that was to be measured failed",
            found=done.stderr[-2000:],
            hint="see its output",
        )
    return done.stdout
