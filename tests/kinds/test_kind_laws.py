"""What holds for every kind on every host that it fits, at the level of functions: generated from the registry.

Beside the built-in kinds stand documents of many published methods, which are data and nothing else: what the
language can say is tested here, too.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deltahub.errors import KindError
from deltahub.kinds import Document, Kind, Registry, get, names
from deltahub.kinds.document import LIVE_PORTS, MERGED_PORTS, PORTS
from deltahub.kinds.fields import MISSING
from deltahub.kinds.reference import run
from deltahub.kinds.torch_ops import TARGETS
from tests.kinds.hosts_in_numpy import HOSTS, Example

METHODS = tomllib.loads(Path(__file__).with_name("methods.toml").read_text(encoding="utf-8"))["kinds"]
KINDS = {**{n: get(n) for n in names()}, **{k.name: k for k in Registry(METHODS).own}}

# Config values that cannot be guessed from their bounds.
VALUES: dict[str, dict[str, object]] = {
    "com.example.oft": {"block": 3},
    "com.example.lokr": {"rows": 2, "columns": 3},
    "delta-conv": {"kernel": 3, "reduction": 3},
    "com.example.gated-depthwise": {"size": 3},
}


def configs(kind: Kind) -> list[dict[str, object]]:
    """A plain config, and one with every switch turned and every number changed."""
    plain: dict[str, object] = {}
    other: dict[str, object] = {}
    for name, entry in kind.document.config.items():
        guess = {"integer": 2, "number": 1.5, "boolean": True, "string": ""}[entry.type]
        guess = entry.enum[-1] if entry.enum else guess
        plain[name] = guess if entry.default is MISSING else entry.default
        other[name] = not entry.default if entry.type == "boolean" else guess
    given = VALUES.get(kind.name, {})
    return [{**plain, **given}, {**other, **given}]


def _fits(kind: Kind, host: Example, config: dict[str, object]) -> bool:
    try:
        kind.fits(host.shape, config)
    except KindError as error:
        if error.code != "E_KIND_HOST":
            raise
        return False
    return True


def _cases() -> list[Any]:
    cases = []
    for kind in KINDS.values():
        for host_name, host in HOSTS.items():
            for i, config in enumerate(configs(kind)):
                if _fits(kind, host, config):
                    cases.append(pytest.param(kind, host, config, id=f"{kind.name}-{host_name}-{i}"))
    return cases


CASES = _cases()
EVERY = pytest.mark.parametrize(("kind", "host", "config"), CASES)


def tensors(kind: Kind, host: Example, config: dict[str, object], *, fresh: bool) -> dict[str, Tensor]:
    """Fresh tensors, or trained ones: every floating tensor with noise on it."""
    g = torch.Generator().manual_seed(7)
    specs = kind.tensors(config, host.shape)
    made = {n: kind.init(s, g, W=host.W, b=host.b) for n, s in specs.items()}
    if not fresh:
        for tensor in made.values():
            if tensor.is_floating_point():
                tensor += 0.3 * torch.randn(tensor.shape, generator=g)
    return made


def call(kind: Kind, host: Example, config: dict[str, object], port: str, made: dict[str, Tensor]) -> Tensor:
    compiled = kind.compile(config, host.shape)[port]
    assert compiled.tensors == tuple(made)
    arguments = {"x": host.x, "y": host.y, "W": host.W, "b": host.b}
    return compiled.fn(host, *(arguments[a] for a in PORTS[port]), *made.values())


def live(kind: Kind, host: Example, config: dict[str, object], made: dict[str, Tensor]) -> Tensor:
    """The module with the kind's live equations around it, or with its changed weight and bias."""
    ports = kind.ports(config, host.shape)
    if "replace" in ports:
        return call(kind, host, config, "replace", made)
    if not ports & LIVE_PORTS:
        return merged(kind, host, config, made)
    inner = Example(host.shape, host.apply, host.numpy_apply, host.W, host.b, host.x)
    if "input" in ports:
        inner.x = call(kind, host, config, "input", made)
    if "output" not in ports:
        return inner.y
    return kind.compile(config, host.shape)["output"].fn(host, host.x, inner.y, *made.values())


def merged(kind: Kind, host: Example, config: dict[str, object], made: dict[str, Tensor]) -> Tensor:
    ports = kind.ports(config, host.shape)
    W = call(kind, host, config, "weight", made) if "weight" in ports else host.W
    b = call(kind, host, config, "bias", made) if "bias" in ports else host.b
    return host.forward(W, b)


def close(a: Tensor, b: Tensor) -> None:
    scale = max(1.0, float(b.abs().max()))
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * scale


@EVERY
def test_a_fresh_one_is_the_identity_where_it_says_so(kind: Kind, host: Example, config: dict[str, object]) -> None:
    made = tensors(kind, host, config, fresh=True)
    if kind.is_identity(config, host.shape):
        close(live(kind, host, config, made), host.y)
    else:
        assert not kind.identity_at_init


@EVERY
def test_live_equals_merged(kind: Kind, host: Example, config: dict[str, object]) -> None:
    made = tensors(kind, host, config, fresh=False)
    assert not torch.equal(live(kind, host, config, made), host.y)
    if kind.mergeable(config, host.shape):
        close(live(kind, host, config, made), merged(kind, host, config, made))


@EVERY
def test_torch_equals_the_reference(kind: Kind, host: Example, config: dict[str, object]) -> None:
    made = tensors(kind, host, config, fresh=False)
    given = {n: v.numpy() for n, v in (("x", host.x), ("y", host.y), ("W", host.W), ("b", host.b)) if v is not None}
    for port in kind.ports(config, host.shape):
        expected = run(kind.document, config, port, host.numpy_host, {n: t.numpy() for n, t in made.items()}, **given)
        value = call(kind, host, config, port, made)
        assert tuple(value.shape) == expected.shape
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_only_registered_functions_run(kind: Kind, host: Example, config: dict[str, object]) -> None:
    for port in kind.compile(config, host.shape).values():
        for node in port.graph.nodes:
            assert node.op in {"placeholder", "call_function", "output"}
            assert node.op != "call_function" or node.target in TARGETS


@EVERY
def test_gradients_reach_every_tensor_that_trains(kind: Kind, host: Example, config: dict[str, object]) -> None:
    specs = kind.tensors(config, host.shape)
    made = tensors(kind, host, config, fresh=False)
    for name, tensor in made.items():
        tensor.requires_grad_(specs[name].trainable)
    live(kind, host, config, made).square().sum().backward()
    for name, tensor in made.items():
        assert (tensor.grad is not None) is specs[name].trainable, name
        assert tensor.grad is None or tensor.grad.isfinite().all(), name


def test_every_kind_has_a_host() -> None:
    # These are more than functions of arrays: tests/test_attending.py and tests/test_prompting.py have the modules.
    attending = {name for name, kind in KINDS.items() if kind.hosts <= {"attention", "transformer"}}
    assert {case.values[0].name for case in CASES} == set(KINDS) - attending


def test_methods_are_data() -> None:
    assert len(METHODS) >= 12
    assert all(Document.parse(m).name.startswith("com.example.") for m in METHODS)


@pytest.mark.parametrize("port", sorted(MERGED_PORTS))
def test_a_missing_bias_counts_as_zero(port: str) -> None:
    kind, host = get("lora"), HOSTS["linear-no-bias"]
    config: dict[str, object] = {"rank": 2, "scale": 2.0, "biased": True}
    made = tensors(kind, host, config, fresh=False)
    if port == "bias":
        close(call(kind, host, config, port, made), 2 * made["bias"])
    else:
        close(call(kind, host, config, port, made), host.W + 2 * made["up"] @ made["down"])


def test_built_in_documents_name_their_papers() -> None:
    for name in ("lora", "bias", "adapter"):
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", get(name).document.reference)
