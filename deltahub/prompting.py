"""A transformer as a host: learned embeddings before those of its tokens.

The prompt is joined to the embeddings inside the call of the module that makes them, with a mask and positions to
match; nothing that the caller passed is changed, and what comes back are the positions of the caller's own tokens.
Which classes are such transformers is data: ``spec/prompting.toml``.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltahub.errors import HostError
from deltahub.kinds.host_shape import HostShape
from deltahub.targets import class_names

__all__ = [
    "Prompted",
    "Prompts",
    "Transformer",
    "cut",
    "embedding_of",
    "embeddings_before",
    "shape_of",
    "transformer_of",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Transformer:
    """A class of modules that embed tokens themselves.

    Attributes:
        name: library and class, such as ``transformers.LlamaModel``.
        causal: ``always``, ``never``, or the path of the attribute that says whether tokens see only earlier ones.
        positions: ``given``, ``relative`` or ``counted``.
        reader: name of the module next to it that attends to its output.
    """

    name: str
    causal: str
    positions: str
    reader: str = ""

    def is_causal(self, module: nn.Module) -> bool:
        if self.causal in {"always", "never"}:
            return self.causal == "always"
        return bool(functools.reduce(getattr, self.causal.split("."), module))


@functools.cache
def _table() -> Mapping[str, Transformer]:
    data = tomllib.loads(files("deltahub.spec").joinpath("prompting.toml").read_text(encoding="utf-8"))
    found = [Transformer(**{"name" if k == "class" else k: v for k, v in e.items()}) for e in data["transformer"]]
    return {entry.name: entry for entry in found}


def transformer_of(base: Any) -> Transformer | None:
    """What is known of a class as a transformer; ``None`` for any other."""
    return next((_table()[name] for name in class_names(base) if name in _table()), None)


def embedding_of(module: Any) -> nn.Module:
    """The module that embeds the tokens of a transformer."""
    found: nn.Module = module.get_input_embeddings()
    return found


def shape_of(module: nn.Module, base: Any, families: frozenset[str], shape: HostShape) -> HostShape:
    """A block's facts as a transformer, where that is what a kind acts on and the module is.

    Args:
        module: the host.
        base: its class before any delta.
        families: what the kind acts on.
        shape: the host as any other kind sees it.
    """
    if "transformer" not in families or shape.family != "block" or transformer_of(base) is None:
        return shape
    weight = embedding_of(module).weight
    assert isinstance(weight, Tensor)
    return replace(shape, family="transformer", d_in=weight.shape[0], d_out=weight.shape[1])


class _Site(Protocol):
    delta: str
    bound: Any

    def tensors(self) -> list[Tensor]: ...


class _Plan(Protocol):
    prompted: Any

    def prompts(self, rows: int) -> Prompts | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """What stands before the tokens of a batch.

    Attributes:
        values: one for each group of rows, ``[its length, width]``.
        groups: the group of each row; ``None`` where all are of the only one.
    """

    values: tuple[Tensor, ...]
    groups: tuple[int, ...] | None = None

    @property
    def longest(self) -> int:
        return max(len(value) for value in self.values)

    @property
    def even(self) -> bool:
        """Whether all rows have prompts of one length."""
        return len({len(value) for value in self.values}) == 1

    def before(self, body: Tensor, make: Callable[[Tensor], Tensor], *, last: bool) -> Tensor:
        """A sequence for each row, its prompt's part before its own: ``[rows, longest + length, ...]``.

        Args:
            body: the rows' own parts, ``[rows or 1, length, ...]``.
            make: a prompt's part from its embeddings.
            last: whether what fills up rows of shorter prompts stands at the end.
        """
        parts = [make(value) for value in self.values]
        if self.even and (self.groups is None or body.shape[0] != len(self.groups)):
            return torch.cat([parts[0].expand(body.shape[0], *parts[0].shape), body], 1)
        assert self.groups is not None
        rows = []
        for group, own in zip(self.groups, body.expand(len(self.groups), *body.shape[1:]), strict=True):
            gap = own.new_zeros(self.longest - len(parts[group]), *own.shape[1:])
            rows.append(torch.cat([parts[group], own, gap] if last else [gap, parts[group], own]))
        return torch.stack(rows)

    def after(self, y: Tensor, *, last: bool) -> Tensor:
        """The tokens' own part of ``[rows, longest + length, ...]``."""
        if self.groups is None or self.even or not last:
            return y[:, self.longest :]
        length = y.shape[1] - self.longest
        starts = [len(self.values[group]) for group in self.groups]
        return torch.stack([row[start : start + length] for row, start in zip(y, starts, strict=True)])

    def shift(self, positions: Tensor) -> Tensor:
        """Positions of tokens, ``[rows or 1, length]``, behind those of the prompt."""
        if self.groups is None or self.even:
            return positions + self.longest
        return positions + torch.tensor([[len(self.values[g])] for g in self.groups], device=positions.device)


def embeddings_before(sites: Sequence[_Site], strength: Mapping[str, float]) -> Tensor | None:
    """The prompts of several sites as one, those of a later one before those of an earlier; ``None`` for none."""
    parts = [s.bound.ports["prompt"].fn(None, *s.tensors()) for s in reversed(sites) if strength.get(s.delta, 1.0)]
    return torch.cat(parts) if len(parts) > 1 else parts[0] if parts else None


class Prompted:
    """A transformer's own ``forward``, with a plan's prompts before the tokens.

    Args:
        original: its ``forward``.
        entry: what is known of it.
        names: of the arguments of its ``forward`` behind the first, ``input_ids``.
        plan: what acts on it now.
        whole: whether the caller wants the prompt's positions too.
    """

    __slots__ = ("entry", "names", "original", "plan", "whole")

    def __init__(
        self, original: Callable[..., Any], entry: Transformer, names: Sequence[str], plan: _Plan, *, whole: bool
    ) -> None:
        self.original = original
        self.entry = entry
        self.names = names
        self.plan = plan
        self.whole = whole

    def __call__(self, module: Any, value: Tensor, *rest: Any, **kwargs: Any) -> Any:
        """Run it on token ids, ``[rows, tokens]``, or on their embeddings.

        Raises:
            HostError: ``E_HOST_PROMPT`` for a mask, positions or a cache that cannot be brought in line.
        """
        given = dict(zip(self.names, rest, strict=False)) | kwargs
        embedded = value.is_floating_point()
        prompts = self.plan.prompts(value.shape[0])
        if prompts is None:
            return self.original(module, **{**given, "inputs_embeds" if embedded else "input_ids": value})
        causal = self.entry.is_causal(module)
        cache = given.get("past_key_values") if causal else None
        past = 0 if cache is None else cache.get_seq_length()
        length = value.shape[1]
        given["attention_mask"] = self._mask(prompts, given.get("attention_mask"), value, past, last=not causal)
        if (positions := self._positions(prompts, given.get("position_ids"), value, past, last=not causal)) is not None:
            given["position_ids"] = positions
        if past:  # the prompt is in the cache
            return self.original(module, **{**given, "inputs_embeds" if embedded else "input_ids": value})
        own = value if embedded else embedding_of(module)(value)
        given["inputs_embeds"] = prompts.before(own, lambda p: p.to(own), last=not causal)
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = prompts.before(types, lambda p: types.new_zeros(len(p)), last=not causal)
        out = self.original(module, **given)
        if self.whole:
            return out
        return cut(out, prompts.longest + length, lambda y: prompts.after(y, last=not causal))

    def _mask(self, prompts: Prompts, mask: Any, value: Tensor, past: int, *, last: bool) -> Any:
        """The caller's mask with ones for the prompt; none where none is needed."""
        columns = past + value.shape[1] - (prompts.longest if past else 0)
        if mask is None:
            if prompts.even:
                return None
            mask = torch.ones(value.shape[0], columns, dtype=torch.long, device=value.device)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise _refused(
                "a prompt needs the mask of the tokens, not what was made of it",
                found=f"{mask.ndim} axes" if isinstance(mask, Tensor) else type(mask).__name__,
                hint="give attention_mask as [rows, tokens], and a cache that grows",
            )
        if mask.shape[1] != columns:
            raise _refused(
                "the mask does not fit the tokens and the cache",
                expected=f"{columns} tokens, and {prompts.longest} of the prompt",
                found=mask.shape[1],
                hint="a cache is good for as long as the same deltas act",
            )
        return prompts.before(mask, lambda p: mask.new_ones(len(p)), last=last)

    def _positions(self, prompts: Prompts, given: Any, value: Tensor, past: int, *, last: bool) -> Tensor | None:
        """Positions of prompt and tokens; ``None`` where the module's own are right."""
        if self.entry.positions == "relative":
            return None
        if self.entry.positions == "counted":
            if given is not None or not (prompts.even or last):
                raise _refused(
                    "this transformer counts the positions of its tokens itself",
                    found="positions of the caller's" if given is not None else "prompts of different lengths",
                    hint="leave position_ids out, or give rows prompts of one length",
                )
            return None
        if given is None:
            if prompts.even or last:
                return None
            start = past - prompts.longest if past else 0
            given = torch.arange(start, start + value.shape[1], device=value.device)[None]
        positions = prompts.shift(given)
        if past:
            return positions
        return prompts.before(positions, lambda p: torch.arange(len(p), device=p.device), last=last)


def _refused(what: str, **more: Any) -> HostError:
    return HostError("E_HOST_PROMPT", what, **more)


def cut(out: Any, length: int, cut: Callable[[Tensor], Tensor]) -> Any:
    """An output whose sequences of this length are those of the tokens alone; attention maps stay whole."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return cut(value) if value.ndim == 3 and value.shape[1] == length else value
        if type(value) is tuple:
            return tuple(own(item) for item in value)
        return value

    if isinstance(out, Tensor):
        return cut(out)
    if isinstance(out, tuple):
        return own(out)
    return type(out)(**{name: own(value) for name, value in out.items()})
