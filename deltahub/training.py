"""Training with the tools at hand: ``transformers.Trainer`` and ``accelerate`` need nothing of ours to train a delta.

Only a delta's tensors ask for gradients, so only they reach an optimiser. What a checkpoint holds is another matter:
the model's own keys are the backbone's, and a delta is not among them. :class:`DeltaCallback` makes the checkpoints of
a ``Trainer`` hold the delta and nothing else; :func:`delta_state` and :func:`load_delta_state` do the same by hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltahub.composition import deltas
from deltahub.errors import InjectionError
from deltahub.tensors import write

if TYPE_CHECKING:
    import os

__all__ = ["DeltaCallback", "delta_state", "load_delta_state"]

_PREFIX = "deltahub/"
_HOOKED = ("save_pretrained", "load_state_dict")


def delta_state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of all deltas on a model: ``deltahub/<delta>/<module>/<target>/<tensor>``."""
    return {f"{_PREFIX}{name}/{key}": t for name, delta in deltas(model).items() for key, t in delta.tensors().items()}


def load_delta_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put what :func:`delta_state` gave into the deltas of a model; all of it or nothing.

    Raises:
        InjectionError: ``E_INJECTION_STATE`` where names or shapes are not those of the model's deltas.
    """
    own = delta_state(model)
    wrong = sorted(n for n in own.keys() | state.keys() if n not in own or n not in state)
    wrong += sorted(n for n in own.keys() & state.keys() if own[n].shape != state[n].shape)
    if wrong:
        raise InjectionError(
            "E_INJECTION_STATE",
            "the checkpoint is not of the deltas on this model",
            found=", ".join(wrong[:4]),
            hint="attach the same kinds with the same configs, targets and names first",
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _save(model: nn.Module, directory: str | os.PathLike[str], *, is_main_process: bool = True, **_: Any) -> None:
    state = delta_state(model)
    if is_main_process:
        Path(directory).mkdir(parents=True, exist_ok=True)
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
        write(
            Path(directory) / "model.safetensors",
            {name: t.cpu().contiguous() for name, t in whole.items()},
            metadata={"format": "pt"},
        )


def _load(model: nn.Module, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    if not state or not all(name.startswith(_PREFIX) for name in state):
        return type(model).load_state_dict(model, state, *args, **kwargs)
    load_delta_state(model, state)
    return torch.nn.modules.module._IncompatibleKeys([], [])


class DeltaCallback:
    """A callback for ``transformers.Trainer``: checkpoints hold the delta and nothing else, and resume.

    ``Trainer(model, args, callbacks=[DeltaCallback()])``. While the trainer lives until the end of a training, the
    model's ``save_pretrained`` writes its deltas; afterwards it is what it was.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(name)
        return self._idle

    def _idle(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All events that are of no interest."""

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Before a checkpoint is resumed from."""
        self._hook(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self._hook(model)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        for name in _HOOKED:
            model.__dict__.pop(name, None)

    @staticmethod
    def _hook(model: nn.Module) -> None:
        if not deltas(model):
            raise InjectionError(
                "E_INJECTION_NONE", "no delta is attached to this model", hint="attach one before the trainer is made"
            )
        hooks: dict[str, Callable[..., Any]] = {"save_pretrained": _save, "load_state_dict": _load}
        for name, hook in hooks.items():
            model.__dict__[name] = functools.partial(hook, model)
