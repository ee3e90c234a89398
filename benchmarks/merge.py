"""Merging a LoRA r=16 from disk to disk: ``converters.merge``, PEFT and mergekit; copying as the floor.

mergekit is run by the Python that ``MERGEKIT_PYTHON`` names, for it wants versions of its own.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import (
    LAYERS12,
    LAYERS22,
    LINEARS,
    RANK,
    SCALE,
    Report,
    Shape,
    Timing,
    build,
    measure,
    random_lora,
)

__all__ = ["peak", "run"]

COPY = "floor: copying the files"
ADD = "floor: the arithmetic, in blocks, in memory"
OURS, PEFT, MERGEKIT = "converters.merge", "PEFT: load, merge_and_unload, save", "mergekit, a process of its own"

_PEAK = """
import re, sys
import torch
from pathlib import Path
def peak():  # getrusage would count what the parent had when it forked
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
from deltahub.converters import merge
merge(sys.argv[1], sys.argv[2], backbone=sys.argv[3], verify="structure")
print(peak() - before)
"""


def _prepare(shape: Shape, folder: Path) -> None:
    """The backbone, and one delta as a package and as PEFT's adapter."""
    import deltahub
    from deltahub.converters import export_

    model = build(shape)
    model.save_pretrained(folder / "base")
    live = type(model).from_pretrained(folder / "base")
    delta = deltahub.attach(live, "lora", LINEARS, rank=RANK, scale=SCALE)
    random_lora(delta.named_parameters())
    delta.save(folder / "package", backbone=folder / "base")
    export_(folder / "package", folder / "adapter", to="peft")


def _copy(folder: Path) -> Path:
    """Copied as bytes, and on the disk when it is done, as a merge is."""
    made = Path(shutil.copytree(folder / "base", folder / "copy"))
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return made


def _peft(folder: Path) -> Path:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "theirs")
    return folder / "theirs"


def _ours(folder: Path) -> Path:
    from deltahub.converters import merge

    return merge(folder / "package", folder / "ours", backbone=folder / "base", verify="structure").folder


def _mergekit(folder: Path, repeats: int) -> Timing | None:
    """mergekit on the same files, its start included."""
    python = os.environ.get("MERGEKIT_PYTHON")
    if python is None:
        return None
    recipe = (
        f"merge_method: linear\nmodels:\n  - model: {folder}/base+{folder}/adapter\n    parameters: {{weight: 1}}\n"
    )
    (folder / "recipe.yaml").write_text(recipe + "dtype: bfloat16\n", encoding="utf-8")
    command = [python, "-m", "mergekit.scripts.run_yaml", "recipe.yaml", "theirs", "--no-copy-tokenizer"]
    timing = Timing()
    for _ in range(repeats):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([*command, "--lora-merge-cache", "cache"], cwd=folder, check=True, capture_output=True)
        timing.wall.append((time.perf_counter() - start) * 1e3)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        timing.cpu.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3)
        for made in ("theirs", "cache"):
            shutil.rmtree(folder / made)
    return timing


def peak(package: Path, out: Path, base: Path) -> float:
    """Megabytes that a merge takes at most, above an interpreter with torch, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(package), str(out), str(base)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    return float(done.stdout)


def _arithmetic(shape: Shape) -> object:
    """As many blocks as the merge has: up to float32, a low-rank product, down again."""
    sizes = {
        "q_proj": (shape.hidden, shape.hidden),
        "k_proj": (shape.hidden * shape.kv_heads // shape.heads, shape.hidden),
    }
    sizes |= {"v_proj": sizes["k_proj"], "o_proj": sizes["q_proj"]}
    sizes |= {"gate_proj": (shape.inner, shape.hidden), "up_proj": (shape.inner, shape.hidden)}
    sizes["down_proj"] = (shape.hidden, shape.inner)
    weights = {name: torch.zeros(size, dtype=shape.dtype) for name, size in sizes.items()}
    pairs = {name: (torch.ones(high, RANK), torch.ones(RANK, wide)) for name, (high, wide) in sizes.items()}

    def work() -> None:
        for _ in range(shape.layers):
            for name, weight in weights.items():
                up, down = pairs[name]
                for start in range(0, len(weight), 512):
                    block = weight[start : start + 512].float()
                    block.addmm_(up[start : start + 512], down, alpha=SCALE).to(shape.dtype)

    return work


def _case(report: Report, shape: Shape, *, repeats: int) -> None:
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-merge-") as home:
        folder = Path(home)
        _prepare(shape, folder)
        timings = measure(
            {
                COPY: lambda: _copy(folder),
                ADD: _arithmetic(shape),
                OURS: lambda: _ours(folder),
                PEFT: lambda: _peft(folder),
            },
            after=dict.fromkeys((COPY, OURS, PEFT), shutil.rmtree),
            repeats=repeats,
            warmup=1,
        )
        theirs = _mergekit(folder, repeats)
        report.add(shape.name, timings if theirs is None else timings | {MERGEKIT: theirs}, base=OURS)
        wall = {name: min(timing.wall) for name, timing in timings.items()}
        # What does not grow with the model (its layout, opening the package) drowns the smaller one.
        if shape is LAYERS22:
            floor = 1.5 * wall[COPY] + wall[ADD]
            report.goal(
                f"{shape.name}: wall over 1.5 copies and the arithmetic", wall[OURS] / floor, 1.0, at_least=False
            )
        found = peak(folder / "package", folder / "peak", folder / "base")
        report.goal(f"{shape.name}: peak MB above torch alone", found, 600.0, at_least=False)


def run(*, quick: bool) -> Report:
    """Measure; the larger model unless ``quick``."""
    report = Report(
        name="merge",
        title="Merging from disk to disk",
        note="The peak is of a process of its own, transformers' import for the layout of the model included.",
    )
    for shape in (LAYERS12,) if quick else (LAYERS12, LAYERS22):
        _case(report, shape, repeats=2 if quick else 3)
    return report
