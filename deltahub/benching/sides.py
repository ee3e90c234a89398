"""The contestants: the same work done by DeltaHub and by peft on equal models, and what nobody can go below.

Each side attaches a LoRA to the same modules with the same numbers, so that whatever is timed afterwards is equal work.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.attaching import attach
from deltahub.composition import deltas, using
from deltahub.loading import load

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deltahub.delta import Delta

__all__ = ["FIRST", "SIDES", "Ours", "Peft", "Side", "paths_on"]

SCALE = 2.0
FIRST = "first"  # peft warns of names that are part of its own, as "a" is of "lora_"
_BOUND = 0.02


def paths_on(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """The modules that both sides attach to: what ``attach`` resolves an author's words to."""
    delta = attach(model, "lora", targets, name="where", rank=1, scale=1.0)
    paths = [site.path for site in delta.sites]
    delta.detach()
    return paths


class Side(ABC):
    """One library on one model.

    Attributes:
        model: the bare backbone.
        paths: modules that are attached to.
        rank: of every LoRA.
        live: what a forward pass goes through.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], rank: int) -> None:
        self.model = model
        self.paths = list(paths)
        self.rank = rank
        self.live: Any = model

    @abstractmethod
    def attach(self, name: str = FIRST) -> None:
        """A fresh LoRA on the bare model."""

    @abstractmethod
    def add(self, name: str) -> None:
        """A further one, which does not act."""

    @abstractmethod
    def clear(self) -> None:
        """The bare model again."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the LoRA that is attached."""

    @abstractmethod
    def load(self, folder: Path, name: str = FIRST) -> None:
        """Read it from a folder onto the bare model."""

    @abstractmethod
    def load_further(self, folder: Path, name: str) -> None:
        """Read it beside those that are there, without letting it act."""

    @abstractmethod
    def switch(self, name: str) -> None:
        """Let another one act, in the place of the one that does."""

    @abstractmethod
    def rows(self, names: Sequence[str]) -> tuple[AbstractContextManager[object], dict[str, object]]:
        """One delta for each row of a batch: a block around the forward pass, and further arguments of it."""

    @abstractmethod
    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What was attached, in an order that both sides share."""

    def fill(self, seed: int = 1) -> None:
        """Numbers into every tensor, the same on both sides."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, tensor in sorted(self.tensors()):
                tensor.uniform_(-_BOUND, _BOUND, generator=generator)

    def trainable(self) -> list[torch.Tensor]:
        return [p for p in self.live.parameters() if p.requires_grad]


class Ours(Side):
    """DeltaHub."""

    def attach(self, name: str = FIRST) -> None:
        import torch

        self._attach(name, torch.float32)  # what peft makes its own of, on a backbone in half precision too

    def attach_as_it_is(self) -> None:
        """The same in the backbone's own dtype, which is what ``deltahub.attach`` does unless it is told otherwise."""
        self._attach(FIRST, None)

    def _attach(self, name: str, dtype: torch.dtype | None) -> Delta:
        return attach(self.model, "lora", self.paths, name=name, dtype=dtype, rank=self.rank, scale=SCALE)

    def add(self, name: str) -> None:
        import torch

        self._attach(name, torch.float32).disable()

    def clear(self) -> None:
        for delta in deltas(self.model).values():
            delta.detach()

    def save(self, folder: Path) -> None:
        next(iter(deltas(self.model).values())).save(folder)

    def load(self, folder: Path, name: str = FIRST) -> None:
        load(folder, backbone=self.model, name=name)

    def load_further(self, folder: Path, name: str) -> None:
        load(folder, backbone=self.model, name=name, active=False)

    def forget(self) -> None:
        """What was remembered of files on this machine."""
        shutil.rmtree(os.environ["DELTAHUB_CACHE"], ignore_errors=True)

    def switch(self, name: str) -> None:
        from deltahub.composition import activate, registry

        home = registry(self.model)
        assert home is not None
        activate(home, [name])

    def rows(self, names: Sequence[str]) -> tuple[AbstractContextManager[object], dict[str, object]]:
        return using(self.model, list(names)), {}

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        found = []
        for name, delta in deltas(self.model).items():
            for key, tensor in delta.named_parameters():
                _, path, last = key.split("/")
                found.append((f"{name}/{path}/{last}", tensor))
        return found


class Peft(Side):
    """peft. Its classes wrap the model, so the bare one has to be unwrapped again."""

    def _config(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=int(self.rank * SCALE), target_modules=self.paths)

    def attach(self, name: str = FIRST) -> None:
        from peft import get_peft_model

        self.live = get_peft_model(self.model, self._config(), adapter_name=name)

    def add(self, name: str) -> None:
        self.live.add_adapter(name, self._config())

    def clear(self) -> None:
        if self.live is not self.model:
            self.live.unload()
            self.live = self.model

    def save(self, folder: Path) -> None:
        self.live.save_pretrained(str(folder))

    def load(self, folder: Path, name: str = FIRST) -> None:
        from peft import PeftModel

        self.live = PeftModel.from_pretrained(self.model, str(_inner(folder)), adapter_name=name)

    def load_lean(self, folder: Path) -> None:
        """The same with the two options that make it faster."""
        from peft import PeftModel

        options: dict[str, Any] = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
        self.live = PeftModel.from_pretrained(self.model, str(_inner(folder)), adapter_name=FIRST, **options)

    def load_further(self, folder: Path, name: str) -> None:
        self.live.load_adapter(str(_inner(folder)), adapter_name=name)

    def switch(self, name: str) -> None:
        self.live.set_adapter(name)

    def rows(self, names: Sequence[str]) -> tuple[AbstractContextManager[object], dict[str, object]]:
        return nullcontext(), {"adapter_names": list(names)}

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        found = []
        for key, tensor in self.live.named_parameters():
            path, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
            if rest:
                letter, name, *_ = rest.split(".")
                found.append((f"{name}/{path}/{ {'A': 'down', 'B': 'up'}[letter] }", tensor))
        return found


def _inner(folder: Path) -> Path:
    """Where peft puts an adapter that is not called ``default``."""
    return next(folder.rglob("adapter_config.json")).parent


SIDES: dict[str, Callable[[Any, Sequence[str], int], Side]] = {"deltahub": Ours, "peft": Peft}
"""By the name under which a child process is asked for one."""
