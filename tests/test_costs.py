"""The figures that the benchmark prints: the paper's table to its last digit, and whole models against a counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs
from deltahub import presets
from tests.diffusion import inputs_of, unet


def test_the_papers_table_to_every_printed_digit() -> None:
    found = costs.table1()
    for name, (attention, block) in costs.PAPER.items():
        assert f"{found[name][0]:.2f}" == f"{attention:.2f}"
        assert f"{found[name][1]:.2f}" == f"{block:.2f}"
    assert [f"{ratio:.0f}" for _, _, ratio in found.values()] == ["18", "57", "464", "6929"]


def test_every_site_of_a_preset_is_counted() -> None:
    for name, sites in costs.MODELS.items():
        assert {s.part for s in sites} == {part.name for part in presets.get(name).parts}
    assert [sum(s.count for s in sites) for sites in costs.MODELS.values()] == [16, 70, 28]


def operations(model: Any, inputs: Any) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_a_whole_model_costs_what_the_formulas_say() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = unet()
    model.set_attn_processor(AttnProcessor())  # products that a counter sees; it counts no fused attention on a CPU
    inputs = inputs_of(model, 16, 24, batch=1)
    before = operations(model, inputs)
    delta = presets.attach_preset(model, "paper-table1", kernel=5)
    saved = 0.0
    for module, site in delta.parts[0].sites:
        width = module.to_q.in_features
        tokens = 16 * 24 if width == 32 else 8 * 12
        pyramid = sum(-(-h // d) * -(-w // d) for d in (1, 2, 3, 6) for h, w in [(16, 24) if width == 32 else (8, 12)])
        windows = 2 * (width // 2) * 25
        block = tokens * (2 * width * (width // 2) + 2 * width * width) + windows * pyramid + 2 * width**2
        saved += costs.self_attention(tokens, width) - block
        assert site.path.endswith("attn1")
    assert before - operations(model, inputs) == saved
