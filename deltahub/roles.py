"""What authors call the parts of a model, looked up per architecture in ``spec/roles.toml``.

A role such as ``attention.query`` is resolved for every model inside a module that declares its architecture, at any
depth, so wrapped and composite models work. A manifest never holds a role: only the paths that it stood for.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING

from deltahub.errors import TargetError
from deltahub.targets import select

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ROLE_PREFIX", "architecture_of", "paths_of"]

ROLE_PREFIX = "role:"


@functools.cache
def _table() -> Mapping[str, Mapping[str, list[str]]]:
    """Roles by architecture."""
    document = tomllib.loads(files("deltahub.spec").joinpath("roles.toml").read_text(encoding="utf-8"))
    return {
        architecture: {role: patterns for role, patterns in family.items() if role != "architectures"}
        for family in document.values()
        for architecture in family["architectures"]
    }


def architecture_of(module: nn.Module) -> str | None:
    """The name under which a module's architecture is in the table: its ``model_type``, or its class name."""
    table = _table()
    if type(module).__name__ in table:
        return type(module).__name__
    config = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) and model_type in table else None


def _roots(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The outermost module of each architecture: path to architecture."""
    roots: dict[str, str] = {}
    for path, module in modules.items():
        found = architecture_of(module)
        if found is not None and not any(
            known == found and (not root or path.startswith(f"{root}.")) for root, known in roots.items()
        ):
            roots[path] = found
    return roots


def paths_of(model: nn.Module, role: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The modules that play a role, in the model's order.

    Args:
        model: the whole model.
        role: such as ``attention.query``.
        modules: the model's modules by path, without its root.

    Raises:
        TargetError: ``E_TARGET_ARCHITECTURE`` where no part of the model is in the table, ``E_TARGET_ROLE`` where the
            architecture has no such role or nothing plays it.
    """
    roots = _roots({"": model, **modules})
    if not roots:
        raise TargetError(
            "E_TARGET_ARCHITECTURE",
            "the roles of this architecture are not known",
            where=type(model).__name__,
            found=role,
            hint="name the modules instead, for instance targets='query' or 'type:Linear'",
        )
    found: set[str] = set()
    for root, architecture in roots.items():
        prefix = f"{root}." if root else ""
        inside = {path[len(prefix) :]: () for path in modules if path.startswith(prefix)}
        for pattern in _table()[architecture].get(role, ()):
            try:
                found |= {prefix + path for path in select(inside, pattern)}
            except TargetError:
                continue  # the architecture's other class has this part, this one does not
    if not found:
        known = sorted({name for a in roots.values() for name in _table()[a]})
        near = [] if role in known else difflib.get_close_matches(role, known, 1)
        raise TargetError(
            "E_TARGET_ROLE",
            f"no module of this model plays the role {role!r}",
            where=", ".join(f"{path or 'the model'} ({a})" for path, a in roots.items()),
            expected=", ".join(known),
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    return [path for path in modules if path in found]
