"""A forward pass: the bare backbone, an unmerged LoRA r=16 on all linear layers in both libraries, a merged one."""

from __future__ import annotations

from collections.abc import Callable

import torch

import deltahub
from benchmarks.harness import (
    LAYERS12,
    LAYERS22_NARROW,
    LINEARS,
    RANK,
    SCALE,
    Report,
    Shape,
    build,
    measure,
    peft_config,
    random_lora,
    twin,
)

__all__ = ["run"]

BARE, LIVE, PEFT, MERGED = "bare", "deltahub, unmerged", "peft, unmerged", "deltahub, merged"


def _models(shape: Shape) -> dict[str, torch.nn.Module]:
    from peft import get_peft_model

    bare = build(shape)
    live, merged = twin(bare), build(shape)
    theirs = get_peft_model(twin(bare), peft_config()).eval()
    random_lora((n, p) for n, p in theirs.named_parameters() if "lora_" in n)
    given = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    for model in (live, merged):
        delta = deltahub.attach(model, "lora", LINEARS, name="a", rank=RANK, scale=SCALE)
        with torch.no_grad():
            for name, p in delta.named_parameters():
                _, path, tensor = name.split("/")
                side = {"down": "lora_A", "up": "lora_B"}[tensor]
                p.copy_(given[f"base_model.model.{path}.{side}.default.weight"])
        model.eval()
    deltahub.deltas(merged)["a"].merge()
    return {BARE: bare, LIVE: live, PEFT: theirs, MERGED: merged}


def _pass(model: torch.nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    return lambda: model(input_ids=ids, use_cache=False)


def _case(report: Report, shape: Shape, sizes: dict[tuple[int, int], int]) -> None:
    models = _models(shape)
    generator = torch.Generator().manual_seed(0)
    for (rows, tokens), repeats in sizes.items():
        ids = torch.randint(0, shape.vocab, (rows, tokens), generator=generator)
        with torch.no_grad():
            outputs = {name: model(input_ids=ids, use_cache=False).logits for name, model in models.items()}
            for name in (PEFT, MERGED):
                torch.testing.assert_close(outputs[LIVE], outputs[name], rtol=1e-4, atol=1e-4)
            assert not torch.equal(outputs[LIVE], outputs[BARE])
            del outputs
            timings = measure({name: _pass(model, ids) for name, model in models.items()}, repeats=repeats)
        case = f"{shape.name}, {rows}×{tokens}"
        report.add(case, timings, base=BARE)
        live, merged = timings[LIVE].over(timings[PEFT]), timings[MERGED].over(timings[BARE])
        report.goal(f"{case}: unmerged, ours over peft's", live, 1.0, at_least=False)
        report.goal(f"{case}: merged over bare", merged, 1.02, at_least=False)


def run(*, quick: bool = False) -> Report:
    report = Report(
        name="forward",
        title="A forward pass, LoRA r=16 on all linear layers",
        note="No cache, no gradients, the same weights and the same LoRA on both sides; outputs are compared first.",
    )
    if quick:
        _case(report, LAYERS12, {(1, 1): 15, (1, 128): 5})
        return report
    _case(report, LAYERS12, {(1, 1): 41, (1, 128): 11, (8, 128): 5})
    _case(report, LAYERS22_NARROW, {(1, 1): 41, (1, 128): 11, (8, 128): 5})
    return report
