"""Configs and symbolic shapes: what is resolved, what must agree, and what is refused before memory is taken."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from deltahub.errors import KindError
from deltahub.kinds import HostShape, Kind, Registry, get
from deltahub.kinds.document import INITIALISERS

LINEAR = HostShape(family="linear", d_in=6, d_out=8, bias=True)
CONV = HostShape(family="conv", d_in=3, d_out=8, kernel=(3, 2), spatial=2, channels_first=True)
NORM = HostShape(family="norm", d_out=8, bias=True)


def kind(**parts: Any) -> Kind:
    document = {"kind": "com.example.k", "version": 1, "hosts": ["linear", "conv", "norm", "block"], **parts}
    return Registry([document]).get("com.example.k")


def shapes(k: Kind, shape: HostShape, **config: object) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in k.tensors(config, shape).items()}


@pytest.mark.parametrize(
    ("name", "config", "shape", "expected"),
    [
        ("lora", {"rank": 2}, LINEAR, {"down": (2, 6), "up": (8, 2)}),
        ("lora", {"rank": 2, "biased": True}, LINEAR, {"down": (2, 6), "up": (8, 2), "bias": (8,)}),
        ("lora", {"rank": 2}, CONV, {"down": (2, 3, 3, 2), "up": (8, 2)}),
        ("assign", {}, LINEAR, {"weight": (8, 6), "bias": (8,)}),
        ("assign", {}, CONV, {"weight": (8, 3, 3, 2)}),
        ("assign", {}, NORM, {"weight": (8,), "bias": (8,)}),
        ("bias", {}, CONV, {"value": (8,)}),
        ("adapter", {"bottleneck": 3}, LINEAR, {"down": (3, 8), "down_bias": (3,), "up": (8, 3), "up_bias": (8,)}),
    ],
)
def test_shapes(name: str, config: dict[str, object], shape: HostShape, expected: dict[str, tuple[int, ...]]) -> None:
    assert shapes(get(name), shape, **config) == expected


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "needs the config value 'rank'"),
        ({"rank": 0}, "must be at least 1"),
        ({"rank": -4}, "must be at least 1"),
        ({"rank": 10**9}, "must be at most 65536"),
        ({"rank": 10**400}, "must be at most"),
        ({"rank": 2.0}, "must be a whole number"),
        ({"rank": True}, "must be a whole number"),
        ({"rank": "2"}, "must be a whole number"),
        ({"rank": None}, "must be a number, a string, true or false"),
        ({"rank": [2]}, "must be a number, a string, true or false"),
        ({"rank": 2, "scale": float("nan")}, "must be finite in float32"),
        ({"rank": 2, "scale": float("inf")}, "must be finite in float32"),
        ({"rank": 2, "scale": -float("inf")}, "must be finite in float32"),
        ({"rank": 2, "scale": 10**400}, "must be finite in float32"),
        ({"rank": 2, "scale": True}, "must be a number"),
        ({"rank": 2, "biased": 1}, "must be true or false"),
        ({"rank": 2, "sclae": 1.0}, "no config value 'sclae'; did you mean scale?"),
        ({"rank": 2, "alpha": 16}, "no config value 'alpha'"),
    ],
)
def test_config_is_checked(config: dict[str, object], says: str) -> None:
    start = time.process_time()
    for call in (
        get("lora").check_config,
        lambda c: get("lora").tensors(c, LINEAR),
        lambda c: get("lora").compile(c, LINEAR),
    ):
        with pytest.raises(KindError) as caught:
            call(config)
        assert caught.value.code == "E_KIND_CONFIG"
        assert says in str(caught.value)
    assert time.process_time() - start < 1


def test_defaults_are_filled_in_in_order() -> None:
    checked = get("adapter").check_config({"layer_norm": True, "bottleneck": 4, "scale": 2})
    expected = {"bottleneck": 4, "activation": "relu", "scale": 2.0, "residual": True, "layer_norm": True}
    assert list(checked.items()) == list(expected.items())
    assert isinstance(checked["scale"], float)
    checked["scale"] = 3.0  # a caller's copy
    assert get("adapter").check_config({"bottleneck": 4})["scale"] == 1.0


def test_one_and_true_are_not_the_same_key() -> None:
    assert get("lora").check_config({"rank": 1})["rank"] == 1
    with pytest.raises(KindError, match="whole number"):
        get("lora").check_config({"rank": True})
    with pytest.raises(KindError, match="whole number"):
        get("lora").check_config({"rank": 1.0})


@pytest.mark.parametrize(
    ("known", "code"),
    [
        ({"down": (2, 6), "up": (8, 2)}, None),
        ({"up": (8, 2)}, None),
        ({"down": (1, 6), "up": (8, 1)}, "E_KIND_SHAPE"),
        ({"down": (2, 1), "up": (8, 2)}, "E_KIND_SHAPE"),
        ({"down": (2, 6), "up": (1, 2)}, "E_KIND_SHAPE"),
        ({"down": (6, 2), "up": (2, 8)}, "E_KIND_SHAPE"),
        ({"down": (1, 2, 6), "up": (8, 2)}, "E_KIND_SHAPE"),
        ({"down": (), "up": (8, 2)}, "E_KIND_SHAPE"),
        ({"down": (2, 6), "upp": (8, 2)}, "E_KIND_TENSOR"),
        ({"down": (2, 6), "up": (8, 2), "bias": (8,)}, "E_KIND_TENSOR"),
    ],
)
def test_given_shapes_must_be_equal(known: dict[str, tuple[int, ...]], code: str | None) -> None:
    if code is None:
        get("lora").tensors({"rank": 2}, LINEAR, known=known)
        return
    with pytest.raises(KindError) as caught:
        get("lora").tensors({"rank": 2}, LINEAR, known=known)
    assert caught.value.code == code


def test_a_block_s_width_is_read_off_its_tensors() -> None:
    adapter, block = get("adapter"), HostShape(family="block")
    with pytest.raises(KindError, match="does not know this size"):
        adapter.tensors({"bottleneck": 3}, block)
    known = {"down": (3, 10), "down_bias": (3,), "up": (10, 3), "up_bias": (10,)}
    assert {n: s.shape for n, s in adapter.tensors({"bottleneck": 3}, block, known=known).items()} == known
    assert adapter.bind({"bottleneck": 3}, block, known).d_out == 10
    with pytest.raises(KindError, match="up_bias"):
        adapter.tensors({"bottleneck": 3}, block, known={**known, "up_bias": (1,)})
    with pytest.raises(KindError, match="E_KIND_SHAPE"):
        adapter.tensors({"bottleneck": 3}, block, known={**known, "up": (11, 3)})


@pytest.mark.parametrize(
    ("lengths", "code"),
    [
        (["n * n * n * n * n"], "E_KIND_NUMBER"),
        (["n * n * n"], "E_KIND_SHAPE"),
        (["n", "n", "n"], "E_KIND_LIMIT"),
        (["2 ** n"], "E_KIND_NUMBER"),
        (["n ** n ** n"], "E_KIND_NUMBER"),
        (["n - n"], "E_KIND_SHAPE"),
        (["-n"], "E_KIND_SHAPE"),
        (["in / 4"], "E_KIND_SHAPE"),
        (["out // 0"], "E_KIND_NUMBER"),
    ],
)
def test_lengths_are_bounded(lengths: list[str], code: str) -> None:
    k = kind(
        config={"n": {"type": "integer"}},
        tensors={"t": {"shape": lengths}},
        equations={"output": "y * n + channel(reduce(t, '... -> 1', 'sum'))"},
    )
    start = time.process_time()
    with pytest.raises(KindError) as caught:
        k.tensors({"n": 65536}, LINEAR)
    assert caught.value.code == code, str(caught.value)
    assert time.process_time() - start < 1


def test_exact_division_is_a_length() -> None:
    k = kind(tensors={"t": {"shape": ["in / 2", "out - 1"]}}, equations={"weight": "W * sum(t, axis=(0, 1))"})
    assert shapes(k, LINEAR) == {"t": (3, 7)}


@pytest.mark.parametrize("name", sorted(INITIALISERS))
def test_initialisers(name: str) -> None:
    taking = {"constant": "(0.5)", "normal": "(0.5)", "uniform": "(0.5)", "indices": "(in * out)", "paired": "(0.5)"}
    arguments = taking.get(name, "")
    dtype = "int64" if name == "indices" else "float"
    lengths = {"bias": ["out"], "singular_in": ["in", "in"]}.get(name, ["*weight"])
    k = kind(
        tensors={"t": {"shape": lengths, "init": name + arguments, "dtype": dtype}},
        equations={"weight": "W + float32(sum(t, axis=0))"},
    )
    spec = k.tensors({}, LINEAR)["t"]
    W, b = torch.randn(8, 6), torch.randn(8)
    made = [k.init(spec, torch.Generator().manual_seed(s), W=W, b=b) for s in (0, 0, 1)]
    assert made[0].shape == spec.shape
    assert made[0].dtype == (torch.int64 if name == "indices" else torch.float32)
    assert made[0].is_contiguous()
    assert torch.equal(made[0], made[1])
    random = name not in {"zeros", "ones", "constant", "eye", "weight", "bias", "singular_in", "singular_out"}
    assert torch.equal(made[0], made[2]) is not random
    if name in {"weight", "bias"}:
        source = W if name == "weight" else b
        assert torch.equal(made[0], source)
        assert made[0].data_ptr() != source.data_ptr()
    if name == "indices":
        assert made[0].unique().numel() == 48
        assert made[0].min() >= 0
        assert made[0].max() < 48
    if name == "orthogonal":
        torch.testing.assert_close(made[0].T @ made[0], torch.eye(6))
    if name == "paired":
        assert torch.equal(made[0][:, ::2], made[0][:, 1::2])
    if name == "singular_in":
        torch.testing.assert_close(made[0].T @ made[0], torch.eye(6))
    if name == "singular_out":
        torch.testing.assert_close(made[0] @ made[0].T, W @ W.T)
    if name == "kaiming_uniform":
        assert made[0].abs().max() <= 6**-0.5


def test_fresh_tensors_have_their_own_memory_type_and_place() -> None:
    lora = get("lora")
    spec = lora.tensors({"rank": 2}, LINEAR)["down"]
    made = lora.init(spec, torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert lora.init(spec, torch.Generator(), device="meta").device.type == "meta"
    W = torch.randn(6, 8).T  # a view, as the canonical weight of a transposed layer is
    spec = get("assign").tensors({}, LINEAR)["weight"]
    made = get("assign").init(spec, torch.Generator(), W=W)
    assert made.is_contiguous()
    assert torch.equal(made, W)


def test_an_initialiser_may_be_an_expression_over_the_weight() -> None:
    k = kind(
        config={"factor": {"type": "number", "default": 2.0}},
        tensors={"m": {"shape": ["out"], "init": "factor * norm(flatten(W, 1), 1)"}},
        equations={"weight": "W * rows(m / norm(flatten(W, 1), 1))"},
    )
    W = torch.randn(8, 6)
    made = k.init(k.tensors({"factor": 3.0}, LINEAR)["m"], torch.Generator(), W=W)
    torch.testing.assert_close(made, 3 * W.norm(dim=1))
    with pytest.raises(KindError, match="E_KIND_INIT"):
        k.init(k.tensors({}, LINEAR)["m"], torch.Generator())


@pytest.mark.parametrize(
    ("shape", "init", "W"),
    [(["in"], "weight", torch.zeros(8, 6)), (["out"], "weight", None), (["out"], "indices(3)", None),
     (["out"], "eye", None), (["out"], "norm(W, 0)", torch.zeros(8, 6))],
)  # fmt: skip
def test_an_initialiser_that_does_not_fit(shape: list[str], init: str, W: torch.Tensor | None) -> None:
    k = kind(tensors={"t": {"shape": shape, "init": init}}, equations={"weight": "W + sum(t, axis=0)"})
    with pytest.raises(KindError) as caught:
        k.init(k.tensors({}, LINEAR)["t"], torch.Generator(), W=W)
    assert caught.value.code == "E_KIND_INIT"


def test_indices_beyond_their_type_are_refused() -> None:
    k = kind(
        tensors={"t": {"shape": [50], "init": "indices(2 ** 40)", "dtype": "int32"}},
        equations={"weight": "W + float32(sum(t, axis=0))"},
    )
    with pytest.raises(KindError, match="does not hold indices up to"):
        k.init(k.tensors({}, LINEAR)["t"], torch.Generator())


def test_few_indices_of_very_many_take_little_memory() -> None:
    k = kind(
        tensors={"t": {"shape": [50], "init": "indices(2 ** 40)", "dtype": "int64"}},
        equations={"weight": "W + float32(sum(t, axis=0))"},
    )
    made = k.init(k.tensors({}, LINEAR)["t"], torch.Generator().manual_seed(0))
    assert made.unique().numel() == 50
