"""Self-attention, LinFusion's form and ΔConv side by side: the paper's table, whole models, measured latency."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import costs
from benchmarks.harness import OUT, Report, Timing, measure
from deltahub import kinds, presets
from deltahub.kinds.host_shape import HostShape
from deltahub.recipes.plot import loglog

__all__ = ["counted", "layer", "run"]

WIDTH, HEADS = 320, 8
ATTENTION, LINEAR = "self-attention (SDPA)", "LinFusion's form"
GOALS = {64: 15.0, 128: 60.0}
KERNELS = (7, 9, 11, 13)


class _Map:
    """A host that knows its grid."""

    def __init__(self, side: int) -> None:
        self.side = side

    def deltahub_context(self, name: str) -> tuple[int, int]:
        return self.side, self.side


def layer(kind: str, side: int, *, width: int = WIDTH, like: Tensor, **config: Any) -> Callable[[Tensor], Tensor]:
    """One replacement with random tensors, as a function of the tokens."""
    shape = HostShape(family="block", d_in=width, d_out=width)
    found = kinds.get(kind)
    specs = found.tensors(config, shape)
    generator = torch.Generator().manual_seed(0)
    tensors = [found.init(s, generator, dtype=like.dtype, device=like.device) for s in specs.values()]
    fn, host = found.compile(config, shape)["replace"].fn, _Map(side)
    return lambda x: fn(host, x, *tensors)


def attention(like: Tensor, *, width: int = WIDTH, math: bool = False) -> nn.Module:
    """The layer of diffusers that is replaced."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    torch.manual_seed(0)
    made = Attention(query_dim=width, heads=HEADS, dim_head=width // HEADS)
    made.set_processor(AttnProcessor() if math else AttnProcessor2_0())
    return made.to(like.device, like.dtype).eval()


def counted(call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Operations of matrix products and convolutions, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call(x)
    return counter.get_total_flops()


def check_formulas() -> list[str]:
    """The formulas against torch's counter, with attention as plain products: fused, it is not counted on a CPU."""
    lines = ["| layer, 320 channels, 24×24 | formula | counter |", "|---|--:|--:|"]
    side, x = 24, torch.randn(1, 24 * 24, WIDTH)
    pairs: dict[str, tuple[float, int]] = {
        "self-attention": (costs.self_attention(side**2, WIDTH), counted(attention(x, math=True), x)),
        LINEAR: (
            costs.linear_attention(side**2, WIDTH, HEADS),
            counted(layer("linear-attention", side, like=x, heads=HEADS, middle=WIDTH), x),
        ),
    }
    for kernel, divisors in ((11, (1, 2)), (13, (1, 2, 3, 6))):
        config = {f"divisor_{i + 1}": d for i, d in enumerate(divisors)}
        call = layer("delta-conv", side, like=x, kernel=kernel, stages=len(divisors), **config)
        pairs[f"ΔConv K={kernel}, {len(divisors)} stages"] = (
            costs.delta_conv(side**2, WIDTH, kernel, divisors),
            counted(call, x),
        )
    for name, (formula, counter) in pairs.items():
        if round(formula) != counter:
            raise AssertionError(f"{name}: the formula says {formula}, the counter {counter}")
        lines.append(f"| {name} | {formula:.0f} | {counter} |")
    return lines


def paper_table() -> list[str]:
    lines = [
        "**The paper's Table 1, by formula.** One 320-channel layer at an eighth of the image's side, batch 2.",
        "6929× is this one layer at 15360×8640; the ratio grows with the number of tokens and is no property of a",
        "model. The block is the one with four stages (1, ½, ⅓, ⅙), which was never released.",
        "",
        "| image | self-attention GF | paper | ΔConv GF | paper | ratio |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (a, b, ratio) in costs.table1().items():
        paper = costs.PAPER[name]
        if (f"{a:.2f}", f"{b:.2f}") != (f"{paper[0]:.2f}", f"{paper[1]:.2f}"):
            raise AssertionError(f"{name}: {a:.2f} and {b:.2f}, where the paper prints {paper}")
        lines.append(f"| {name} | {a:.2f} | {paper[0]:.2f} | {b:.2f} | {paper[1]:.2f} | {ratio:.0f}× |")
    return lines


def model_table() -> list[str]:
    lines = [
        "**All self-attentions of a model, by formula.** Per image, without guidance; the released blocks.",
        "",
        "| preset | image | self-attention GF | LinFusion's form | ΔConv | ratio | ΔConv over LinFusion |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for preset in costs.MODELS:
        kernels = {part.name: int(part.config["kernel"]) for part in presets.get(preset).parts}  # type: ignore[call-overload]
        for side in (512, 1024, 2048, 4096):
            a, linear, b = (v / 1e9 for v in costs.whole_model(preset, kernels, side, side))
            lines.append(
                f"| {preset} | {side}² | {a:.1f} | {linear:.1f} | {b:.1f} | {a / b:.1f}× | {linear / b:.2f}× |"
            )
    return lines


def _contestants(side: int, like: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {ATTENTION: attention(like)}
    found[LINEAR] = layer("linear-attention", side, like=like, heads=HEADS, middle=WIDTH)
    for kernel in KERNELS:
        found[f"ΔConv K={kernel}"] = layer("delta-conv", side, like=like, kernel=kernel)
    return found


def _on_cpu(report: Report, sides: Mapping[int, int]) -> None:
    for side, repeats in sides.items():
        x = torch.randn(1, side * side, WIDTH)
        calls = _contestants(side, x)
        with torch.no_grad():
            timings = measure({n: functools.partial(_done, c, x) for n, c in calls.items()}, repeats=repeats)
        report.add(f"latent {side}×{side}, 320 channels, fp32, one thread", timings, base=ATTENTION)
        _goal(report, side, timings)


def _done(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    call(x)


def _goal(report: Report, side: int, timings: Mapping[str, Timing]) -> None:
    if side in GOALS:
        fastest = timings["ΔConv K=11"].over(timings[ATTENTION])
        text = f"latent {side}×{side}: times faster than self-attention, K=11"
        report.goal(text, 1 / fastest, GOALS[side], at_least=True)


def _on_gpu(report: Report, sides: Mapping[int, int]) -> None:
    """The same in fp16 with fused attention; wall time between synchronisations."""
    for side, repeats in sides.items():
        x = torch.randn(2, side * side, WIDTH, device="cuda", dtype=torch.float16)
        timings: dict[str, Timing] = {}
        for name, call in _contestants(side, x).items():
            timing = timings[name] = Timing()
            with torch.no_grad():
                for turn in range(repeats + 3):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    call(x)
                    torch.cuda.synchronize()
                    if turn >= 3:
                        timing.wall.append((time.perf_counter() - start) * 1e3)
            timing.cpu = timing.wall
        report.add(f"GPU, image {8 * side}×{8 * side}, 320 channels, fp16, batch 2", timings, base=ATTENTION)


def _plot() -> None:
    sides = [256 * 2**i for i in range(8)]
    curves = {
        "self-attention": [(s, costs.self_attention((s // 8) ** 2, WIDTH) / 1e9) for s in sides],
        LINEAR: [(s, costs.linear_attention((s // 8) ** 2, WIDTH, HEADS) / 1e9) for s in sides],
        "ΔConv, released, K=11": [(s, costs.delta_conv((s // 8) ** 2, WIDTH, 11) / 1e9) for s in sides],
    }
    title = "One 320-channel layer: cost over resolution"
    loglog(OUT / "delta_conv.png", curves, title=title, x="side of the image, pixels", y="GFLOP")


def run(*, quick: bool = False) -> Report:
    tables = [paper_table(), check_formulas(), model_table()]
    gpu = torch.cuda.is_available()
    where = "" if gpu else "No GPU here: its part (fp16, fused attention, images of 512² to 4096²) did not run."
    report = Report(
        name="delta_conv",
        title="Self-attention, LinFusion's form and ΔConv",
        note="\n\n".join([*("\n".join(lines) for lines in tables), "![cost over resolution](delta_conv.png)", where]),
    )
    _plot()
    _on_cpu(report, {64: 3} if quick else {64: 5, 128: 2})
    if gpu:
        _on_gpu(report, {64: 20, 128: 20, 256: 5} if quick else {64: 50, 128: 20, 256: 10, 512: 3})
    return report
