"""The architecture of a backbone without its weights: which module is what, and what files call its parameters.

The module tree is built on the ``meta`` device from the configuration alone. Live names and names in files differ:
a checkpoint of a bare encoder lacks the prefix that a class with a head has, old files have old names, and
transformers 5 splits and fuses. The library's own rules of loading are asked; what they make of more than one stored
tensor has no name here, so that a merge into it is refused instead of guessed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import nn

    from deltahub.backbones import BackboneFiles, Setting
    from deltahub.hosts import View
    from deltahub.kinds import HostShape

__all__ = ["Architecture", "HostModule", "architecture", "skeleton"]


@dataclass(frozen=True, kw_only=True)
class HostModule:
    """A module that a delta may act on, as its files see it.

    Attributes:
        path: its live path.
        view: how it is seen.
        shape: the host's facts.
        takes_bias: whether its own forward would add a bias.
        type_name: its class, for messages.
        names: live names of its ``weight`` and its ``bias``.
        stack: how many linear maps it is, where it is a stack of them.
        runs: whether it is a module that runs; a parameter that its module uses by itself does not.
    """

    path: str
    view: View
    shape: HostShape
    takes_bias: bool
    type_name: str
    names: Mapping[str, str]
    stack: int = 0
    runs: bool = True


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A backbone's modules and the names of its parameters.

    Attributes:
        model: the module tree, on ``meta`` or not; its values are never looked at.
        stored: live parameter name to its name in the checkpoint.
        tied: live parameter name to all live names of the same parameter, itself included, where there are several.
        converted: live names that the library makes out of several stored tensors, or of other values than stored.
    """

    model: nn.Module
    stored: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    converted: frozenset[str]
    _modules: Mapping[str, nn.Module] = field(repr=False)

    def host(self, path: str) -> HostModule:
        """A module by its path.

        Raises:
            ConverterError: ``E_MERGE_TARGET``.
        """
        from deltahub.hosts import view_of
        from deltahub.places import place_of

        place = place_of({"": self.model, **self._modules}, path)
        if place is None:
            import difflib

            near = difflib.get_close_matches(path, list(self._modules), 3, cutoff=0.5)
            raise ConverterError(
                "E_MERGE_TARGET", "the backbone has no such module", where=path, expected=", ".join(near) or None
            )
        module, own = place.module, place.view
        view: View = view_of(module) if own is None else own
        around = f"{path}." if own is None else path[: path.rfind(".") + 1]
        return HostModule(
            path=path,
            view=view,
            shape=view.shape(module, type(module)),
            takes_bias=view.takes_bias(module),
            type_name=type(module).__name__,
            names={
                "weight": around + (view.weight_name or "weight"),
                "bias": around + (view.bias_name or "bias"),
            },
            stack=0 if own is None else own.stack(module),
            runs=own is None,
        )


def architecture(
    names: Iterable[str],
    *,
    files: BackboneFiles | None = None,
    source: Mapping[str, object] | None = None,
    settings: Sequence[Setting] = (),
    model: nn.Module | None = None,
) -> Architecture:
    """The architecture that a checkpoint's tensors belong to.

    Args:
        names: the checkpoint's tensors.
        files: where its configuration is.
        source: a manifest's ``backbone.source``; its class is preferred to that of the configuration.
        settings: a manifest's settings; those that shape the model are applied.
        model: the module itself, where no library can build it; ``meta`` will do.

    Raises:
        BackboneError: the class is not allowed or unknown.
        ConverterError: ``E_MERGE_NAMES`` where two stored tensors are one parameter.
    """
    if model is None:
        assert files is not None
        model = skeleton(files, source or {}, settings)
    modules = {name: module for name, module in model.named_modules() if name}
    live = _live_names(model)
    stored, converted = _stored_names(model, list(names), live)
    tied = _ties(model)
    # Any of the tied names will do to find the tensor in the files.
    for name, group in tied.items():
        for other in group:
            if name not in stored and other in stored:
                stored[name] = stored[other]
    return Architecture(model=model, stored=stored, tied=tied, converted=frozenset(converted), _modules=modules)


def skeleton(files: BackboneFiles, source: Mapping[str, object], settings: Sequence[Setting] = ()) -> nn.Module:
    """A backbone's module tree on ``meta``.

    Raises:
        BackboneError: as :func:`deltahub.backbones.build`.
    """
    import torch

    from deltahub.backbones.files import architecture as declared_class
    from deltahub.backbones.files import staged
    from deltahub.backbones.libraries import library_of
    from deltahub.errors import BackboneError, DeltaHubError

    class_name = source.get("class") or declared_class(files.folder)
    library, name = library_of(class_name)
    make = _SKELETONS.get(library.name)
    if make is None:
        raise ConverterError(
            "E_MERGE_ARCHITECTURE",
            f"backbones of {library.name} cannot be laid out without their weights",
            where=files.folder,
            hint="pass architecture=<the module>",
        )
    with staged(files, library) as (stage, _), torch.device("meta"), _quiet():
        try:
            return make(library, name, str(stage), settings)
        except DeltaHubError:
            raise
        except Exception as error:
            raise BackboneError(
                "E_BACKBONE_BUILD",
                f"{library.name} cannot lay out {name}: {type(error).__name__}: {error}",
                where=files.folder,
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _transformers(library: Any, name: str, stage: str, settings: Sequence[Setting]) -> nn.Module:
    from deltahub.backbones.libraries import find_class
    from deltahub.backbones.settings import build_fields, configure

    cls: Any = find_class(library, name)
    config = cls.config_class.from_pretrained(stage, local_files_only=True)
    configure(config, build_fields(settings, library))
    model: nn.Module = cls(config)
    model.tie_weights()  # type: ignore[operator]
    return model


def _diffusers(library: Any, name: str, stage: str, settings: Sequence[Setting]) -> nn.Module:
    from deltahub.backbones.libraries import find_class

    cls: Any = find_class(library, name)
    model: nn.Module = cls.from_config(cls.load_config(stage, local_files_only=True))
    return model


def _timm(library: Any, name: str, stage: str, settings: Sequence[Setting]) -> nn.Module:
    import json
    from pathlib import Path

    from deltahub.backbones.libraries import imported

    config = json.loads((Path(stage) / "config.json").read_text(encoding="utf-8"))
    arguments = dict(config.get("model_args") or {})
    arguments |= {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    arguments |= {one.path: one.value for one in settings if one.on == "config"}
    model: nn.Module = imported(library).create_model(name, pretrained=False, **arguments)
    return model


_SKELETONS = {"transformers": _transformers, "diffusers": _diffusers, "timm": _timm}


def _live_names(model: nn.Module) -> list[str]:
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [*parameters, *(name for name, _ in model.named_buffers(remove_duplicate=False))]


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}


def _stored_names(model: nn.Module, names: Sequence[str], live: Sequence[str]) -> tuple[dict[str, str], set[str]]:
    """Live name to stored name, and the live names that are made of something else than one stored tensor."""
    known = set(live)
    found: dict[str, str] = {}
    converted: set[str] = set()
    twice: dict[str, tuple[str, str]] = {}
    for name, (target, direct) in _loaded_as(model, names, known).items():
        if target not in known:
            continue
        if not direct:
            converted.add(target)
        elif target in found:
            # Under its own name it is meant; an alias beside it is an older copy.
            if found[target] == target:
                continue
            if name != target:
                twice[target] = (found[target], name)
            found[target] = name
        else:
            found[target] = name
    for target, pair in twice.items():
        if found[target] != target:
            raise ConverterError(
                "E_MERGE_NAMES",
                "two tensors of the checkpoint are one parameter of the model",
                where=target,
                found=", ".join(pair),
            )
    return {target: name for target, name in found.items() if target not in converted}, converted


def _loaded_as(model: nn.Module, names: Sequence[str], known: set[str]) -> dict[str, tuple[str, bool]]:
    """Stored name to the live name that loading gives it, and whether its value stays as it is."""
    if not (hasattr(model, "base_model_prefix") and hasattr(model, "config")):
        return {name: (name, True) for name in names}
    prefix = str(model.base_model_prefix or "")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 has prefixes and no conversions
        return {name: (_prefixed(name, prefix, known), True) for name in names}
    rules = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    result = {}
    for name in sorted(names):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        result[name] = (target if target in known else _prefixed(target, prefix, known), pattern is None)
    return result


def _prefixed(name: str, prefix: str, known: set[str]) -> str:
    """A name with the prefix of the base model added or taken away, where only that is a parameter."""
    if name in known or not prefix:
        return name
    if f"{prefix}.{name}" in known:
        return f"{prefix}.{name}"
    bare = name.removeprefix(f"{prefix}.")
    return bare if bare in known else name
