"""A stopwatch for a machine that others use too: processor time first, wall time beside it, medians of neighbours."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

__all__ = ["Timing", "machine", "peak_during", "timed"]

_STATUS = Path("/proc/self/status")


@dataclass(kw_only=True)
class Timing:
    """Milliseconds per call: of the processor, and by the clock on the wall."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.cpu)

    def over(self, other: Timing) -> float:
        """The median of the ratios within each round: neighbours in time share what else the machine does."""
        return statistics.median(a / b for a, b in zip(self.cpu, other.cpu, strict=True))

    def to_dict(self) -> dict[str, float | int]:
        return {
            "cpu_ms": round(self.median, 3),
            "cpu_ms_min": round(min(self.cpu), 3),
            "wall_ms": round(statistics.median(self.wall), 3),
            "repeats": len(self.cpu),
        }


def timed(
    call: Callable[[], object],
    *,
    after: Callable[[], object] = lambda: None,
    before: Callable[[], object] = lambda: None,
    repeats: int = 5,
    warmup: int = 2,
) -> Timing:
    """Time a call, with what prepares and undoes it outside the measured time and the garbage collector off."""
    timing = Timing()
    for turn in range(warmup + repeats):
        before()
        gc.collect(0 if turn else 2)
        gc.disable()
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            result = call()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        finally:
            gc.enable()
        del result
        after()
        if turn >= warmup:
            timing.cpu.append(cpu * 1e3)
            timing.wall.append(wall * 1e3)
    return timing


def _status(key: str) -> int:
    """A number of kB from the kernel's account of this process, in bytes."""
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_during(call: Callable[[], object]) -> int | None:
    """How many bytes of memory a call takes at most beyond what is there before it; ``None`` where nobody tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
        before = _status("VmRSS")
    except (OSError, StopIteration):
        return None
    call()
    return max(0, _status("VmHWM") - before)


def machine(names: Sequence[str] = ("deltahub", "torch", "transformers", "peft", "safetensors")) -> dict[str, object]:
    """What a reader must know to compare numbers."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        model = next(lines, f":{model}").split(":", 1)[1].strip()
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
    }
