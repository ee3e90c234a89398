"""Under ``torch.compile``: a forward pass, and exchanging deltas without compiling again."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import deltahub
from benchmarks.harness import LAYERS12, LINEARS, RANK, SCALE, Report, build, measure, peft_config, random_lora

__all__ = ["run"]

SMALL = replace(LAYERS12, name="4 layers of the 110 M model, fp32", layers=4)
OURS, PEFT, BARE = "deltahub, exchanged", "peft.hotswap_adapter", "bare"


def run(*, quick: bool = False) -> Report:
    from peft import get_peft_model
    from peft.utils.hotswap import hotswap_adapter

    report = Report(
        name="compiled",
        title="Under torch.compile",
        note="`Delta.swap` exchanges the tensors of two resident deltas; peft's hot-swap reads the other one from "
        "disk, for it keeps none resident that could be exchanged.",
    )
    ours, theirs, bare = build(SMALL), build(SMALL), build(SMALL)
    resident = [2, 8] if quick else [2, 8, 100]
    deltahub.attach(ours, "lora", LINEARS, name="d0", rank=RANK, scale=SCALE)
    live = get_peft_model(theirs, peft_config()).eval()
    random_lora((n, p) for n, p in live.named_parameters() if "lora_" in n)
    ids = torch.randint(0, SMALL.vocab, (1, 16), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        live.save_pretrained(place)
        models = {BARE: torch.compile(bare), "deltahub, live": torch.compile(ours), "peft, live": torch.compile(live)}
        timings = measure(
            {n: lambda m=m: m(input_ids=ids, use_cache=False) and None for n, m in models.items()},  # type: ignore[misc]
            repeats=11 if quick else 31,
            warmup=3,
        )
        report.add(f"{SMALL.name}, 1×16, a compiled forward pass", timings, base=BARE)
        ratio = timings["deltahub, live"].over(timings["peft, live"])
        report.goal("compiled forward, ours over peft's", ratio, 1.0, at_least=False)
        count, times = 1, {}
        graphs = counters["stats"]["unique_graphs"]
        for wanted in resident:
            for i in range(count, wanted):
                delta = deltahub.attach(ours, "lora", LINEARS, name=f"d{i}", rank=RANK, scale=SCALE).disable()
                random_lora(delta.named_parameters(), seed=i)
            count = wanted
            handles = deltahub.deltas(ours)
            turn = iter(range(1, 100_000))

            def swap(handles: object = handles, wanted: int = wanted, turn: object = turn) -> None:
                other = 1 + next(turn) % (wanted - 1) if wanted > 2 else 1  # type: ignore[call-overload]
                handles["d0"].swap(handles[f"d{other}"])  # type: ignore[index]

            times = measure({OURS: swap, PEFT: lambda: hotswap_adapter(live, str(Path(place)), "default")}, repeats=7)
            report.add(f"exchanging, {wanted} resident", times, base=OURS)
            models["deltahub, live"](input_ids=ids, use_cache=False)
        again = counters["stats"]["unique_graphs"] - graphs
        report.goal("graphs compiled for all these exchanges", again, 0, at_least=False)
        report.goal("exchange: times faster than hotswap_adapter", times[PEFT].over(times[OURS]), 10, at_least=True)
    return report
