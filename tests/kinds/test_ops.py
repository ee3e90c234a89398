"""Every operation computes in torch what its NumPy twin says, and only registered functions ever run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltahub.kinds import HostShape
from deltahub.kinds.compile import build
from deltahub.kinds.language import parse
from deltahub.kinds.numpy_ops import ACTIVATION_TWINS, TWINS
from deltahub.kinds.ops import ACTIVATIONS, CHANNEL_OPS, OPS, WEIGHT_OPS
from deltahub.kinds.reference import Host, _Walk
from deltahub.kinds.torch_ops import ACTIVATION_FUNCTIONS, FUNCTIONS, TARGETS

ON_HOST = CHANNEL_OPS | WEIGHT_OPS | {"host", "base", "activation"}

# name -> (tensors by shape, expressions). Tensors called p… are positive, i… are indices below 3, s… small.
CASES: dict[str, tuple[dict[str, tuple[int, ...]], list[str]]] = {
    **{
        name: ({"u": (3, 4)}, [f"{name}(u)"])
        for name in (*(a for a in ACTIVATIONS if a != "identity"), "exp", "square", "abs", "sign", "sin", "cos",
                     "round", "floor", "float32", "stop_gradient", "zeros_like", "ones_like")
    },
    **{name: ({"p": (3, 4)}, [f"{name}(p)"]) for name in ("log", "sqrt", "rsqrt")},
    **{
        name: ({"u": (3, 4, 2)}, [f"{name}(u, 1)", f"{name}(u, (0, -1))", f"{name}(u, axis=0, keep=1)"])
        for name in ("sum", "mean", "amax", "amin", "norm", "rms")
    },
    "clip": ({"u": (3, 4)}, ["clip(u, -0.5, 0.5)", "clip(u, low=-1, high=0)"]),
    "minimum": ({"u": (3, 4), "v": (4,)}, ["minimum(u, v)"]),
    "maximum": ({"u": (3, 4), "v": (4,)}, ["maximum(u, v)"]),
    "like": ({"u": (3, 4)}, ["like(float32(u), u)"]),
    "leaky_relu": ({"u": (3, 4)}, ["leaky_relu(u)", "leaky_relu(u, 0.2)"]),
    "elu": ({"u": (3, 4)}, ["elu(u)", "elu(u, alpha=0.5)"]),
    "softmax": ({"u": (3, 4)}, ["softmax(u)", "softmax(u, axis=0)"]),
    "log_softmax": ({"u": (3, 4)}, ["log_softmax(u)", "log_softmax(u, axis=0)"]),
    "normalize": ({"u": (3, 4)}, ["normalize(u)", "normalize(u, 0)", "normalize(0 * u, 0)"]),
    "cumsum": ({"u": (3, 4)}, ["cumsum(u, 1)"]),
    "group_norm": ({"u": (2, 4, 5), "g": (4,), "h": (4,)}, ["group_norm(u, 2)", "group_norm(u, 2, g, h, eps=0.1)"]),
    "reshape": ({"u": (3, 4)}, ["reshape(u, (2, -1))", "reshape(u, 12)"]),
    "reshape_as": ({"u": (3, 4), "v": (2, 6)}, ["reshape_as(u, v)"]),
    "expand_as": ({"u": (1, 4), "v": (3, 4)}, ["expand_as(u, v)"]),
    "transpose": ({"u": (3, 4, 2)}, ["transpose(u)", "transpose(u, 0, 2)"]),
    "permute": ({"u": (3, 4, 2)}, ["permute(u, (2, 0, 1))"]),
    "unsqueeze": ({"u": (3, 4)}, ["unsqueeze(u, 1)"]),
    "squeeze": ({"u": (3, 1, 4)}, ["squeeze(u, 1)"]),
    "flatten": ({"u": (3, 4, 2)}, ["flatten(u)", "flatten(u, 1)", "flatten(u, 0, 1)"]),
    "flip": ({"u": (3, 4)}, ["flip(u, 0)", "flip(u, (0, 1))"]),
    "roll": ({"u": (3, 4)}, ["roll(u, 1, 1)", "roll(u, -2, 0)"]),
    "pad": ({"u": (3, 4)}, ["pad(u, (1, 2))", "pad(u, (0, 1, 2, 0), value=1.5)"]),
    "cat": ({"u": (3, 4), "v": (3, 2)}, ["cat(u, v)", "cat(u, u, axis=0)", "cat(u * i for i in range(3))"]),
    "stack": ({"u": (3, 4)}, ["stack(u, u)", "stack(u, -u, axis=-1)", "stack((u + i for i in range(2)), axis=1)"]),
    "size": ({"u": (3, 4)}, ["u * size(u, 1)", "reshape(u, (size(u, 1), size(u, 0)))"]),
    "rearrange": ({"u": (3, 4)}, ["rearrange(u, 'a (b c) -> c b a', b=2)"]),
    "reduce": ({"u": (3, 4)}, ["reduce(u, 'a (b c) -> a b', 'mean', c=2)", "reduce(u, 'a b -> a', how='max')"]),
    "repeat": ({"u": (3, 4)}, ["repeat(u, 'a b -> a (b n)', n=3)"]),
    "einsum": ({"u": (3, 4), "v": (4, 2)}, ["einsum(u, v, 'a b, b c -> c a')", "einsum(u, pattern='a b -> b')"]),
    "zeros": ({"u": (3, 4)}, ["zeros((2, 3), u)", "zeros(4, like=u) + u"]),
    "ones": ({"u": (3, 4)}, ["ones((2, 3), u)"]),
    "eye": ({"u": (3, 4)}, ["eye(3, u)"]),
    "arange": ({"u": (3, 4)}, ["arange(5, u)"]),
    "bmm": ({"u": (2, 3, 4), "v": (2, 4, 3), "m": (5, 3)}, ["bmm(u, v)", "bmm(m, u)"]),
    "kron": ({"u": (2, 3), "v": (3, 2)}, ["kron(u, v)"]),
    "inverse": ({"s": (4, 4)}, ["inverse(s + eye(4, s))"]),
    "solve": ({"s": (4, 4), "v": (4, 2)}, ["solve(s + eye(4, s), v)"]),
    "diag": ({"u": (2, 3)}, ["diag(u)"]),
    "diagonal": ({"u": (2, 3, 3)}, ["diagonal(u)"]),
    "block_diag": ({"u": (3, 2, 4)}, ["block_diag(u)"]),
    "tril": ({"u": (3, 4)}, ["tril(u)", "tril(u, -1)"]),
    "triu": ({"u": (3, 4)}, ["triu(u, k=1)"]),
    "skew": ({"u": (2, 6)}, ["skew(u, 4)"]),
    "cayley": ({"u": (2, 6)}, ["cayley(skew(u, 4))"]),
    "circulant": ({"u": (2, 5)}, ["circulant(u)"]),
    "ifft2_real": ({"u": (2, 4, 6)}, ["ifft2_real(u)"]),
    "gather": ({"u": (3, 4), "i": (2, 4)}, ["gather(u, 0, i)"]),
    "take": ({"u": (3, 4), "i": (5,)}, ["take(u, i)", "take(u, i, axis=1)"]),
    "put": ({"u": (3, 4), "j": (2,), "v": (2, 4), "w": (3, 2)}, ["put(u, j, v)", "put(u, j, w, axis=1)"]),
    "scatter_add": ({"u": (3, 4), "i": (2, 4), "v": (2, 4)}, ["scatter_add(u, 0, i, v)"]),
    "embedding": ({"u": (3, 4), "i": (2, 5)}, ["embedding(i, u)"]),
    "conv1d": ({"u": (2, 4, 9), "w": (6, 2, 3), "g": (6,)},
               ["conv1d(u, w, g, groups=2)", "conv1d(u, w, stride=2, padding=1, dilation=2, groups=2)"]),
    "conv2d": ({"u": (2, 4, 7, 6), "w": (4, 1, 3, 2), "v": (3, 4, 1, 1)},
               ["conv2d(u, w, groups=4, padding=(1, 0))", "conv2d(u, v, stride=(2, 1))"]),
    "conv3d": ({"u": (1, 2, 4, 5, 4), "w": (3, 2, 2, 3, 1)}, ["conv3d(u, w, padding=1)"]),
    "avg_pool1d": ({"u": (2, 3, 7)},
                   ["avg_pool1d(u, 2)", "avg_pool1d(u, 3, stride=2, padding=1, ceil=1, count_pad=0)"]),
    "avg_pool2d": ({"u": (2, 3, 7, 5)},
                   ["avg_pool2d(u, 2)", "avg_pool2d(u, (3, 2), stride=2, padding=1, ceil=1)",
                    "avg_pool2d(u, 2, ceil=1, count_pad=0)"]),
    "adaptive_avg_pool1d": ({"u": (2, 3, 7)}, ["adaptive_avg_pool1d(u, 3)"]),
    "adaptive_avg_pool2d": ({"u": (2, 3, 7, 5)}, ["adaptive_avg_pool2d(u, (3, 2))", "adaptive_avg_pool2d(u, 2)"]),
    "interpolate": ({"u": (2, 3, 4, 5)},
                    ["interpolate(u, (7, 3))", "interpolate(u, (8, 10), mode='nearest')",
                     "interpolate(u, (3, 2), 'nearest')"]),
    "attention": ({"q": (2, 3, 4), "k": (2, 5, 4), "v": (2, 5, 6)},
                  ["attention(q, k, v)", "attention(q, k, v, scale=0.3, causal=1)"]),
    "shrink2d": ({"u": (2, 3, 7, 5)},
                 ["shrink2d(u, 1)", "shrink2d(u, 2)", "shrink2d(u, 3, 'adaptive')", "shrink2d(u, 9, how='adaptive')"]),
    "grow2d": ({"u": (2, 3, 4, 3)}, ["grow2d(u, 1, (4, 3))", "grow2d(u, 2, (7, 5))"]),
    "depthwise2d": ({"u": (2, 3, 5, 4), "w": (3, 1, 3, 3), "b": (3,), "large": (3, 1, 13, 13)},
                    ["depthwise2d(u, w)", "depthwise2d(u, w, b)", "depthwise2d(u, large, bias=b)"]),
    "gated": ({"u": (2, 4, 6)}, ["gated(u)", "gated(u, 'sigmoid', 1)"]),
}  # fmt: skip

LINES = [(name, tensors, line) for name, (tensors, lines) in CASES.items() for line in lines]


def arrays(tensors: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in tensors.items():
        value = rng.standard_normal(shape).astype(np.float32)
        if name == "p":
            value = np.abs(value) + 0.1
        if name == "s":
            value *= 0.1
        if name == "i":
            value = rng.integers(0, 3, shape)
        if name == "j":
            value = rng.permutation(3)[: shape[0]]
        made[name] = value
    return made


def test_the_three_tables_hold_the_same_operations() -> None:
    assert set(FUNCTIONS) | ON_HOST == set(OPS)
    assert set(TWINS) | ON_HOST == set(OPS)
    assert not (set(FUNCTIONS) | set(TWINS)) & ON_HOST
    assert set(ACTIVATION_FUNCTIONS) == set(ACTIVATION_TWINS) == set(ACTIVATIONS)
    assert all(op.doc and op.parameters for op in OPS.values())
    assert {p.type for op in OPS.values() for p in op.parameters} == {"tensor", "int", "ints", "number", "text", "flag"}


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(FUNCTIONS)


@pytest.mark.parametrize(("name", "tensors", "line"), LINES, ids=[line for _, _, line in LINES])
def test_torch_computes_what_numpy_says(name: str, tensors: dict[str, tuple[int, ...]], line: str) -> None:
    program = parse(line, where=name, names=frozenset(tensors))
    made = arrays(tensors, seed=len(line))
    shape = HostShape(family="block")
    built = build(
        program, inputs=("host",), tensors=tuple(tensors), absent=frozenset(), values={}, shape=shape, live=True
    )
    torch_value = built.fn(None, *(torch.from_numpy(a) for a in made.values()))
    numpy_value = np.asarray(_Walk(dict(made), Host(shape=shape)).value(program.result))
    assert tuple(torch_value.shape) == numpy_value.shape
    assert str(torch_value.dtype).removeprefix("torch.") == str(numpy_value.dtype)
    np.testing.assert_allclose(torch_value.numpy(), numpy_value, rtol=1e-5, atol=1e-5)
    assert all(n.target in TARGETS for n in built.graph.nodes if n.op == "call_function")
