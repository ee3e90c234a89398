"""Attention as a host: what it may attend to besides its own keys and values.

The attention modules of transformers hand queries, keys and values, after rotation and after the cache, to a function
that they look up by name. A hosted attention runs its own ``forward`` with that one look-up answered by
:class:`_Lookup`, which puts the learned keys and values before those of the tokens. So nothing learned is in a cache,
positions stay what they are, masks are those of the caller, and every way to generate text works.

Which classes are attention is data: ``spec/attention.toml``.
"""

from __future__ import annotations

import functools
import math
import tomllib
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.errors import HostError
from deltahub.hosts import view_of
from deltahub.kinds.host_shape import HostShape
from deltahub.targets import class_names

__all__ = ["Attention", "Extra", "attending", "attention_of", "check_bias", "joined", "shape_of"]

_LOOKUP = "ALL_ATTENTION_FUNCTIONS"
"""The name under which modelling code of transformers looks its attention function up."""
_PLAIN = 3
"""Axes of keys and values that all rows share."""
_HEEDED = (None, "eager", "sdpa")
"""Attention functions that take a mask for every key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """A class of attention modules.

    Attributes:
        name: library and class, such as ``transformers.BertSelfAttention``.
        keys: path of the module inside it whose output is the keys.
        parts: how many equal parts that output has, of which the keys are one.
        bias: the attribute that says whether it makes the bias of positions itself, if it adds one to its scores.
    """

    name: str
    keys: str
    parts: int = 1
    bias: str = ""


@functools.cache
def _table() -> Mapping[str, Attention]:
    data = tomllib.loads(files("deltahub.spec").joinpath("attention.toml").read_text(encoding="utf-8"))
    found = [Attention(**{"name" if k == "class" else k: v for k, v in entry.items()}) for entry in data["attention"]]
    return {entry.name: entry for entry in found}


def attention_of(base: Any) -> Attention | None:
    """What is known of a class as attention; ``None`` for any other."""
    entry = next((_table()[name] for name in class_names(base) if name in _table()), None)
    return entry if entry is not None and _LOOKUP in base.forward.__globals__ else None


def shape_of(module: nn.Module, base: Any, families: frozenset[str], shape: HostShape) -> HostShape:
    """A block's facts as attention, where that is what a kind acts on and the module is.

    Args:
        module: the host.
        base: its class before any delta.
        families: what the kind acts on.
        shape: the host as any other kind sees it.
    """
    entry = attention_of(base) if "attention" in families and shape.family == "block" else None
    if entry is None:
        return shape
    keys = module.get_submodule(entry.keys)
    facts = view_of(keys).shape(keys, type(keys))
    width = None if facts.d_out is None else facts.d_out // entry.parts
    return replace(shape, family="attention", d_in=facts.d_in, d_out=width)


def check_bias(ports: Collection[str], module: nn.Module, base: Any, path: str) -> None:
    """Refuse equations about a bias of positions on an attention that has none, or not its own.

    Raises:
        HostError: ``E_HOST_ATTENTION``.
    """
    if not {"past", "scores"} & set(ports):
        return
    entry = attention_of(base)
    if entry is None or not entry.bias or ("past" in ports and not getattr(module, entry.bias, False)):
        raise HostError(
            "E_HOST_ATTENTION",
            "this attention has no bias of relative positions of its own",
            where=f"{path} ({base.__name__})",
            hint="leave relative_bias as it is",
        )


@functools.cache
def attending(original: Any) -> Callable[..., Any]:
    """An attention's ``forward`` whose look-up of the attention function is ours; made once per class."""
    names = {**original.__globals__, _LOOKUP: _Lookup(original.__globals__[_LOOKUP])}
    del names["__name__"]  # or torch.compile looks names up in the module of that name instead
    twin = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    twin.__kwdefaults__ = original.__kwdefaults__
    return twin


class _Lookup:
    """Stands in for the library's table of attention functions."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def get_interface(self, implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
        function = self.table.get_interface(implementation, default)

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
            plan = module._deltahub.plan()
            extra = plan.further(module, key, module._deltahub.seen.x if plan.sees else None)
            if plan.rescored:
                kwargs["position_bias"] = plan.rescore(module, kwargs["position_bias"])
            if extra is None:
                return function(module, query, key, value, mask, **kwargs)
            if implementation not in _HEEDED:
                raise HostError(
                    "E_HOST_ATTENTION",
                    f"attention by {implementation!r} cannot take further keys and values",
                    where=type(module).__name__,
                    expected="eager or sdpa",
                    hint='load the model with attn_implementation="sdpa"',
                )
            return _with(extra, function, implementation, (module, query, key, value, mask), kwargs)

        return attend


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """Further keys and values.

    Attributes:
        key: ``[1 or rows, heads, length, size]``.
        value: the same.
        weight: ``[1 or rows, length]``: logarithm of what attention to each counts for; ``None`` for 0 throughout.
        placed: how many at a time have a position, or have none: those that do stand before the tokens, next to them
            and in this order.
    """

    key: Tensor
    value: Tensor
    weight: Tensor | None
    placed: tuple[tuple[int, bool], ...]


def _with(
    extra: Extra, function: Callable[..., Any], implementation: str | None, given: tuple[Any, ...], kwargs: Any
) -> Any:
    module, query, key, value, mask = given
    rows, length = key.shape[0], extra.key.shape[2]
    queries, own = query.shape[2], key.shape[2]
    if mask is None and implementation == "sdpa":
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal and queries > 1:
            mask = torch.ones(1, 1, queries, own, dtype=torch.bool, device=key.device).tril()
    kwargs["is_causal"] = False
    if extra.weight is not None:
        lowest = torch.finfo(query.dtype).min
        mask = key.new_zeros(1, 1, 1, own) if mask is None else mask
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        weight = extra.weight.to(query.dtype).clamp_min(lowest)[:, None, None]
        shape = (max(mask.shape[0], weight.shape[0]), mask.shape[1], mask.shape[2])
        mask = torch.cat([weight.expand(*shape, -1), mask.expand(*shape, -1)], -1)
    elif mask is not None:
        mask = F.pad(mask, (length, 0), value=1.0 if mask.dtype == torch.bool else 0.0)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = _positions(extra, module, kwargs["position_bias"])
    key = torch.cat([extra.key.expand(rows, -1, -1, -1), key], 2)
    value = torch.cat([extra.value.expand(rows, -1, -1, -1), value], 2)
    return function(module, query, key, value, mask, **kwargs)


def _positions(extra: Extra, module: Any, bias: Tensor) -> Tensor:
    """The bias of positions with columns for further keys: zero, or of where they stand."""
    if not any(has for _, has in extra.placed):
        return F.pad(bias, (extra.key.shape[2], 0))
    placed = [has for length, has in extra.placed for _ in range(length)]
    count, (queries, own) = sum(placed), bias.shape[-2:]
    # The attention's own table, asked for tokens that stand behind the further keys.
    whole = module.compute_bias(queries, count + own, device=bias.device, past_seen_tokens=count + own - queries)
    before = whole[..., :count].to(bias.dtype)
    columns = bias.new_zeros(*before.shape[:-1], len(placed))
    columns[..., torch.tensor(placed, device=bias.device)] = before
    return torch.cat([columns.expand(bias.shape[0], -1, -1, -1), bias], -1)


class _Site(Protocol):
    delta: str
    path: str
    bound: Any

    def tensors(self) -> list[Tensor]: ...


def joined(
    sites: Sequence[_Site], strength: Mapping[str, float], module: nn.Module, key: Tensor, x: Tensor | None
) -> Extra | None:
    """The keys and values of several sites, those of a later one before those of an earlier.

    A strength s multiplies what attention to them counts for, so that 0 is the backbone.

    Args:
        sites: those with a ``kv`` or ``past`` equation, in order.
        strength: the user's scale of each delta.
        module: the host.
        key: its own keys, ``[rows, heads, tokens, size]``.
        x: its input, ``[rows, tokens, width]``, where an equation sees it.

    Raises:
        HostError: ``E_HOST_ATTENTION`` for a negative strength.
    """
    keys, values, weights = [], [], []
    placed: list[tuple[int, bool]] = []
    heads, size = key.shape[1], key.shape[3]
    for site in reversed(sites):
        s = strength.get(site.delta, 1.0)
        if s == 0.0:
            continue
        if s < 0.0:
            raise HostError("E_HOST_ATTENTION", "a prefix cannot be scaled by less than 0", where=site.path, found=s)
        tensors = [t.to(key.dtype) if t.is_floating_point() else t for t in site.tensors()]
        ports = site.bound.ports
        kv = ports["past" if "past" in ports else "kv"].fn(module, x, *tensors)
        both = kv.reshape(2, *(kv.shape[1:2] if kv.ndim > _PLAIN else (1,)), -1, heads, size).transpose(2, 3)
        keys.append(both[0])
        values.append(both[1])
        placed.append((both.shape[3], "past" in ports))  # the length may be symbolic: it is not counted out here
        weights.append((both.shape[3], math.log(s)))
    if not keys:
        return None
    weight = None
    if any(log for _, log in weights):
        weight = torch.cat([key.new_full((1, n), log) for n, log in weights], -1)
    rows = max(part.shape[0] for part in keys)
    keys, values = ([part.expand(rows, -1, -1, -1) for part in parts] for parts in (keys, values))
    return Extra(key=torch.cat(keys, 2), value=torch.cat(values, 2), weight=weight, placed=tuple(placed))
