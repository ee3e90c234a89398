"""Merging a LoRA r=16 into a synthetic sharded checkpoint of 20 GB that is never held: time, and memory at its peak."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import LINEARS, RANK, SCALE, Report, Shape, Timing
from benchmarks.merge import OURS, peak

__all__ = ["run"]

WIDE = Shape(
    name="41 layers, 10.0 B, bf16",
    layers=41,
    hidden=4096,
    inner=14336,
    heads=32,
    kv_heads=8,
    vocab=128256,
    dtype=torch.bfloat16,
)
_NARROW = Shape(
    name="4 layers, 64 M, bf16",
    layers=4,
    hidden=512,
    inner=2048,
    heads=8,
    kv_heads=2,
    vocab=32000,
    dtype=torch.bfloat16,
)
_SHARD = 1 << 30


def _sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's linear maps."""
    keys = shape.hidden * shape.kv_heads // shape.heads
    attention = {"q_proj": shape.hidden, "k_proj": keys, "v_proj": keys, "o_proj": shape.hidden}
    found = {f"self_attn.{name}": (size, shape.hidden) for name, size in attention.items()}
    found |= {f"mlp.{name}": (shape.inner, shape.hidden) for name in ("gate_proj", "up_proj")}
    return found | {"mlp.down_proj": (shape.hidden, shape.inner)}


def _base(shape: Shape, folder: Path) -> None:
    """The checkpoint, a file at a time: random words whose exponents are those of weights."""
    from deltahub.tensors import write

    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        sizes |= {f"model.layers.{layer}.{name}.weight": size for name, size in _sizes(shape).items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        sizes |= {f"model.layers.{layer}.{name}.weight": (shape.hidden,) for name in norms}
    sizes |= {"model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocab, shape.hidden)}
    files: list[dict[str, tuple[int, ...]]] = [{}]
    room = _SHARD
    for name, size in sizes.items():
        needed = 2 * torch.Size(size).numel()
        if files[-1] and needed > room:
            files.append({})
            room = _SHARD
        files[-1][name] = size
        room -= needed
    folder.mkdir()
    generator, index = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        made = {
            name: torch.randint(0x3C00, 0x3D00, size, dtype=torch.int16, generator=generator).view(torch.bfloat16)
            for name, size in names.items()
        }
        write(folder / file, made, metadata={"format": "pt"})
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"hidden_size": shape.hidden, "intermediate_size": shape.inner, "vocab_size": shape.vocab}
    config |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    config |= {"num_key_value_heads": shape.kv_heads, "tie_word_embeddings": False, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _package(shape: Shape, base: Path, out: Path) -> None:
    from deltahub.identity import describe
    from deltahub.package import write

    targets, tensors = [], {}
    for name, (high, wide) in _sizes(shape).items():
        targets.append(f"model.layers.{{0..{shape.layers - 1}}}.{name}")
        for layer in range(shape.layers):
            site = f"lora/model.layers.{layer}.{name}"
            tensors[f"{site}/down"] = torch.full((RANK, wide), 0.01)
            tensors[f"{site}/up"] = torch.full((high, RANK), 0.01)
    assert {name.rpartition(".")[2] for name in _sizes(shape)} == set(LINEARS)
    modules = [
        {"name": "lora", "kind": "lora", "version": 1, "config": {"rank": RANK, "scale": SCALE}, "targets": targets}
    ]
    section: dict[str, Any] = {"source": {"class": "transformers.LlamaForCausalLM"}, **describe(base, touched=())}
    write(out, {"backbone": section, "modules": modules}, tensors)


def run(*, quick: bool) -> Report:
    """Measure once; a small model where ``quick``. The larger one needs 45 GB of disk for a while."""
    shape = _NARROW if quick else WIDE
    report = Report(
        name="merge_large",
        title="Merging into a checkpoint that does not fit into memory",
        note="One process; the peak is above torch alone, transformers' import for the layout of the model included.",
    )
    with tempfile.TemporaryDirectory(prefix="deltahub-bench-large-") as home:
        folder = Path(home)
        if not quick and shutil.disk_usage(folder).free < 45e9:
            raise SystemExit("this benchmark needs 45 GB of disk")
        _base(shape, folder / "base")
        _package(shape, folder / "base", folder / "package")
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        start = time.perf_counter()
        found = peak(folder / "package", folder / "out", folder / "base")
        seconds = time.perf_counter() - start
        shutil.rmtree(folder / "out")
        start = time.perf_counter()
        shutil.copytree(folder / "base", folder / "copy")
        copied = time.perf_counter() - start
    case = f"{shape.name}: {size / 1e9:.1f} GB"
    timings = {OURS: seconds, "floor: copying the files": copied}
    report.add(case, {n: Timing(cpu=[s * 1e3], wall=[s * 1e3]) for n, s in timings.items()}, base=OURS)
    report.goal(f"{case}: peak MB above torch alone", found, 600.0, at_least=False)
    return report
