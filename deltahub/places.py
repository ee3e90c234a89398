"""Hosts that are no whole modules: a parameter that its module uses by itself, and some rows of a fused weight.

A *parameter* is a host of its own where its module computes with it without calling a linear layer: the projections of
``nn.MultiheadAttention``, and the stacked matrices of a mixture of experts, which are as many linear maps as there are
experts. It is written as a target by its own path, ``mlp.experts.gate_up_proj``, which no module can have.

*Rows* are the outputs of a linear map that belong together: the queries of a fused projection. Which they are is three
numbers, whatever a library calls them, whether they lie in one piece or interleaved head by head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltahub.errors import HostError
from deltahub.hosts import View, shadow_of, view_of
from deltahub.kinds.host_shape import HostShape
from deltahub.sharing import sharded_as, whole

__all__ = ["ParameterView", "Place", "Rows", "fitted", "overlap", "parameters_of", "place_of", "with_parameters"]

_STACKED = 3
"""Axes of a parameter that is a stack of matrices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Outputs ``r`` of a linear map with ``start <= r % period < stop``: rows of its weight, channels of its output."""

    start: int
    stop: int
    period: int

    @classmethod
    def of(cls, numbers: Sequence[int] | None) -> Rows | None:
        """From the three numbers of a manifest."""
        return None if numbers is None else cls(start=numbers[0], stop=numbers[1], period=numbers[2])

    @property
    def numbers(self) -> tuple[int, int, int]:
        return (self.start, self.stop, self.period)

    def count(self, out: int, where: str) -> int:
        """How many of ``out`` outputs they are.

        Raises:
            HostError: ``E_HOST_ROWS`` where the outputs are no whole number of periods.
        """
        if out % self.period:
            raise HostError(
                "E_HOST_ROWS",
                "the outputs of this host are no whole number of the periods that its rows repeat by",
                where=where,
                expected=f"a multiple of {self.period}",
                found=out,
                hint="the delta was made for a backbone of another width",
            )
        return out // self.period * (self.stop - self.start)

    def take(self, value: Tensor, axis: int) -> Tensor:
        """These rows along an axis; a view where they lie in one piece."""
        axis %= value.ndim
        if value.shape[axis] == self.period:
            return value.narrow(axis, self.start, self.stop - self.start)
        return (
            _cut(value, axis, self.period).narrow(axis + 1, self.start, self.stop - self.start).flatten(axis, axis + 1)
        )

    def put(self, value: Tensor, rows: Tensor, axis: int) -> Tensor:
        """A copy with other values in these rows."""
        axis %= value.ndim
        grouped = _cut(value, axis, self.period)
        pieces = [
            grouped.narrow(axis + 1, 0, self.start),
            _cut(rows, axis, self.stop - self.start),
            grouped.narrow(axis + 1, self.stop, self.period - self.stop),
        ]
        return torch.cat([piece for piece in pieces if piece.shape[axis + 1]], axis + 1).flatten(axis, axis + 1)


def overlap(one: Rows | None, other: Rows | None) -> bool:
    """Whether two have an output of a host in common; ``None`` is all of them."""
    if one is None or other is None:
        return True
    both = range(math.lcm(one.period, other.period))  # divides the outputs of a host that both fit
    mine = {r for r in both if one.start <= r % one.period < one.stop}
    return any(r in mine for r in both if other.start <= r % other.period < other.stop)


def _cut(value: Tensor, axis: int, length: int) -> Tensor:
    """An axis as two, the second of which has this length."""
    return value.reshape(*value.shape[:axis], -1, length, *value.shape[axis + 1 :])


def _held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter by its name below a module."""
    inner, _, last = name.rpartition(".")
    return cast("Tensor | None", module.get_submodule(inner)._parameters.get(last))


@dataclass(frozen=True)
class ParameterView(View):
    """A parameter of a module as a linear host, or as a stack of them.

    Attributes:
        weight_name: its name below the module.
        bias_name: that of the bias that belongs to it; ``None`` for none.
        transposed: whether it is stored as ``[…, in, out]``.
        stacked: whether its first axis counts linear maps.
    """

    weight_name: str
    bias_name: str | None = None
    transposed: bool = False
    stacked: bool = False

    def __reduce__(self) -> Any:
        return (ParameterView, (self.weight_name, self.bias_name, self.transposed, self.stacked))

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        return False  # never found by a module's type

    def stack(self, module: nn.Module) -> int:
        """How many linear maps it is; 0 for one that is no stack."""
        return self.like(module).shape[0] if self.stacked else 0

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        d_out, d_in = self.canonical(self.like(module)).shape[-2:]
        return HostShape(family="linear", d_in=d_in, d_out=d_out, bias=self.bias_name is not None)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.mT if self.transposed else stored

    def stored(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def weight(self, module: nn.Module) -> Tensor:
        return self.canonical(whole(self.like(module)))

    def like(self, module: nn.Module) -> Tensor:
        return cast(Tensor, _held(module, self.weight_name))

    def bias(self, module: nn.Module) -> Tensor | None:
        bias = None if self.bias_name is None else _held(module, self.bias_name)
        return None if bias is None else whole(bias)

    def takes_bias(self, module: nn.Module) -> bool:
        return self.bias_name is not None

    def acting(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor | None]:
        """What the module's parameters are to be, by name."""
        values: dict[str, Tensor | None] = {self.weight_name: sharded_as(self.stored(weight), self.like(module))}
        if self.bias_name is not None and bias is not None:
            values[self.bias_name] = sharded_as(bias, cast(Tensor, _held(module, self.bias_name)))
        return values


def with_parameters(module: nn.Module, base: type[nn.Module], values: Mapping[str, Tensor | None]) -> nn.Module:
    """The module with other parameters, also in modules directly below it; the module itself stays as it is."""
    own = {name: value for name, value in values.items() if "." not in name}
    below: dict[str, dict[str, Tensor | None]] = {}
    for name, value in values.items():
        if "." in name:
            child, _, last = name.partition(".")
            below.setdefault(child, {})[last] = value
    made = shadow_of(module, base, own)
    if below:
        children = {name: cast(nn.Module, module._modules[name]) for name in below}
        others = {n: shadow_of(child, type(child), below[n]) for n, child in children.items()}
        made.__dict__["_modules"] = {**module._modules, **others}
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a target is: the module that carries its sites, and how the host is seen where that is not by its type."""

    module: nn.Module
    view: ParameterView | None = None
    source: tuple[str, nn.Module] | None = None
    """The module whose input is read in place of this one's own, with its path."""


def _parameter_view(module: nn.Module, name: str) -> ParameterView | None:
    """How a module's parameter is seen as a host of its own; ``None`` where it is none."""
    if isinstance(module, nn.MultiheadAttention):
        if name == "out_proj":  # its forward takes the weight of this layer and never calls it
            named = None if module.out_proj._parameters.get("bias") is None else "out_proj.bias"
            return ParameterView("out_proj.weight", named)
        if name in _PROJECTIONS and module._parameters.get(name) is not None:
            whole = name == "in_proj_weight" and module._parameters.get("in_proj_bias") is not None
            return ParameterView(name, "in_proj_bias" if whole else None)
        return None
    value = cast("Tensor | None", module._parameters.get(name))
    if value is None or value.ndim != _STACKED or view_of(module).weight_name is not None:
        return None
    bias = cast("Tensor | None", module._parameters.get(f"{name}_bias"))
    named = f"{name}_bias" if bias is not None and bias.ndim == _STACKED - 1 else None
    return ParameterView(name, named, bool(getattr(module, "is_transposed", False)), stacked=True)


_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FUSED = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}


def place_of(modules: Mapping[str, nn.Module], path: str) -> Place | None:
    """What a target's path names; ``None`` where there is neither such a module nor such a parameter.

    Args:
        modules: the model's modules by path, its root under the empty one.
        path: of a module, or of a parameter that is a host of its own.

    Raises:
        HostError: ``E_HOST_NOT_RUN`` for a projection whose attention runs a fused one in its place.
    """
    parent_path, _, name = path.rpartition(".")
    parent = modules.get(parent_path) if path else None
    view = None if parent is None else _parameter_view(parent, name)
    if view is not None:
        assert parent is not None
        return Place(module=parent, view=view)
    if name in _FUSED and getattr(parent, "fused_projections", False):
        raise HostError(
            "E_HOST_NOT_RUN",
            "this projection is never run: the attention around it uses a fused one",
            where=path,
            hint="unfuse the projections first, or target the fused one",
        )
    module = modules.get(path) if path else None
    return None if module is None else Place(module=module)


def fitted(shape: HostShape, rows: Rows | None, stack: int, found: int, path: str) -> HostShape:
    """A host's facts as a site sees them that is on some of its outputs, or on a stack of it.

    Args:
        shape: the facts of the whole host, or of one map of it.
        rows: the outputs that the site is on; ``None`` for all.
        stack: how many linear maps the delta was made for; 0 for no stack.
        found: how many the host is.
        path: of the host, for messages.

    Raises:
        HostError: ``E_HOST_STACK``, ``E_HOST_ROWS``.
    """
    if stack != found:
        raise HostError(
            "E_HOST_STACK",
            "this host is another number of linear maps than the delta was made for",
            where=path,
            expected=stack or "no stack",
            found=found or "no stack",
        )
    if rows is None:
        return shape
    if shape.family != "linear" or shape.d_out is None:
        raise HostError("E_HOST_ROWS", "only a linear host has rows", where=path, found=shape.family)
    return replace(shape, d_out=rows.count(shape.d_out, path))


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All parameters that are hosts of their own, by path, with the module that holds each."""
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        for name in module._parameters:
            if _parameter_view(module, name) is not None:
                found[f"{path}.{name}" if path else name] = module
    return found
