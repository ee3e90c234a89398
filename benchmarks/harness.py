"""What all benchmarks share: Llama-shaped models, a fair stopwatch, the report.

Contestants take turns in one process on one thread, in an order that rotates, and the median of CPU time after a
warm-up is what counts: on a shared machine it moves far less than wall time, which is written down beside it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltahub.benching.report import Report as _Report
from deltahub.benching.stopwatch import Timing, machine

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
    "Timing",
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


class Report(_Report):
    """A report that is written into ``benchmarks/out``, and prints as it goes."""

    def __post_init__(self) -> None:
        self.tell = lambda text: print("  " + text, flush=True)

    def write(self) -> list[Path]:
        """Write ``out/<name>.md`` and ``out/<name>.json``."""
        return self.write_to(OUT)


def names_of(model: nn.Module, suffixes: Sequence[str] = LINEARS) -> list[str]:
    """Paths of the modules whose last name is one of ``suffixes``."""
    return [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes]
