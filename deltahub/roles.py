"""What authors call the parts of a model, looked up per architecture in ``spec/roles.toml``.

A role such as ``attention.query`` is resolved for every model inside a module that declares its architecture, at any
depth, so wrapped and composite models work. A manifest never holds a role: only the paths that it stood for, and the
rows, where a role is played by a part of a fused module.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from deltahub.errors import TargetError
from deltahub.hosts import view_of
from deltahub.places import Rows, parameters_of, place_of
from deltahub.targets import select

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ROLE_PREFIX", "Target", "architecture_of", "in_order", "targets_of"]

ROLE_PREFIX = "role:"


@dataclass(frozen=True, slots=True)
class Target:
    """A host by its path, and the outputs of it that are meant; ``None`` for all."""

    path: str
    rows: Rows | None = None


def in_order(modules: Iterable[str], targets: Iterable[Target]) -> list[Target]:
    """Targets in the order of a model's modules: a module's parameters after it, rows by where they begin."""
    wanted = set(targets)
    place = {path: i for i, path in enumerate(modules)}

    def key(target: Target) -> tuple[int, str, tuple[int, ...]]:
        at = place.get(target.path)
        at = place[target.path.rpartition(".")[0]] if at is None else at
        return (at, target.path, () if target.rows is None else target.rows.numbers)

    return sorted(wanted, key=key)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fused:
    """A module in whose output several roles lie together.

    Attributes:
        modules: patterns of its path.
        shares: each role with its share of the outputs, in order: a number, or the name of one in the configuration.
        repeat: how many times the whole of them lies there, one after the other: the same.
        when: values of the configuration under which this is so.
    """

    modules: Sequence[str]
    shares: Mapping[str, int | str]
    repeat: int | str = 1
    when: Mapping[str, object]

    def holds(self, config: Any) -> bool:
        return all(getattr(config, name, None) == value for name, value in self.when.items())

    def rows(self, role: str, out: int, config: Any) -> Rows | None:
        """The rows of a role among ``out``; ``None`` where the numbers do not come out."""
        shares = {name: _number(share, config) for name, share in self.shares.items()}
        repeat, whole = _number(self.repeat, config), sum(shares.values())
        if not repeat or not whole or out % repeat:
            return None
        period, names = out // repeat, list(shares)
        before = sum(shares[name] for name in names[: names.index(role)])
        start, odd = divmod(period * before, whole)
        stop, rest = divmod(period * (before + shares[role]), whole)
        return None if odd or rest or stop <= start else Rows(start=start, stop=stop, period=period)


def _number(value: int | str, config: Any) -> int:
    return value if isinstance(value, int) else int(getattr(config, value, 0) or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    roles: Mapping[str, Sequence[str]]
    fused: Sequence[_Fused]


@functools.cache
def _table() -> Mapping[str, _Family]:
    """What is known by architecture."""
    document = tomllib.loads(files("deltahub.spec").joinpath("roles.toml").read_text(encoding="utf-8"))
    found: dict[str, _Family] = {}
    for family in document.values():
        roles = {role: patterns for role, patterns in family.items() if role not in {"architectures", "fused"}}
        fused = [_Fused(**{"when": {}, **entry}) for entry in family.get("fused", ())]
        found |= dict.fromkeys(family["architectures"], _Family(roles=roles, fused=fused))
    return found


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


def targets_of(model: nn.Module, role: str, modules: Mapping[str, nn.Module]) -> list[Target]:
    """What plays a role: modules, parameters that are hosts of their own, and rows of fused ones.

    Args:
        model: the whole model.
        role: such as ``attention.query``.
        modules: the model's modules by path, without its root.

    Raises:
        TargetError: ``E_TARGET_ARCHITECTURE`` where no part of the model is in the table, ``E_TARGET_ROLE`` where the
            architecture has no such role or nothing plays it.
    """
    whole = {"": model, **modules}
    roots = _roots(whole)
    if not roots:
        raise TargetError(
            "E_TARGET_ARCHITECTURE",
            "the roles of this architecture are not known",
            where=type(model).__name__,
            found=role,
            hint="name the modules instead, for instance targets='query' or 'type:Linear'",
        )
    hosts = {**modules, **parameters_of(whole)}
    found: set[Target] = set()
    for root, architecture in roots.items():
        family = _table()[architecture]
        prefix = f"{root}." if root else ""
        inside = {path[len(prefix) :]: () for path in hosts if path.startswith(prefix)}
        plain = {prefix + path for path in _matching(inside, family.roles.get(role, ()))}
        config = getattr(whole[root], "config", None)
        parts: set[Target] = set()
        for entry in family.fused:
            if role in entry.shares and entry.holds(config):
                paths = [prefix + path for path in _matching(inside, entry.modules)]
                parts |= {t for path in paths if (t := _part(whole, path, entry, role, config)) is not None}
        replaced = {target.path.rpartition(".")[0] for target in parts}
        found |= parts | {Target(path) for path in plain if path.rpartition(".")[0] not in replaced}
    if not found:
        families = [_table()[a] for a in roots.values()]
        known = sorted(
            {n for f in families for n in f.roles} | {n for f in families for e in f.fused for n in e.shares}
        )
        near = [] if role in known else difflib.get_close_matches(role, known, 1)
        raise TargetError(
            "E_TARGET_ROLE",
            f"no module of this model plays the role {role!r}",
            where=", ".join(f"{path or 'the model'} ({a})" for path, a in roots.items()),
            expected=", ".join(known),
            hint=f"did you mean {near[0]!r}?" if near else None,
        )
    return in_order(whole, found)


def _matching(inside: Mapping[str, object], patterns: Iterable[str]) -> list[str]:
    found: list[str] = []
    for pattern in patterns:
        try:
            found += select(inside, pattern)
        except TargetError:
            continue  # the architecture's other class has this part, this one does not
    return found


def _part(modules: Mapping[str, nn.Module], path: str, entry: _Fused, role: str, config: Any) -> Target | None:
    place = place_of(modules, path)
    assert place is not None
    view = place.view or view_of(place.module)
    out = view.shape(place.module, type(place.module)).d_out
    rows = None if out is None else entry.rows(role, out, config)
    return None if rows is None else Target(path, rows)
