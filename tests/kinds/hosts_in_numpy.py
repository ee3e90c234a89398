"""Hosts for the tests of kinds: each family once in torch, with its twin in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deltahub.kinds import HostShape
from deltahub.kinds.numpy_ops import convolve
from deltahub.kinds.reference import Host

__all__ = ["HOSTS", "Example", "examples"]


@dataclass
class Example:
    """One host with weight, bias and an input; ``apply`` is the module's own computation without bias."""

    shape: HostShape
    apply: Callable[[Tensor, Tensor], Tensor]
    numpy_apply: Callable[[Any, Any], Any]
    W: Tensor | None
    b: Tensor | None
    x: Tensor

    def forward(self, W: Tensor | None, b: Tensor | None, x: Tensor | None = None) -> Tensor:
        """The module with this weight and bias."""
        x = self.x if x is None else x
        if W is None:
            return torch.tanh(x)
        y = self.apply(x, W)
        if b is None:
            return y
        axes = y.ndim - 2 if self.shape.channels_first else 0
        return y + b.reshape(b.shape + (1,) * axes)

    @property
    def y(self) -> Tensor:
        return self.forward(self.W, self.b)

    @property
    def numpy_host(self) -> Host:
        """The same for the reference interpreter."""
        return Host(
            shape=self.shape,
            apply=self.numpy_apply,
            base=lambda x: self.forward(self.W, self.b, torch.from_numpy(x)).numpy(),
            context={"grid": (2, 3), "group": 2},
        )

    # What a compiled equation asks of a host.

    def deltahub_apply(self, x: Tensor, w: Tensor) -> Tensor:
        return self.apply(x, w)

    def deltahub_base(self, x: Tensor) -> Tensor:
        return self.forward(self.W, self.b, x)

    def deltahub_weight(self) -> Tensor | None:
        return self.W

    def deltahub_bias(self) -> Tensor | None:
        return self.b

    def deltahub_context(self, name: str) -> object:
        return {"grid": (2, 3), "group": 2}[name]


def _norm(x: Any, w: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / (x.var(-1, keepdims=True) + 1e-5) ** 0.5 * w


def _torch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w)


def _conv(n: int, *, kernel: tuple[int, ...], bias: bool, groups: int = 1) -> Example:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]
    shape = HostShape(
        family="conv", d_in=4 // groups, d_out=6, kernel=kernel, bias=bias, spatial=n, channels_first=True,
        grouped=groups > 1,
    )  # fmt: skip
    return Example(
        shape,
        lambda x, w: function(x, w, None, 2, 1, 1, groups),
        lambda x, w: convolve(x, w, None, 2, 1, 1, groups),
        torch.randn(6, 4 // groups, *kernel),
        torch.randn(6) if bias else None,
        torch.randn(2, 4, *(7, 6, 5)[:n]),
    )


def examples() -> dict[str, Example]:
    """Every family of hosts, with and without bias where both exist."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 6)
    return {
        "linear": Example(
            HostShape(family="linear", d_in=6, d_out=8, bias=True),
            F.linear, lambda x, w: x @ w.T, torch.randn(8, 6), torch.randn(8), x,
        ),
        "linear-no-bias": Example(
            HostShape(family="linear", d_in=6, d_out=8), F.linear, lambda x, w: x @ w.T, torch.randn(8, 6), None, x
        ),
        "embedding": Example(
            HostShape(family="embedding", d_in=9, d_out=8),
            lambda x, w: F.embedding(x, w.T), lambda x, w: w.T[x], torch.randn(8, 9), None, torch.randint(9, (2, 6)),
        ),
        "scaled-embedding": Example(
            HostShape(family="embedding", d_in=9, d_out=8, plain=False),
            lambda x, w: 3 * F.embedding(x, w.T), lambda x, w: 3 * w.T[x],
            torch.randn(8, 9), None, torch.randint(9, (2, 6)),
        ),
        "conv1d": _conv(1, kernel=(3,), bias=True),
        "conv2d": _conv(2, kernel=(3, 2), bias=True),
        "conv3d": _conv(3, kernel=(1, 2, 3), bias=False),
        "conv2d-grouped": _conv(2, kernel=(3, 3), bias=True, groups=2),
        "norm": Example(
            HostShape(family="norm", d_in=6, d_out=6, bias=True),
            _torch_norm, _norm, torch.randn(6), torch.randn(6), x,
        ),
        "norm-no-bias": Example(HostShape(family="norm", d_in=6, d_out=6), _torch_norm, _norm, torch.randn(6), None, x),
        "norm-of-maps": Example(
            HostShape(family="norm", d_in=6, d_out=6, bias=True, channels_first=True, grouped=True),
            lambda x, w: _torch_norm(x.movedim(1, -1), w).movedim(-1, 1),
            lambda x, w: np.moveaxis(_norm(np.moveaxis(x, 1, -1), w), -1, 1),
            torch.randn(6), torch.randn(6), torch.randn(2, 6, 4),
        ),
        "block": Example(HostShape(family="block", d_in=6, d_out=6), F.linear, lambda x, w: x @ w.T, None, None, x),
    }  # fmt: skip


HOSTS = examples()
