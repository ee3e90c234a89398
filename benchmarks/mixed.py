"""A batch whose rows carry different deltas: eight LoRAs in a batch of eight, beside a single one."""

from __future__ import annotations

import torch

import deltahub
from benchmarks.harness import LAYERS12, LINEARS, RANK, SCALE, Report, build, measure, peft_config, random_lora, twin

__all__ = ["run"]

ROWS = 8
BARE, SINGLE, MIXED = "bare", "deltahub, one for all rows", "deltahub, eight in a batch"
PEFT_SINGLE, PEFT_MIXED = "peft, one for all rows", "peft, adapter_names"


def run(*, quick: bool = False) -> Report:
    from peft import get_peft_model

    report = Report(
        name="mixed",
        title="Eight LoRAs (r=16, all linear layers) in a batch of eight rows",
        note="No cache, no gradients, the same weights and the same LoRAs on both sides; outputs are compared first.",
    )
    shape, names = LAYERS12, [f"d{i}" for i in range(ROWS)]
    bare = build(shape)
    ours = twin(bare)
    theirs = get_peft_model(twin(bare), peft_config(), adapter_name=names[0]).eval()
    for name in names[1:]:
        theirs.add_adapter(name, peft_config())
    random_lora((n, p) for n, p in theirs.named_parameters() if "lora_" in n)
    given = dict(theirs.named_parameters())
    for name in names:
        delta = deltahub.attach(ours, "lora", LINEARS, name=name, rank=RANK, scale=SCALE)
        delta.disable()
        with torch.no_grad():
            for key, p in delta.named_parameters():
                _, path, tensor = key.split("/")
                side = {"down": "lora_A", "up": "lora_B"}[tensor]
                p.copy_(given[f"base_model.model.{path}.{side}.{name}.weight"])
    for tokens, repeats in {1: 15 if quick else 31, 32: 3 if quick else 7, **({} if quick else {128: 5})}.items():
        ids = torch.randint(0, shape.vocab, (ROWS, tokens), generator=torch.Generator().manual_seed(0))

        def single(ids: torch.Tensor = ids) -> torch.Tensor:
            with deltahub.using(ours, names[0]):
                return ours(input_ids=ids, use_cache=False).logits

        def mixed(ids: torch.Tensor = ids) -> torch.Tensor:
            with deltahub.using(ours, names):
                return ours(input_ids=ids, use_cache=False).logits

        def peft_mixed(ids: torch.Tensor = ids) -> torch.Tensor:
            return theirs(input_ids=ids, use_cache=False, adapter_names=names).logits

        theirs.set_adapter(names[0])
        with torch.no_grad():
            torch.testing.assert_close(mixed(), peft_mixed(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mixed()[:1], single()[:1], rtol=1e-4, atol=1e-4)
            timings = measure(
                {
                    BARE: lambda ids=ids: bare(input_ids=ids, use_cache=False) and None,
                    SINGLE: lambda: single() is None,
                    MIXED: lambda: mixed() is None,
                    PEFT_SINGLE: lambda ids=ids: theirs(input_ids=ids, use_cache=False) and None,
                    PEFT_MIXED: lambda: peft_mixed() is None,
                },
                repeats=repeats,
            )
        case = f"{shape.name}, {ROWS}×{tokens}"
        report.add(case, timings, base=SINGLE)
        medians = {name: timing.median for name, timing in timings.items()}
        report.goal(f"{case}: eight over one", medians[MIXED] / medians[SINGLE], 1.15, at_least=False)
        report.goal(f"{case}: eight, ours over peft's", medians[MIXED] / medians[PEFT_MIXED], 1.0, at_least=False)
    return report
