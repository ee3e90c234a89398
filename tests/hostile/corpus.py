"""The table of hostile inputs: what a case is, and the room with a valid package in which each begins."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.test_package import rewrite

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deltahub.testing import LoopbackHub

__all__ = ["ACCEPTED", "CASES", "Case", "Room", "Template", "case", "cases"]

ACCEPTED = "accepted"
"""In place of a code: the input is harmless as handled, and the act itself asserts how it was handled."""

Act = Callable[[], object]
Prepare = Callable[["Room"], "Act | Sequence[Act]"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One hostile input at the level of the user.

    Attributes:
        number: of the list of hostile inputs, 1 to 56.
        name: what is hostile about it.
        code: of the error that every act must end in, or :data:`ACCEPTED`.
        prepare: makes the input in a room and gives what a user would call. Only these calls are watched and limited.
    """

    number: int
    name: str
    code: str
    prepare: Prepare

    @property
    def key(self) -> str:
        return f"{self.number:02d} {self.name}"


CASES: dict[str, Case] = {}


def case(number: int, name: str, code: str) -> Callable[[Prepare], Prepare]:
    """Put a function into the table."""

    def put(prepare: Prepare) -> Prepare:
        found = Case(number=number, name=name, code=code, prepare=prepare)
        assert found.key not in CASES, found.key
        CASES[found.key] = found
        return prepare

    return put


def cases(number: int, inputs: dict[str, tuple[object, str]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put one function into the table once for each input: name to what it is given, and the code."""

    def put(prepare: Callable[..., Any]) -> Callable[..., Any]:
        for name, (given, code) in inputs.items():
            case(number, name, code)(partial(_given, prepare, given))
        return prepare

    return put


def _given(prepare: Callable[..., Any], given: object, room: Room) -> Any:
    return prepare(room, given)


@dataclass(frozen=True, kw_only=True)
class Template:
    """What all cases begin with, made once: a backbone on the disk and in memory, and a valid package for it."""

    backbone: Path
    package: Path
    model: nn.Module

    @classmethod
    def make(cls, folder: Path) -> Template:
        """Make them; everything that a refusal needs is imported on the way."""
        from transformers import LlamaForCausalLM

        import deltahub
        from tests.models import llama
        from tests.zoo import randomise

        llama().save_pretrained(folder / "backbone")
        model = LlamaForCausalLM.from_pretrained(folder / "backbone").eval()
        delta = deltahub.attach(model, "lora", ["q_proj", "down_proj"], rank=2, scale=2.0)
        randomise(delta.parameters())
        deltahub.save(model, folder / "package")
        delta.detach()
        return cls(backbone=folder / "backbone", package=folder / "package", model=model)


class Room:
    """A case's own folder: ``package`` is a copy of the valid one, ``model`` the live backbone.

    Attributes:
        folder: everything of the case; nothing outside it may change.
        package: a valid package, for the case to spoil.
        model: a live backbone; its bits, classes and flags must stay.
        cache: where downloads may go: the only place that a refused call may write to.
        forgiven: files that the attacker changes while the case is watched, and puts back.
        pooled: a library below the Hub's client keeps its connections and has no way to close them.
        opened: every file below ``folder`` that was opened while the case was watched.
    """

    def __init__(self, folder: Path, template: Template) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.package = folder / "package"
        self.model = copy.deepcopy(template.model)
        self.opened: list[Path] = []
        self.forgiven: set[Path] = set()
        self.pooled = False
        self._backbone = template.backbone
        self._stack = contextlib.ExitStack()
        folder.mkdir()
        shutil.copytree(template.package, self.package)

    @property
    def weights(self) -> Path:
        return self.package / "delta.safetensors"

    @property
    def backbone(self) -> Path:
        """The backbone's folder, the case's own to spoil."""
        own = self.folder / "backbone"
        if not own.exists():
            shutil.copytree(self._backbone, own)
        return own

    def enter(self, context: contextlib.AbstractContextManager[Any]) -> Any:
        """Enter a context that lasts until the case is judged."""
        return self._stack.enter_context(context)

    def close(self) -> None:
        self._stack.close()

    # --- spoiling
    def edit(self, change: Callable[[dict[str, Any]], object], *, rehash: bool = True) -> None:
        """Change the manifest; by default with sizes and digests that are right."""
        rewrite(self.package, change, rehash=rehash)

    def module(self, **members: object) -> None:
        """Change members of the manifest's one module."""
        self.edit(lambda document: document["modules"][0].update(members))

    def config(self, **values: object) -> None:
        self.edit(lambda document: document["modules"][0]["config"].update(values))

    def text(self) -> str:
        return (self.package / "delta.json").read_text()

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the tensors, with sizes and digests made right again."""
        from safetensors.torch import load_file, save_file

        held = load_file(self.weights)
        change(held)
        save_file(held, self.weights)
        self.edit(lambda _: None)

    def bytes(self, data: bytes) -> None:
        """Put other bytes in place of the tensor file, honestly declared."""
        self.weights.write_bytes(data)
        self.edit(lambda _: None)

    # --- what users call
    def load(self, **options: Any) -> Any:
        import deltahub

        source = options.pop("source", self.package)
        return deltahub.load(source, **{"backbone": self.model, "cache_dir": self.cache, **options})

    def refuse(self, **options: Any) -> list[Act]:
        """Loading and verifying: both must end in the case's code."""
        import deltahub

        return [
            lambda: self.load(**options),
            lambda: deltahub.verify(self.package, backbone=self.model, cache_dir=self.cache, **options),
        ]

    # --- a Hub
    def hub(self, **options: Any) -> LoopbackHub:
        """A Hub with the package as ``acme/delta``."""
        from deltahub.testing import serve_hub

        hub = self.enter(serve_hub(self.folder / "hub", **options))
        hub.create("acme/delta", self.contents(self.package))
        return hub

    @staticmethod
    def contents(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def pull(self, hub: LoopbackHub, source: str = "acme/delta", **options: Any) -> Any:
        import deltahub

        return deltahub.pull(source, **{"endpoint": hub.url, "token": hub.token, "cache_dir": self.cache, **options})

    def from_hub(self, hub: LoopbackHub, **options: Any) -> list[Act]:
        """Pulling and loading: both must end in the case's code."""
        return [
            lambda: self.pull(hub, **options),
            lambda: self.load(source="acme/delta", endpoint=hub.url, token=hub.token, **options),
        ]

    def manifest(self) -> dict[str, Any]:
        return dict(json.loads(self.text()))


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Another value for an attribute, for as long as the context lasts."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
