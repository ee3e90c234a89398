"""The same tensors in the real LyCORIS 4.1 and in our kinds give the same numbers, live and merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from deltahub.attaching import attach_parts
from deltahub.sites import Part
from tests.kinds.peft_mappings import Entry, one, upper

lycoris = pytest.importorskip("lycoris")
pytestmark = pytest.mark.filterwarnings("ignore")

HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2), lambda: torch.randn(2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.randn(2, 6, 5, 5)),
}


def locon(m: Any) -> list[Entry]:
    up, down = m.lora_up.weight.flatten(1), m.lora_down.weight
    if m.tucker:
        return one(
            "locon", {"down": down.flatten(1), "core": m.lora_mid.weight, "up": up}, rank=len(down), scale=m.scale
        )
    if m.wd:
        axis = "out" if m.wd_on_out else "in"
        name = "magnitude" if m.wd_on_out else "magnitude_in"
        tensors = {"down": down, "up": up, name: m.dora_scale.flatten()}
        return one("dora", tensors, rank=len(down), scale=m.scale, axis=axis)
    return one("lora", {"down": down, "up": up}, rank=len(down), scale=m.scale)


def loha(m: Any) -> list[Entry]:
    tensors: dict[str, Tensor] = {}
    for i in (1, 2):
        a, b = getattr(m, f"hada_w{i}_a"), getattr(m, f"hada_w{i}_b")
        if m.tucker:
            tensors |= {f"up_{i}": a.T, f"core_{i}": getattr(m, f"hada_t{i}"), f"inner_{i}": b}
        else:
            tensors |= {f"up_{i}": a, f"down_{i}": b.reshape(-1, *m.shape[1:])}
    return one("loha", tensors, rank=m.lora_dim, scale=m.scale, tucker=m.tucker)


def lokr(m: Any) -> list[Entry]:
    tensors: dict[str, Tensor] = {}
    config = {"first": "whole", "second": "whole"}
    if m.use_w1:
        tensors["w1"] = m.lokr_w1
        rows, columns = m.lokr_w1.shape
    else:
        config["first"] = "low-rank"
        tensors |= {"w1_up": m.lokr_w1_a, "w1_down": m.lokr_w1_b}
        rows, columns = len(m.lokr_w1_a), m.lokr_w1_b.shape[1]
    kernel = m.shape[2:] if isinstance(m.shape[0], tuple) else ()
    if m.use_w2:
        tensors["w2"] = m.lokr_w2
    elif m.tucker:
        config["second"] = "tucker"
        tensors |= {"w2_up": m.lokr_w2_a.T, "w2_core": m.lokr_t2, "w2_inner": m.lokr_w2_b}
    else:
        config["second"] = "low-rank"
        inner = m.shape[1][1]
        tensors |= {"w2_up": m.lokr_w2_a, "w2_down": m.lokr_w2_b.reshape(-1, inner, *kernel)}
    return one("lokr", tensors, **config, rows=rows, columns=columns, rank=m.lora_dim, scale=m.scale)


def glora(m: Any) -> list[Entry]:
    tensors = {"a_up": m.a1.weight.flatten(1), "a_down": m.a2.weight.flatten(1)}
    tensors |= {"b_up": m.b1.weight.flatten(1), "b_down": m.b2.weight}
    return one("glora-lycoris", tensors, rank=m.lora_dim, scale=m.scale)


def diag_oft(m: Any) -> list[Entry]:
    r = m.oft_blocks
    tensors = {"rotation": -upper(r - r.mT)}  # it multiplies by the transposed rotation
    if m.rescaled:
        tensors["gain"] = m.rescale.flatten()
    return one("diag-oft", tensors, block=r.shape[-1], rescale=bool(m.rescaled))


def boft(m: Any) -> list[Entry]:
    r = m.oft_blocks
    half = r.shape[-1] // 2
    # Inside a block, its channels alternate between the two halves; ours come one half after the other.
    order = torch.arange(2 * half).reshape(half, 2).T.flatten()
    r = r[:, :, order][..., order]
    gain = m.rescale.flatten() if m.rescaled else torch.ones(r.shape[1] * r.shape[2])
    config = {"block": 2 * half, "factors": len(r), "side": "out"}
    return one("boft", {"rotation_out": upper(r - r.mT), "gain": gain}, **config)


def full(m: Any) -> list[Entry]:
    saved = m.custom_state_dict()
    return one("diff", {"weight": saved["diff"], "bias": saved["diff_b"]})


def ia3(m: Any) -> list[Entry]:
    """It multiplies the weight and leaves the bias alone: a rotation by nothing, and a gain."""
    gain = 1 + m.weight.flatten()
    if m.train_input:
        return one("ia3", {"gain_in": gain}, axis="in")
    out = len(gain)
    return one("diag-oft", {"rotation": torch.zeros(out // 2, 1), "gain": gain}, block=2, rescale=True)


def module(name: str) -> Callable[..., Any]:
    def make(host: nn.Module, **options: Any) -> Any:
        from lycoris import modules

        return getattr(modules, name)("it", host, 1.0, 2, 3, **options)

    return make


CASES: list[tuple[str, str, dict[str, Any], Callable[[Any], list[Entry]]]] = [
    *(("LoConModule", host, {}, locon) for host in HOSTS),
    ("LoConModule", "conv2d", {"use_tucker": True}, locon),
    ("LoConModule", "linear", {"weight_decompose": True}, locon),
    ("LoConModule", "conv2d", {"weight_decompose": True}, locon),
    ("LoConModule", "linear", {"weight_decompose": True, "wd_on_out": False}, locon),
    ("LoConModule", "linear", {"rs_lora": True}, locon),
    *(("LohaModule", host, {}, loha) for host in HOSTS),
    ("LohaModule", "conv2d", {"use_tucker": True}, loha),
    *(("LokrModule", host, {}, lokr) for host in HOSTS),
    ("LokrModule", "linear", {"full_matrix": True}, lokr),
    ("LokrModule", "linear", {"decompose_both": True, "factor": 4}, lokr),
    ("LokrModule", "conv2d", {"use_tucker": True, "factor": 2}, lokr),
    *(("GLoRAModule", host, {}, glora) for host in HOSTS),
    *(("DiagOFTModule", host, {"rescaled": r}, diag_oft) for host in HOSTS for r in (False, True)),
    ("ButterflyOFTModule", "linear", {}, boft),
    ("ButterflyOFTModule", "linear", {"rescaled": True}, boft),
    *(("FullModule", host, {}, full) for host in HOSTS),
    *(("IA3Module", host, {}, ia3) for host in HOSTS),
    ("IA3Module", "linear", {"train_on_input": True}, ia3),
]


@pytest.mark.parametrize(
    ("name", "host", "options", "entries"),
    [pytest.param(*c, id=f"{c[0]}-{c[1]}-{','.join(c[2])}") for c in CASES],
)
def test_same_tensors_same_numbers(
    name: str, host: str, options: dict[str, Any], entries: Callable[[Any], list[Entry]]
) -> None:
    torch.manual_seed(0)
    make, inputs = HOSTS[host]
    ours = nn.Sequential(make()).eval()
    bare = copy.deepcopy(ours)
    theirs = copy.deepcopy(ours)
    layer = module(name)(theirs[0], **options).eval()
    layer.apply_to()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        parts = []
        for i, (kind_name, config, tensors) in enumerate(entries(layer)):
            kind = kinds.get(kind_name)
            held = {n: t.detach().clone() for n, t in tensors.items()}
            checked = kind.check_config({n: float(v) if n == "scale" else v for n, v in config.items()})
            parts.append(Part(name=f"p{i}", kind=kind, config=checked, paths=["0"], tensors={"0": held}))
        delta = attach_parts(ours, "it", parts)
        x = inputs()
        expected = theirs(x)
        size = max(1.0, float(expected.abs().max()))
        assert (expected - bare(x)).abs().max() > 1e-2, "the adapter does nothing"
        assert (ours(x) - expected).abs().max() <= 1e-5 * size
        delta.merge()
        assert (ours(x) - expected).abs().max() <= 1e-5 * size
    assert deltahub.deltas(ours)
