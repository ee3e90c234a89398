"""Compiled equations: shared, bounded, and at home with every transform of torch."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.errors import KindError
from deltahub.kinds import HostShape, Kind, Port, Registry, get
from tests.kinds.hosts_in_numpy import HOSTS

LINEAR = HostShape(family="linear", d_in=6, d_out=8, bias=True)
BLOCK = HostShape(family="block", d_in=6, d_out=6)
CONV = HostShape(family="conv", d_in=3, d_out=8, kernel=(3, 3), spatial=2, channels_first=True)


def kind(**parts: Any) -> Kind:
    document = {"kind": "com.example.k", "version": 1, "hosts": ["linear", "conv", "norm", "block"], **parts}
    return Registry([document]).get("com.example.k")


def lora(**config: object) -> Port:
    return get("lora").compile({"rank": 2, "scale": 2.0, **config}, LINEAR)["output"]


class Layer(nn.Module):
    """A linear layer with a live LoRA, as a site would call it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.down = nn.Parameter(torch.randn(2, 6))
        self.up = nn.Parameter(torch.randn(8, 2))
        self.port = lora()

    def forward(self, x: Tensor) -> Tensor:
        return self.port.fn(self, x, self.inner(x), self.down, self.up)


def test_the_hot_path_is_two_products_and_one_sum() -> None:
    targets = [n.target for n in lora().graph.nodes if n.op == "call_function"]
    assert targets == [F.linear, F.linear, torch.add]
    assert lora().uses == {"x", "y"}
    assert (
        len([n for n in get("lora").compile({"rank": 2}, LINEAR)["weight"].graph.nodes if n.op == "call_function"]) == 1
    )


def test_sites_that_do_not_differ_share_a_function() -> None:
    first = get("lora").compile({"rank": 2, "scale": 2.0}, LINEAR)
    assert get("lora").compile({"scale": 2.0, "rank": 2}, LINEAR) is first
    wider = HostShape(family="linear", d_in=60, d_out=80, bias=False)
    other = get("lora").compile({"rank": 16, "scale": 2.0}, wider)
    assert other["output"].fn.__self__ is first["output"].fn.__self__
    assert other["weight"].fn.__self__ is first["weight"].fn.__self__
    assert lora(scale=3.0).fn.__self__ is not first["output"].fn.__self__
    again = Registry([{**kind(equations={"output": "2 * y"}).document.source}]).get("com.example.k")
    same = kind(equations={"output": "2 * y"})
    assert again.compile({}, LINEAR) is same.compile({}, LINEAR)


def test_compiling_again_costs_microseconds() -> None:
    lora()
    start = time.process_time()
    for _ in range(1000):
        lora()
    assert time.process_time() - start < 1


def test_ports_pickle_as_data_and_copy_as_themselves() -> None:
    port = lora()
    assert copy.deepcopy(port) is port
    assert copy.copy(port) is port
    assert pickle.loads(pickle.dumps(port)).fn.__self__ is port.fn.__self__
    assert b"forward" not in pickle.dumps(port)
    layer, x = Layer(), torch.randn(3, 6)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert copy.deepcopy(get("lora")) is get("lora")
    assert pickle.loads(pickle.dumps(get("lora"))) == get("lora")


def test_a_pickled_port_of_an_own_kind_runs_where_nobody_knows_it(tmp_path: Path) -> None:
    own = kind(tensors={"gate": {"shape": ["out"]}}, equations={"output": "y * (1 + channel(gate))"})
    (tmp_path / "port").write_bytes(pickle.dumps(own.compile({}, LINEAR)["output"]))
    code = """
import pickle, sys, torch
port = pickle.loads(open(sys.argv[1], "rb").read())
assert torch.equal(port.fn(None, None, torch.ones(2, 8), torch.ones(8)), torch.full((2, 8), 2.0))
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "port"], check=True, cwd=Path(__file__).parents[2])


def test_transforms() -> None:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(4, 5, 6)
    expected = layer(x)
    by_hand = layer.inner(x) + 2.0 * F.linear(F.linear(x, layer.down), layer.up)
    torch.testing.assert_close(expected, by_hand)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}})
    assert torch.equal(exported.module()(x[:3]), expected[:3])
    down, up = torch.randn(4, 2, 6), torch.randn(4, 8, 2)
    y = layer.inner(x)
    rows = torch.vmap(lambda *args: layer.port.fn(None, *args))(x, y, down, up)
    for i in range(4):
        torch.testing.assert_close(rows[i], layer.port.fn(None, x[i], y[i], down[i], up[i]))
    gradient = torch.func.grad(lambda d: layer.port.fn(None, x, y, d, layer.up).sum())(layer.down.detach())
    expected.sum().backward()
    torch.testing.assert_close(gradient, layer.down.grad)


def test_bfloat16() -> None:
    torch.manual_seed(0)
    layer, x = Layer().to(torch.bfloat16), torch.randn(4, 6, dtype=torch.bfloat16)
    value = layer(x)
    assert value.dtype == torch.bfloat16
    exact = Layer()
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(value.float(), exact(x.float()), rtol=2e-2, atol=2e-2)
    made = {n: torch.randn(s.shape).bfloat16() for n, s in get("lora").tensors({"rank": 2}, LINEAR).items()}
    W = torch.randn(8, 6).bfloat16()
    merged = get("lora").compile({"rank": 2}, LINEAR)["weight"].fn(None, W, None, *made.values())
    assert merged.dtype == torch.bfloat16


def test_einops_goes_through_compile_and_export() -> None:
    expr = """
h = rearrange(y, '... (g c) -> ... g c', g=2)
rearrange(einsum(h, mix, '... g c, g k -> ... k c'), '... k c -> ... (k c)')
"""
    own = kind(tensors={"mix": {"shape": [2, 2]}}, equations={"output": expr})
    port = own.compile({}, LINEAR)["output"]

    class Module(nn.Module):
        def forward(self, y: Tensor, mix: Tensor) -> Tensor:
            return port.fn(None, None, y, mix)

    y, mix = torch.randn(3, 8), torch.randn(2, 2)
    expected = Module()(y, mix)
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="eager")(y, mix), expected)
    assert torch.equal(torch.export.export(Module(), (y, mix)).module()(y, mix), expected)
    torch.testing.assert_close(torch.vmap(port.fn, (None, None, 0, None))(None, None, y, mix), expected)


def test_default_dtype_and_device_do_not_matter_when_compiling() -> None:
    own = kind(tensors={"g": {"shape": ["out"]}}, equations={"output": "linear(y, eye(d_out, y)) * 3 * channel(g)"})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            port = own.compile({}, LINEAR)["output"]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(port.fn(None, None, torch.ones(2, 8), torch.ones(8)), torch.full((2, 8), 3.0))


@pytest.mark.parametrize(
    ("host", "ports"),
    [("linear", {"output", "weight"}), ("conv2d", {"output", "weight"}), ("conv2d-grouped", {"weight"}),
     ("embedding", {"output", "weight"})],
)  # fmt: skip
def test_ports_of_lora(host: str, ports: set[str]) -> None:
    assert get("lora").ports({"rank": 2}, HOSTS[host].shape) == ports
    assert set(get("lora").compile({"rank": 2}, HOSTS[host].shape)) == ports
    assert get("lora").mergeable({"rank": 2}, HOSTS[host].shape)


def test_what_a_port_uses() -> None:
    def uses(expr: str, port: str = "replace", shape: HostShape = LINEAR, **parts: Any) -> frozenset[str]:
        return kind(equations={port: expr}, **parts).compile({}, shape)[port].uses

    assert uses("base(x)", shape=BLOCK) == {"host", "base", "x"}
    assert uses("y", "output") == {"y"}
    assert uses("linear(x, W, b)") == {"host", "x", "W", "b"}
    assert uses("W", "weight") == {"W"}
    assert uses("b", "bias", HostShape(family="linear", d_in=6, d_out=8)) == {"W", "b"}
    assert uses("host(x, W)", shape=CONV) == {"host", "x", "W"}
    assert uses("y * grid[0] * group", "output", context=["grid", "group"]) == {"host", "y", "grid", "group"}
    assert uses("y + taps[3]", "output", context=["taps"]) == {"host", "y", "taps"}


@pytest.mark.parametrize(
    ("name", "config", "shape", "says"),
    [
        ("lora", {"rank": 2}, HostShape(family="norm", d_out=8), "it acts on conv, embedding, linear"),
        ("lora", {"rank": 2}, BLOCK, "it acts on conv, embedding, linear"),
        ("adapter", {"bottleneck": 2}, HostShape(family="norm", d_out=8, channels_first=True, grouped=True),
         "does not say which axis"),
        ("adapter", {"bottleneck": 2}, HostShape(family="block"), "does not know this size"),
        ("assign", {}, BLOCK, "it acts on"),
    ],
)  # fmt: skip
def test_hosts_that_do_not_fit(name: str, config: dict[str, object], shape: HostShape, says: str) -> None:
    with pytest.raises(KindError, match=says) as caught:
        get(name).compile(config, shape)
    assert caught.value.code == "E_KIND_HOST"


def test_a_kind_may_have_nothing_to_do_on_a_host() -> None:
    own = kind(equations={"output": {"when": {"bias": True}, "expr": "2 * y"}})
    own.fits(LINEAR, {})
    with pytest.raises(KindError, match="none of its equations applies"):
        own.fits(BLOCK, {})


def test_a_live_form_that_mixes_grouped_channels_is_refused() -> None:
    own = kind(tensors={"w": {"shape": ["*weight"]}}, equations={"output": "y + host(x, w)"})
    own.fits(CONV, {})
    with pytest.raises(KindError, match="keeps them apart in groups"):
        own.fits(HOSTS["conv2d-grouped"].shape, {})


BAD: dict[str, tuple[str, str]] = {
    "cat(y for i in range(10 ** 9))": ("E_KIND_LIMIT", "the loop runs 1000000000 times"),
    "sum(sum(y for i in range(200)) for j in range(200))": ("E_KIND_LIMIT", "more than 4096 nodes"),
    "sum(y for i in range(9 ** 9 ** 9))": ("E_KIND_NUMBER", "2**53"),
    "sum(y for i in range(0))": ("E_KIND_NUMBER", "not once"),
    "sum(y for i in range(1.5))": ("E_KIND_NUMBER", "a constant whole number"),
    "sum(y for i in range(size(y, 0)))": ("E_KIND_NUMBER", "a constant whole number"),
    "y + sum(zeros((10 ** 6, 10 ** 6), y), axis=(0, 1))": ("E_KIND_LIMIT", "1000000000000 elements"),
    "y + sum(eye(10 ** 5, y), axis=(0, 1))": ("E_KIND_LIMIT", "elements"),
    "y + sum(arange(2 ** 40, y), axis=0)": ("E_KIND_LIMIT", "elements"),
    "y + sum(pad(y, (0, 10 ** 9)), -1, keep=1)": ("E_KIND_LIMIT", "elements"),
    "y + sum(repeat(y, '... -> ... n', n=10 ** 7), -1)": ("E_KIND_LIMIT", "elements"),
    "y + mean(interpolate(unsqueeze(y, 0), (10 ** 5, 10 ** 5)), (0, 1, 2, 3))": ("E_KIND_LIMIT", "elements"),
    "y + sum(kron(big, big), axis=(0, 1))": ("E_KIND_LIMIT", "elements"),
    "y + sum(block_diag(unsqueeze(big, 2)), axis=(0, 1))": ("E_KIND_LIMIT", "elements"),
    "y + sum(reshape(y, (2 ** 53, 2 ** 53)), axis=(0, 1))": ("E_KIND_SHAPE", "does not fit"),
    "linear(y, y)": ("E_KIND_SHAPE", "does not fit"),
    "linear(y, big)": ("E_KIND_SHAPE", "does not fit"),
    "y @ big": ("E_KIND_SHAPE", "does not fit"),
    "rearrange(y, 'a b -> b a')": ("E_KIND_SHAPE", "does not fit"),
    "rearrange(y, '((((')": ("E_KIND_SHAPE", "does not fit"),
    "interpolate(unsqueeze(y, 0), 4, mode='cubic')": ("E_KIND_SHAPE", "does not fit"),
    "skew(y, 5)": ("E_KIND_SHAPE", "does not fit"),
    "y[9]": ("E_KIND_SHAPE", "does not fit"),
    "y[0]": ("E_KIND_SHAPE", "must have the shape"),
    "sum(y, -1, keep=1)": ("E_KIND_SHAPE", "must have the shape"),
    "cat(y, y)": ("E_KIND_SHAPE", "must have the shape"),
    "channel(sum(big, axis=(0, 1)) + y[0, 0])": ("E_KIND_SHAPE", "must have the shape"),
    "1": ("E_KIND_OP", "must be a tensor"),
    "(y, y)": ("E_KIND_OP", "must be a tensor"),
    "(y, y)[0] + (1, 2)": ("E_KIND_OP", "only tensors and numbers"),
    "(y, y)[2]": ("E_KIND_NUMBER", "the tuple has 2 entries"),
    "act": ("E_KIND_OP", "must be a tensor"),
    "y + act": ("E_KIND_OP", "only tensors and numbers"),
    "y + gone": ("E_KIND_OP", "absent under this config"),
    "relu(gone)": ("E_KIND_OP", "x of relu must be a tensor; it is absent"),
    "relu(1)": ("E_KIND_OP", "x of relu must be a tensor"),
    "softmax(y, 0.5)": ("E_KIND_OP", "axis of softmax must be a whole number"),
    "sum(y, (0, 0.5))": ("E_KIND_OP", "axis of sum must be whole numbers"),
    "sum(y, 0, keep=2)": ("E_KIND_OP", "keep of sum must be 0 or 1"),
    "activation(y, 'rleu')": ("E_KIND_OP", "did you mean relu or relu6?"),
    "activation(y, 1)": ("E_KIND_OP", "name of activation must be a string"),
    "rearrange(y, y)": ("E_KIND_OP", "pattern of rearrange must be a string"),
    "repeat(y, 'b s d -> b s (d n)', n=0.5)": ("E_KIND_OP", "an axis length of repeat must be a whole number"),
    "clip(y, 'a', 2)": ("E_KIND_OP", "low of clip must be a number"),
    "2 @ y": ("E_KIND_NUMBER", "@ multiplies tensors"),
    "y + 2 @ 3": ("E_KIND_NUMBER", "@ multiplies tensors"),
    "y / (1 - 1) * (1 / 0)": ("E_KIND_NUMBER", "division by zero"),
    "y * 1e200 ** 2": ("E_KIND_NUMBER", "not finite"),
    "cat(1 for i in range(2))": ("E_KIND_OP", "cat joins tensors"),
    "y * W": ("E_KIND_HOST", "a block has no W"),
    "y * rows(y)": ("E_KIND_HOST", "has no such axis"),
    "act[0]": ("E_KIND_OP", "only tensors have subscripts"),
    "h = 1 / 0\ny": ("E_KIND_NUMBER", "division by zero"),
}


@pytest.mark.parametrize("expr", BAD, ids=lambda e: e[:50])
def test_what_reads_but_cannot_run_is_refused_before_memory_is_taken(expr: str) -> None:
    code, says = BAD[expr]
    own = kind(
        config={"act": {"type": "string", "default": "relu"}, "on": {"type": "boolean", "default": False}},
        tensors={
            "big": {"shape": [4096, 4095]},
            "gone": {"shape": [1], "when": {"on": True}},
        },
        equations={
            "output": [
                {"when": {"on": True}, "expr": "activation(y, act) + sum(big, (0, 1)) + gone"},
                {"expr": expr},
            ]
        },
    )
    start = time.process_time()
    with pytest.raises(KindError) as caught:
        own.compile({}, BLOCK)
    assert caught.value.code == code, str(caught.value)
    assert says in str(caught.value)
    assert time.process_time() - start < 1
    if "must have the shape" not in says:
        assert "^" in str(caught.value)


@pytest.mark.parametrize(
    ("port", "expr", "says"),
    [
        ("weight", "up", "must have the shape [8, 6], not [8, 1]"),
        ("weight", "transpose(W)", "must have the shape [8, 6], not [6, 8]"),
        ("bias", "W[:, 0:1]", "must have the shape [8], not [8, 1]"),
        ("bias", "sum(b, 0)", "must have the shape [8], not []"),
        ("input", "x[..., 0:1]", "must have the shape [4, 24, 6], not [4, 24, 1]"),
        ("output", "x", "must have the shape [4, 24, 8], not [4, 24, 6]"),
        ("replace", "host(x, W[0:1])", "must have the shape [4, 24, 8], not [4, 24, 1]"),
    ],
)
def test_values_must_have_the_shape_of_their_port(port: str, expr: str, says: str) -> None:
    tensors = {"up": {"shape": ["out", 1]}} if expr == "up" else {}
    own = kind(tensors=tensors, equations={port: expr})
    with pytest.raises(KindError) as caught:
        own.compile({}, LINEAR)
    assert caught.value.code == "E_KIND_SHAPE"
    assert says in str(caught.value)


def test_strides_do_not_hide_a_wrong_shape() -> None:
    own = kind(equations={"output": "y + mean(x, 1, keep=1)"})
    with pytest.raises(KindError, match="does not fit"):
        own.compile({}, CONV)


def test_all_results_together_are_bounded() -> None:
    expr = "y + sum(sum(big * i, (0, 1)) for i in range(3000))"
    own = kind(tensors={"big": {"shape": [8192, 8192]}}, equations={"output": expr})
    with pytest.raises(KindError, match="E_KIND_LIMIT"):
        own.compile({}, BLOCK)


def test_tensors_may_be_called_like_words_of_python_and_fx() -> None:
    words = ("input", "self", "forward", "torch", "linear", "add", "print", "type", "output", "weight")
    own = kind(
        tensors={w: {"shape": ["out"]} for w in words},
        equations={"output": " + ".join(["y", *(f"channel({w})" for w in words)])},
    )
    port = own.compile({}, LINEAR)["output"]
    ones = [torch.ones(8)] * len(words)
    assert torch.equal(port.fn(None, None, torch.zeros(2, 8), *ones), torch.full((2, 8), 10.0))


def test_strings_of_a_document_stay_strings_in_generated_code() -> None:
    own = kind(equations={"output": "rearrange(y, '... c -> ... c\") or print(1) or (\"')"})
    with pytest.raises(KindError, match="E_KIND_SHAPE"):
        own.compile({}, LINEAR)
    text = kind(
        config={"act": {"type": "string", "default": "'); import os; ('"}}, equations={"output": "activation(y, act)"}
    )
    with pytest.raises(KindError, match="unknown activation"):
        text.compile({}, LINEAR)


def test_threads_compile_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        ports = list(pool.map(lambda i: lora(scale=5.0 + i % 3), range(24)))
    x, y, d, u = torch.randn(3, 6), torch.zeros(3, 8), torch.randn(2, 6), torch.randn(8, 2)
    for i, port in enumerate(ports):
        torch.testing.assert_close(port.fn(None, x, y, d, u), (5.0 + i % 3) * x @ d.T @ u.T)
