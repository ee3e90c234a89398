"""What the surroundings of a block can tell it: which module knows, and how the block comes to hear of it.

The knowledge travels with the call. A hook on the module that sees the whole map puts height and width into the
mapping of keyword arguments that this module hands through to its blocks anyway; a hosted block takes them out again.
Nothing is remembered between calls, so several sizes, threads, recomputation under gradient checkpointing, copies,
``torch.compile`` and ``torch.export`` with symbolic sizes need no care.

Who knows is data: ``spec/contexts.toml`` for the libraries, :func:`register` for anybody's own modules.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, cast

from torch import nn

from deltahub.errors import HostError
from deltahub.targets import class_names

__all__ = [
    "CARRIED",
    "Block",
    "Provider",
    "block_of",
    "check_replaceable",
    "give",
    "provider_of",
    "register",
    "withdraw",
]

CARRIED = "deltahub"
"""The key under which context travels among a block's keyword arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provider:
    """A class of modules that see the map whose tokens their blocks see as a sequence.

    Attributes:
        name: library and class, such as ``diffusers.Transformer2DModel``.
        argument: of its ``forward``: the map, ``[batch, channels, height, width]``.
        carrier: of its ``forward``: the mapping that it hands through to its blocks as keyword arguments.
        blocks: classes of the blocks.
        through: classes that may stand between, and hand the carrier on.
        patch: path of the attribute that tells the width of a patch.
    """

    name: str
    argument: str
    carrier: str
    blocks: tuple[str, ...]
    through: tuple[str, ...] = ()
    patch: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A class of blocks that a delta may replace.

    Attributes:
        name: library and class.
        where: attributes, each with the value that it must have.
        absent: attributes that must be ``None``.
        refuses: arguments of its ``forward`` that a replacement could not heed.
        axes: number of axes of its input; 0 for any.
    """

    name: str
    where: Mapping[str, object] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    axes: int = 0


def _read() -> tuple[dict[str, Provider], dict[str, Block], dict[str, str]]:
    data = tomllib.loads(files("deltahub.spec").joinpath("contexts.toml").read_text(encoding="utf-8"))

    def fields(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"name" if k == "class" else k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}

    providers = [Provider(**fields(entry)) for entry in data["grid"]]
    blocks = [Block(**fields(entry)) for entry in data["block"]]
    refused = {entry["class"]: entry["reason"] for entry in data["refused"]}
    return {p.name: p for p in providers}, {b.name: b for b in blocks}, refused


_PROVIDERS, _BLOCKS, _REFUSED = _read()


def register(entry: Provider | Block) -> None:
    """Make a class of one's own known, as ``spec/contexts.toml`` does for those of the libraries.

    To be called before a delta is attached to such a module.
    """
    if isinstance(entry, Provider):
        _PROVIDERS[entry.name] = entry
    else:
        _BLOCKS[entry.name] = entry


def _is(module: Any, names: Collection[str]) -> bool:
    return not set(names).isdisjoint(class_names(cast(Any, type(module))))


def _known(table: Mapping[str, Any], module: nn.Module | type) -> Any:
    cls = module if isinstance(module, type) else type(module)
    return next((table[name] for name in class_names(cls) if name in table), None)


def block_of(cls: type[nn.Module]) -> Block | None:
    """What is known of a class of blocks; ``None`` for one that nobody described."""
    found: Block | None = _known(_BLOCKS, cls)
    return found


def _ancestors(path: str) -> Iterator[str]:
    """Paths of the modules around one, from the nearest to the root."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def provider_of(modules: Mapping[str, nn.Module], path: str) -> str:
    """The path of the module that can tell a block its grid.

    Args:
        modules: all modules of the model by path, the root under ``""``.
        path: of the block.

    Raises:
        HostError: ``E_HOST_CONTEXT`` with the reason where there is none.
    """
    passed: list[str] = []
    for above in _ancestors(path):
        module = modules[above]
        provider: Provider | None = _known(_PROVIDERS, module)
        if provider is not None:
            if not _is(modules[path], provider.blocks):
                break
            stranger = next((p for p in passed if not _hands_on(modules[p], provider)), None)
            if stranger is not None:
                raise _no_grid(path, f"{stranger} ({type(modules[stranger]).__name__}) does not hand it on")
            return above
        passed.append(above)
    raise _no_grid(path, f"no module around it is one of {', '.join(sorted(_PROVIDERS))}")


def _hands_on(module: nn.Module, provider: Provider) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _is(module, provider.through)


def _no_grid(path: str, why: str) -> HostError:
    return HostError(
        "E_HOST_CONTEXT",
        f"nothing tells this block the height and width of its token map: {why}",
        where=path,
        expected="grid",
        hint="deltahub.contexts.register tells DeltaHub of a model of your own",
    )


def check_replaceable(modules: Mapping[str, nn.Module], path: str, base: type[nn.Module]) -> None:
    """Refuse to replace a block whose replacement would ignore half of its inputs.

    Args:
        modules: all modules of the model by path, the root under ``""``.
        path: of the block.
        base: its class before any delta.

    Raises:
        HostError: ``E_HOST_REPLACE`` with the reason.
    """
    for above in _ancestors(path):
        reason = _known(_REFUSED, modules[above])
        if reason:
            raise HostError(
                "E_HOST_REPLACE",
                f"no module of a {type(modules[above]).__name__} can be replaced: {reason}",
                where=path,
                hint="an adapter or a LoRA changes such attention without replacing it",
            )
    block = block_of(base)
    wanted = {} if block is None else {**block.where, **dict.fromkeys(block.absent)}
    for name, value in wanted.items():
        found = getattr(modules[path], name, None)
        if found != value:
            raise HostError(
                "E_HOST_REPLACE",
                "this block does more with its inputs than its replacement would",
                where=f"{path} ({base.__name__})",
                expected=f"{name} = {value}",
                found=found if isinstance(found, bool | int | str) else type(found).__name__,
                hint="target the self-attention of the transformer blocks, such as **.attn1",
            )


@dataclass(frozen=True, slots=True)
class _Giver:
    """A hook on a provider: it puts the grid into the mapping that goes through to the blocks."""

    argument: str
    index: int
    carrier: str
    carrier_index: int
    patch: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = kwargs[self.argument] if self.argument in kwargs else args[self.index]
        height, width = x.shape[-2], x.shape[-1]
        grid = (height, width) if self.patch == 1 else (height // self.patch, width // self.patch)
        carried = {CARRIED: {"grid": grid}}
        if len(args) > self.carrier_index:
            given = args[self.carrier_index]
            merged = carried if given is None else {**given, **carried}
            return (*args[: self.carrier_index], merged, *args[self.carrier_index + 1 :]), kwargs
        given = kwargs.get(self.carrier)
        return args, {**kwargs, self.carrier: carried if given is None else {**given, **carried}}


@dataclass(frozen=True, slots=True)
class _Taker:
    """A hook on a block: while no delta sits on it, it takes out what the block would not know."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if hasattr(module, "_deltahub"):  # a hosted block takes it out itself
            return args, kwargs
        return args, {name: value for name, value in kwargs.items() if name != CARRIED}


def _giver(module: nn.Module, provider: Provider) -> _Giver:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    patch: Any = module
    for step in provider.patch.split(".") if provider.patch else ():
        patch = getattr(patch, step, None)
    return _Giver(
        provider.argument,
        names.index(provider.argument),
        provider.carrier,
        names.index(provider.carrier),
        patch if isinstance(patch, int) and provider.patch else 1,
    )


def give(modules: Mapping[str, nn.Module], providers: Collection[str]) -> None:
    """Let these modules tell their blocks the grid from now on; those that do already are left alone."""
    for path in providers:
        module = modules[path]
        if any(isinstance(hook, _Giver) for hook in module._forward_pre_hooks.values()):
            continue
        provider: Provider = _known(_PROVIDERS, module)
        module.register_forward_pre_hook(_giver(module, provider), with_kwargs=True)
        for inner in module.modules():
            if _is(inner, provider.blocks):
                inner.register_forward_pre_hook(_Taker(), with_kwargs=True)


def withdraw(modules: Mapping[str, nn.Module], providers: Collection[str]) -> None:
    """Take the hooks of :func:`give` off again."""
    for path in providers:
        for module in modules[path].modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, (_Giver, _Taker)):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
