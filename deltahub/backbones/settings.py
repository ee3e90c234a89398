"""Settings: the few fields of a configuration that change with a delta, as data, each with the value it replaces."""

from __future__ import annotations

__all__ = ["Setting", "apply_settings", "build_fields", "changed_settings", "check_settings", "configure"]

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from deltahub.backbones.files import read_json
from deltahub.backbones.libraries import LIBRARIES, Field, Library, class_name, library_of
from deltahub.errors import BackboneError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


class Setting(Protocol):
    """One entry of a manifest's ``settings``."""

    @property
    def on(self) -> str:
        """Whose field: ``config``, ``processor`` or ``scheduler``."""

    @property
    def path(self) -> str:
        """The field, with dots where it lies in a nested configuration."""

    @property
    def was(self) -> Any:
        """The value of the right backbone, which it has again after undoing."""

    @property
    def value(self) -> Any:
        """The value that the delta was trained with."""


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v),
    "string": lambda v: isinstance(v, str),
    "integers": lambda v: isinstance(v, Sequence) and not isinstance(v, str) and all(map(_TYPES["integer"], v)),
    "numbers": lambda v: isinstance(v, Sequence) and not isinstance(v, str) and all(map(_TYPES["number"], v)),
    "object": lambda v: isinstance(v, Mapping) and all(isinstance(k, str) and _plain(x) for k, x in v.items()),
    "labels": lambda v: (
        isinstance(v, Mapping)
        and all(isinstance(k, str) and re.fullmatch(r"\d{1,6}", k) and isinstance(x, str) for k, x in v.items())
    ),
}


def _plain(value: Any) -> bool:
    """Tell scalars, and lists of them, from anything deeper."""
    values = value if isinstance(value, list | tuple) else (value,)
    return all(v is None or isinstance(v, bool | int | float | str) for v in values)


def _json(value: Any) -> Any:
    """Compare as JSON does: tuples are arrays, and keys are strings."""
    return json.loads(json.dumps(value, default=str))


def check_settings(settings: Iterable[Setting], library: Library) -> list[tuple[Setting, Field]]:
    """Pair each setting with its entry in the library's list.

    Raises:
        BackboneError: ``E_BACKBONE_SETTING`` for a field that is not listed or a value it does not take; all the
            faults are listed.
    """
    checked, faults = [], []
    for setting in settings:
        fields = library.settings.get(setting.on, {})
        *outer, name = setting.path.split(".")
        field = fields.get(name) if all(part in library.nested for part in outer) else None
        if field is None:
            faults.append(f"{setting.on}.{setting.path}: not on the list of {library.name}")
        elif not _takes(field, setting.value):
            faults.append(f"{setting.on}.{setting.path}: takes {' or '.join(field.types)}, found {setting.value!r}")
        else:
            checked.append((setting, field))
    if faults:
        raise BackboneError(
            "E_BACKBONE_SETTING",
            "the package asks for a setting that a package may not change",
            where="settings",
            found=faults[0],
            also=faults[1:],
        )
    return checked


def _takes(field: Field, value: Any) -> bool:
    if value is None:
        return field.when == "live"
    if not any(_TYPES[kind](value) for kind in field.types):
        return False
    in_bounds = (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or ((field.minimum is None or value >= field.minimum) and (field.maximum is None or value <= field.maximum))
    )
    return in_bounds and (not isinstance(value, Mapping) or len(value) <= 65536)


def build_fields(settings: Iterable[Setting], library: Library) -> list[tuple[Setting, Field]]:
    """Pick the settings of the configuration that take effect when a model is built, in the order given."""
    checked = check_settings([s for s in settings if s.on == "config"], library)
    return [(setting, field) for setting, field in checked if field.when == "build"]


def _mismatch(setting: Setting, found: Any) -> BackboneError:
    return BackboneError(
        "E_BACKBONE_SETTING_WAS",
        "this field of the backbone does not have the value that the package says it replaces",
        where=f"{setting.on}.{setting.path}",
        expected=json.dumps(setting.was),
        found=json.dumps(_json(found)),
        hint="another value here means another backbone, or another delta has changed it",
    )


def _python(field: Field, value: Any) -> Any:
    if "labels" in field.types and isinstance(value, Mapping):
        return {int(k): v for k, v in value.items()}
    return copy.deepcopy(value)


def _holder(root: Any, path: str) -> tuple[Any, str]:
    """Step into nested configurations; every step is a name from the list, checked before."""
    *outer, name = path.split(".")
    for part in outer:
        root = getattr(root, part, None)
    return root, name


def configure(config: Any, chosen: Sequence[tuple[Setting, Field]]) -> None:
    """Set build-time fields on a configuration object, all or none.

    Raises:
        BackboneError: ``E_BACKBONE_SETTING_WAS``.
    """
    for setting, _ in chosen:
        holder, name = _holder(config, setting.path)
        if _json(getattr(holder, name, None)) != _json(setting.was):
            raise _mismatch(setting, getattr(holder, name, None))
    for setting, field in chosen:
        holder, name = _holder(config, setting.path)
        setattr(holder, name, _python(field, setting.value))


def _library(target: object) -> Library:
    """Find the library of a model, a processor or a scheduler."""
    from torch import nn

    if isinstance(target, nn.Module) and (name := class_name(target)):
        return library_of(name)[0]
    for cls in type(target).__mro__:
        if library := LIBRARIES.get(cls.__module__.split(".")[0]):
            return library
    raise BackboneError(
        "E_BACKBONE_SETTING",
        "the package has settings, and this object belongs to no library whose settings are known",
        where=type(target).__name__,
        expected="an object of " + ", ".join(sorted(LIBRARIES)),
    )


def _root(target: Any, library: Library, on: str) -> Any:
    if on != "config" or library.name == "timm":
        return target
    if library.name == "sentence_transformers":
        return target[0].auto_model.config
    return target.config


def apply_settings(
    target: nn.Module | object, settings: Iterable[Setting], *, on: str = "config"
) -> Callable[[], None]:
    """Change the settings of one object, all or none, and give back the way to undo it.

    Args:
        target: the model for ``on="config"``; a processor, tokenizer or scheduler for the others.
        settings: a manifest's settings; those with another ``on`` are left alone.
        on: ``config``, ``processor`` or ``scheduler``.

    Returns:
        A function that restores the values of before; calling it again does nothing.

    Raises:
        BackboneError: ``E_BACKBONE_SETTING`` for what is not on the list, ``E_BACKBONE_SETTING_WAS`` where the
            backbone has another value than the package replaces, ``E_BACKBONE_SETTING_BUILD`` where the model
            should have been built with the value.
    """
    mine = [s for s in settings if s.on == on]
    if not mine:
        return lambda: None
    library = _library(target)
    checked = check_settings(mine, library)
    if library.name == "diffusers":
        return _apply_diffusers(target, [setting for setting, _ in checked])
    root = _root(target, library, on)
    changes: list[tuple[Any, str, Any]] = []
    for setting, field in checked:
        holder, name = _holder(root, setting.path)
        found = getattr(holder, name, None)
        if field.when == "build":
            if _json(found) != _json(setting.value):
                raise _not_built(setting, found)
        elif _json(found) != _json(setting.was):
            raise _mismatch(setting, found)
        else:
            changes.append((holder, name, _python(field, setting.value)))
    old = [(holder, name, hasattr(holder, name), getattr(holder, name, None)) for holder, name, _ in changes]
    for holder, name, value in changes:
        setattr(holder, name, value)

    def undo() -> None:
        while old:
            holder, name, had, value = old.pop()
            setattr(holder, name, value) if had else delattr(holder, name)

    return undo


def _not_built(setting: Setting, found: Any) -> BackboneError:
    return BackboneError(
        "E_BACKBONE_SETTING_BUILD",
        "this field shapes the model, so the model has to be built with the package's value",
        where=f"{setting.on}.{setting.path}",
        expected=json.dumps(setting.value),
        found=json.dumps(_json(found)),
        hint="build the model with this value, or let deltahub.load build it",
    )


def _apply_diffusers(target: Any, settings: Sequence[Setting]) -> Callable[[], None]:
    """Diffusers keeps a frozen dictionary; what a scheduler derives from it is made once, in its constructor."""
    for setting in settings:
        if _json(target.config.get(setting.path)) != _json(setting.was):
            raise _mismatch(setting, target.config.get(setting.path))
    values = {setting.path: copy.deepcopy(setting.value) for setting in settings}
    old = dict(target.__dict__)
    if settings[0].on == "scheduler":
        changed = type(target).from_config(target.config, **values).__dict__
    else:
        changed = {**old, "_internal_dict": type(target.config)({**target.config, **values})}
    target.__dict__.clear()
    target.__dict__.update(changed)

    def undo() -> None:
        if old:
            target.__dict__.clear()
            target.__dict__.update(old)
            old.clear()

    return undo


def changed_settings(model: nn.Module, folder: Path) -> list[dict[str, Any]]:
    """The settings in which a live model differs from the configuration in its backbone's folder.

    Args:
        model: a model of a known library; of another there is nothing to say.
        folder: where the backbone's ``config.json`` lies.

    Returns:
        Entries of a manifest's ``settings``, for the fields on the library's list only.
    """
    name = class_name(model)
    path = folder / "config.json"
    if name is None or not path.is_file():
        return []
    library, _ = library_of(name)
    live: Any = getattr(model, "config", None)
    stored: Any
    if library.name == "transformers":
        stored = type(live).from_pretrained(str(folder), local_files_only=True)
    elif library.name == "diffusers":
        live, stored = _Fields(live), _Fields(read_json(path))
    else:
        return []
    found = []
    for field in library.settings.get("config", {}):
        was, value = _json(getattr(stored, field, None)), _json(getattr(live, field, None))
        if was != value:
            found.append({"on": "config", "path": field, "was": was, "value": value})
    return found


class _Fields:
    """A mapping whose members are attributes, absent ones ``None``."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        return self._values.get(name)
