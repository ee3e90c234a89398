"""Who must know of a prompt besides the transformer that it is before, and hears of it through hooks.

A decoder that attends to an encoder's output: the mask of what it attends to grows. A language model that is given
labels: its loss is also for the first token, which the prompt foretells.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.prompting import Prompts, cut, transformer_of

__all__ = ["hear", "unhear"]

_CARRIED = "deltahub"
"""The key under which word of a call's labels travels among its keyword arguments (:mod:`deltahub.contexts`)."""
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""How the names of classes end whose loss compares each position with the label after it."""
_IGNORED = -100
"""The label that no loss counts."""


class _Plan(Protocol):
    prompted: Any

    def prompts(self, rows: int) -> Prompts | None: ...


def _acting(transformer: nn.Module, rows: int) -> Prompts | None:
    """The prompts that act on a transformer now."""
    slot: Any = transformer.__dict__.get("_deltahub")
    plan: _Plan | None = None if slot is None else slot.plan()
    return plan.prompts(rows) if plan is not None and plan.prompted else None


@dataclass(frozen=True, slots=True)
class _Reader:
    """A hook on a decoder: the mask of the states that it attends to covers the prompt."""

    transformer: nn.Module

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None:
            return None
        prompts = _acting(self.transformer, states.shape[0])
        if prompts is None:
            return None
        length = states.shape[1] - prompts.longest
        if mask is None:
            if prompts.even:
                return None
            mask = torch.ones(states.shape[0], length, dtype=torch.long, device=states.device)
        if mask.shape[-1] != length:  # states that were made without the prompt
            return None
        grown = prompts.before(mask, lambda p: mask.new_ones(len(p)), last=True)
        return args, {**kwargs, "encoder_attention_mask": grown}


@dataclass(frozen=True, slots=True)
class _Labelled:
    """A hook on a language model: labels for the prompt, which no loss counts, so that the first token is foretold."""

    transformer: nn.Module
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        labels: Any = given.get("labels")
        if labels is None:
            return None
        prompts = _acting(self.transformer, labels.shape[0])
        if prompts is None:
            return None
        if prompts.groups is not None:  # nothing foretells the first token of a row without a prompt
            bare = [not len(prompts.values[group]) for group in prompts.groups]
            labels = labels.clone()
            labels[torch.tensor(bare, device=labels.device), 0] = _IGNORED
        given["labels"] = F.pad(labels, (prompts.longest, 0), value=_IGNORED)
        return (), {**given, _CARRIED: {"labels": labels.shape[1]}}


def _shorten(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """A hook on a language model: what it says of the prompt is left out again."""
    kept = kwargs.get(_CARRIED, {}).get("labels")
    if kept is None:
        return None
    first = out["logits"] if hasattr(out, "keys") else next(o for o in out if isinstance(o, Tensor) and o.ndim == 3)
    return cut(out, first.shape[1], lambda y: y[:, -kept:])


def hear(modules: Mapping[str, nn.Module], path: str) -> None:
    """Let those who must know hear of the prompts of a transformer from now on; those who do already are left alone.

    Args:
        modules: all modules of the model by path, the root under ``""``.
        path: of the transformer, which has its site by now.
    """
    module: Any = modules[path]
    entry = transformer_of(module._deltahub.base)
    assert entry is not None
    above = path.rpartition(".")[0]
    reader = modules.get(f"{above}.{entry.reader}".lstrip(".")) if entry.reader else None
    if reader is not None and reader is not module:
        module._deltahub.read = True
        if not _heard(reader, module):
            reader.register_forward_pre_hook(_Reader(module), with_kwargs=True)
    owner = _owner(modules, above)
    if owner is not None and not _heard(owner, module):
        names = tuple(inspect.signature(type(owner).forward).parameters)[1:]
        owner.register_forward_pre_hook(_Labelled(module, names), with_kwargs=True)
        owner.register_forward_hook(_shorten, with_kwargs=True)


def _owner(modules: Mapping[str, nn.Module], above: str) -> nn.Module | None:
    """The language model around a transformer, if it is part of one."""
    while True:
        if type(modules[above]).__name__.endswith(_LANGUAGE_MODELS):
            return modules[above]
        if not above:
            return None
        above = above.rpartition(".")[0]


def _heard(module: nn.Module, transformer: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return any(isinstance(h, (_Reader, _Labelled)) and h.transformer is transformer for h in hooks)


def unhear(modules: Mapping[str, nn.Module], path: str) -> None:
    """Take the hooks of :func:`hear` off again."""
    transformer = modules[path]
    for module in modules.values():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (_Reader, _Labelled)) and hook.transformer is transformer:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if any(isinstance(hook, _Labelled) for hook in module._forward_pre_hooks.values()):
            continue
        for key, after in list(module._forward_hooks.items()):
            if after is _shorten:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
