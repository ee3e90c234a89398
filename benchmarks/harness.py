"""What all benchmarks share: Llama-shaped models, a fair stopwatch, the report.

Contestants take turns in one process on one thread, in an order that rotates, and the median of CPU time after a
warm-up is what counts: on a shared machine it moves far less than wall time, which is written down beside it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

__all__ = [
    "LAYERS12",
    "LAYERS22",
    "LAYERS22_NARROW",
    "LINEARS",
    "RANK",
    "SCALE",
    "Report",
    "Shape",
    "build",
    "machine",
    "measure",
    "peft_config",
    "random_lora",
    "twin",
]

OUT = Path(__file__).resolve().parent / "out"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 16
SCALE = 2.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama-shaped model with random weights."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: torch.dtype = torch.float32


LAYERS12 = Shape(name="12 layers, 110 M, fp32", layers=12, hidden=768, inner=2048, heads=12, kv_heads=12, vocab=32000)
LAYERS22 = Shape(
    name="22 layers, 1.1 B (TinyLlama), bf16",
    layers=22,
    hidden=2048,
    inner=5632,
    heads=32,
    kv_heads=4,
    vocab=32000,
    dtype=torch.bfloat16,
)
# A CPU without bf16 units needs half a minute for one forward pass of the above: its layers at a quarter of the width.
LAYERS22_NARROW = Shape(
    name="22 layers, quarter width, 73 M, fp32", layers=22, hidden=512, inner=1408, heads=8, kv_heads=1, vocab=32000
)


def build(shape: Shape, seed: int = 0) -> LlamaForCausalLM:
    """The model with random weights, filled in place: the library's own initialisation would take longer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=2048,
    )
    with _no_init():
        model = LlamaForCausalLM(config).to(shape.dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
            else:
                p.uniform_(-0.03, 0.03, generator=generator)
    return model


@contextlib.contextmanager
def _no_init() -> Iterator[None]:
    from transformers import initialization

    with initialization.no_init_weights():
        yield


def twin(model: nn.Module) -> Any:
    """Another module tree over the very same parameters, so that no contestant has warmer caches."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=int(RANK * SCALE), target_modules=list(LINEARS))


def random_lora(named: Iterator[tuple[str, nn.Parameter]], seed: int = 1) -> None:
    """Fill every low-rank tensor, so that a delta does something; the same numbers for the same order of tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in named:
            p.uniform_(-0.02, 0.02, generator=generator)


@dataclass(kw_only=True)
class Timing:
    """Milliseconds per call."""

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


def measure(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    after: Mapping[str, Callable[[Any], object]] | None = None,
) -> dict[str, Timing]:
    """Time the contestants in turns.

    Args:
        contestants: what to call, by name.
        repeats: measured rounds.
        warmup: rounds before them that do not count.
        after: what to do with a contestant's result outside the measured time, such as undoing it.
    """
    names = list(contestants)
    timings = {name: Timing() for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + repeats):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                wall, cpu = time.perf_counter(), time.process_time()
                result = contestants[name]()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                if after and name in after:
                    after[name](result)
                del result
                gc.collect(0)
                if turn >= warmup:
                    timings[name].cpu.append(cpu * 1e3)
                    timings[name].wall.append(wall * 1e3)
            gc.collect()
    finally:
        gc.enable()
    return timings


def machine() -> dict[str, object]:
    """What a reader must know to compare numbers."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(lines, f":{model}").split(":", 1)[1].strip()
    versions = {}
    for name in ("deltahub", "torch", "transformers", "peft", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
    }


@dataclass(kw_only=True)
class Report:
    """Rows of one benchmark, written as Markdown and as JSON."""

    name: str
    title: str
    note: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: str, timings: Mapping[str, Timing], *, base: str) -> None:
        """Add one row per contestant, with its ratio to ``base``."""
        for contestant, timing in timings.items():
            ratio = round(timing.over(timings[base]), 4)
            self.rows.append({"case": case, "contestant": contestant, **timing.to_dict(), f"over {base}": ratio})
        print("  " + case + ": " + ", ".join(f"{n} {t.median:.2f} ms" for n, t in timings.items()), flush=True)

    def goal(self, text: str, value: float, bound: float, *, at_least: bool) -> None:
        """Note whether a goal is met; a missed one is reported, not hidden."""
        met = value >= bound if at_least else value <= bound
        self.goals.append({"goal": text, "value": round(value, 4), "bound": bound, "met": met})
        print(f"  {'ok  ' if met else 'MISS'} {text}: {value:.3g} ({'≥' if at_least else '≤'} {bound})", flush=True)

    def markdown(self) -> str:
        facts = machine()
        lines = [f"## {self.title}", "", *([self.note, ""] if self.note else [])]
        for case in dict.fromkeys(row["case"] for row in self.rows):
            rows = [row for row in self.rows if row["case"] == case]
            base = next(key for key in rows[0] if key.startswith("over "))
            lines += [f"**{case}**", "", f"| | CPU ms | least | wall ms | {base} |", "|---|--:|--:|--:|--:|"]
            lines += [
                "| {contestant} | {cpu_ms:.2f} | {cpu_ms_min:.2f} | {wall_ms:.2f} |".format(**r) + f" {r[base]:.3f} |"
                for r in rows
            ]
            lines.append("")
        if self.goals:
            lines += ["| goal | measured | bound | met |", "|---|--:|--:|---|"]
            lines += [
                f"| {g['goal']} | {g['value']:.3g} | {g['bound']} | {'yes' if g['met'] else '**no**'} |"
                for g in self.goals
            ]
            lines.append("")
        lines.append(", ".join(f"{key} {value}" for key, value in facts.items()))
        return "\n".join(lines) + "\n"

    def write(self) -> list[Path]:
        """Write ``out/<name>.md`` and ``out/<name>.json``."""
        OUT.mkdir(exist_ok=True)
        document = {"name": self.name, "machine": machine(), "rows": self.rows, "goals": self.goals}
        paths = [OUT / f"{self.name}.md", OUT / f"{self.name}.json"]
        paths[0].write_text(self.markdown(), encoding="utf-8")
        paths[1].write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return paths


def names_of(model: nn.Module, suffixes: Sequence[str] = LINEARS) -> list[str]:
    """Paths of the modules whose last name is one of ``suffixes``."""
    return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes]
