"""A live module's tensors, under the names that they have in checkpoint files.

Identity lives in the name space of files. Plain modules have the same names in both. Models
of transformers 5 do not: it renames, splits and fuses when it loads, and undoes that when it
saves, by rules that it keeps on the model. Those very rules are asked here, so that a module
gives what ``save_pretrained`` of it would write. Tied aliases are dropped as it drops them.
"""

from __future__ import annotations

__all__ = ["checkpoint_names", "module_checkpoint", "views"]

from typing import TYPE_CHECKING, Any

from deltahub.errors import IdentityError
from deltahub.identity.checkpoints import ValueCheckpoint, place, shared
from deltahub.targets import SITE_PREFIX, backbone_modules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn


def _inner(module: nn.Module) -> tuple[str, nn.Module]:
    """The one pretrained model inside a wrapper such as a sentence transformer, with its prefix; or the module."""
    found: list[tuple[str, nn.Module]] = []
    for name, part in backbone_modules(module).items():
        if any(name == at or name.startswith(f"{at}.") for at, _ in found if at):
            continue
        if any(
            base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.")
            for base in type(part).__mro__
        ):
            if not name:
                return "", module
            found.append((name, part))
    return (f"{found[0][0]}.", found[0][1]) if len(found) == 1 else ("", module)


def _state(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """State dictionary without what is not saved and without aliases, and the aliases."""
    import torch

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {
        name: value
        for name, value in _tensors(model).items()
        if isinstance(value, torch.Tensor) and name not in ignored
    }
    if any(value.is_meta for value in state.values()):
        name = next(name for name, value in state.items() if value.is_meta)
        raise IdentityError(
            "E_IDENTITY_VALUES",
            "the module has tensors without values",
            found=name,
            hint="load the weights first, or check the backbone by its files",
        )
    declared = set(getattr(model, "all_tied_weights_keys", None) or ())
    ties: dict[str, str] = {}
    for names in shared(state):
        kept = next((name for name in names if name not in declared), names[0])
        ties.update((name, kept) for name in names if name != kept)
    return {name: value for name, value in state.items() if name not in ties}, ties


def _tensors(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict(keep_vars=True)``: the very tensors, whose leaves are remembered.

    Where neither hooks nor overriding methods have a say, it is gathered without entering the sites of deltas, of which
    there may be very many and which give nothing.
    """
    from torch import nn

    found: dict[str, Any] = {}
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if type(module).state_dict is not nn.Module.state_dict or (
            module._state_dict_hooks or module._state_dict_pre_hooks
        ):
            return dict(model.state_dict(keep_vars=True))
        module._save_to_state_dict(found, prefix, keep_vars=True)
        waiting += [
            (f"{prefix}{name}.", child)
            for name, child in reversed(module._modules.items())
            if child is not None and not name.startswith(SITE_PREFIX)
        ]
    return found


def _saved(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state dictionary as ``save_pretrained`` would name and shape it."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "base_model_prefix"):
        return state
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps the names of files
        return state
    with torch.no_grad():
        result: dict[str, Any] = revert_weight_conversion(model, dict(state))  # type: ignore[arg-type]
    return result


def _in_full(state: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a state dictionary with all their values: what processes share is put together, by all of them."""
    odd = next((n for n, v in state.items() if type(v).__module__.startswith(("torchao.", "bitsandbytes."))), None)
    if odd is not None:
        raise IdentityError(
            "E_IDENTITY_VALUES",
            "the module was quantised in memory, and the backbone is what its files hold",
            found=odd,
            hint="name the files that it was quantised from: backbone=, or do not check it: verify=None",
        )
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def _names(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Live name to checkpoint name, of those tensors that were renamed at most."""
    places = {place(value): name for name, value in after.items()}
    places.pop(None, None)
    found = {}
    for name, value in before.items():
        other = places.get(place(value))
        if name in after and (other is None or after[name] is value):
            other = name
        if other is not None:
            found[name] = other
    return found


def checkpoint_names(module: nn.Module) -> dict[str, str]:
    """Live parameter or buffer name to its name in checkpoint files.

    A tied alias maps to the name that files keep. What is not in files under its own, such as a part of a
    fused tensor, is left out.
    """
    prefix, model = _inner(module)
    state, ties = _state(model)
    names = _names(state, _saved(model, state))
    names.update({alias: names[kept] for alias, kept in ties.items() if kept in names})
    return {prefix + live: name for live, name in names.items()}


def module_checkpoint(module: nn.Module) -> ValueCheckpoint:
    """The tensors of a live module as its checkpoint would hold them.

    Raises:
        IdentityError: ``E_IDENTITY_VALUES``: tensors on ``meta``, quantised in memory, or otherwise without bytes.
    """
    _, model = _inner(module)
    state, ties = _state(model)
    state = _in_full(state)
    saved = _saved(model, state)
    names = _names(state, saved)
    where = f"{type(model).__module__}.{type(model).__qualname__}"
    return ValueCheckpoint(where, saved, {alias: names.get(kept, kept) for alias, kept in ties.items()})


def views(module: nn.Module, names: Mapping[str, object]) -> Iterator[dict[str, str]]:
    """Ways in which a module's tensors may be called in the backbone's files: mappings from there to ``names``.

    A checkpoint of a bare encoder is loaded into a class with a head, and one with a head into the bare
    class; the difference is the prefix of the base model and the tensors beside it.
    """
    yield {name: name for name in names}
    _, model = _inner(module)
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(prefix, str) or not prefix:
        return
    prefix += "."
    base = [name for name in names if name.startswith(prefix)]
    if base:
        yield {name.removeprefix(prefix): name for name in base}
        yield {name: name for name in base}
    else:
        yield {prefix + name: name for name in names}
        state, _ = _state(model)  # conversion may have taken the prefix away already, so live names decide
        live = _names(state, _saved(model, state))
        stripped = {live[name] for name in live if name.startswith(prefix)} & set(names)
        if stripped and len(stripped) < len(names):
            yield {name: name for name in names if name in stripped}
