"""Putting a delta on a model: targets resolved, tensors built and checked, then all sites added at once.

Attaching is all or nothing; a model is as it was when anything is refused.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltahub import kinds
from deltahub.attending import check_bias, shape_of
from deltahub.composition import (
    REGISTRY,
    Registry,
    active_names,
    check_conflicts,
    freeze,
    registry,
    require_unmixed,
)
from deltahub.contexts import check_replaceable, give, provider_of
from deltahub.delta import Delta
from deltahub.errors import HostError, InjectionError, KindError, TargetError, UsageError
from deltahub.hosts import BLOCK, view_of
from deltahub.injection import add_site, slot_of
from deltahub.kinds import Document, Kind, TensorSpec
from deltahub.roles import ROLE_PREFIX, paths_of
from deltahub.sites import SITE_PREFIX, Bound, Part, Site
from deltahub.targets import select

if TYPE_CHECKING:
    from deltahub.kinds.host_shape import HostShape

__all__ = ["attach", "attach_parts", "choose"]

Choice = Callable[[str, nn.Module], bool]
"""An author's own choice of modules, by path and module."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def attach(
    model: nn.Module,
    kind: str | Mapping[str, object] | os.PathLike[str],
    targets: str | Sequence[str] | Choice | None = None,
    *,
    name: str | None = None,
    exclude: str | Sequence[str] = (),
    frozen: bool = True,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    **config: object,
) -> Delta:
    """Attach a fresh delta for training, and freeze the rest of the model.

    Args:
        model: any ``nn.Module``.
        kind: a kind's name, a kind document as a mapping, or the path of a TOML document.
        targets: exact paths, dotted suffixes, globs (``**.query``), ``type:Linear``, ``{0..11}`` ranges, roles
            (``role:attention.query``), or a function of path and module. Each must match something. The roles that the
            kind's document names by default.
        name: the delta's name; the kind's by default.
        exclude: what to leave out, in the same notation.
        frozen: set ``requires_grad`` of all backbone parameters to ``False``; restored by :meth:`Delta.detach`.
        dropout: probability of dropping elements of the delta's own input while training.
        dtype: dtype of the new tensors; that of the host's weight by default.
        seed: seed of the initialisers; torch's global generator by default.
        config: the kind's config, e.g. ``rank=8, scale=2.0``.

    Returns:
        The attached, active delta.

    Raises:
        TargetError: nothing matched, or a path is no module.
        KindError: the kind is unknown, or its config is out of bounds.
        HostError: a target cannot host the kind.
        InjectionError: the name is taken, or the delta conflicts with an active one.
    """
    found = _kind(kind)
    name = found.name.rpartition(".")[2] if name is None else name
    paths = _by_default(model, found, exclude) if targets is None else choose(model, targets, exclude)
    part = Part(name=name, kind=found, config=found.check_config(config), paths=paths, dropout=dropout)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return attach_parts(model, name, [part], frozen=frozen, dtype=dtype, generator=generator)


def _kind(kind: str | Mapping[str, object] | os.PathLike[str]) -> Kind:
    """A built-in kind by name, or one from a document: a mapping, or a TOML file."""
    if isinstance(kind, str) and not kind.endswith(".toml"):
        return kinds.get(kind)
    if isinstance(kind, Mapping):
        return Kind(Document.parse(kind))
    return Kind(Document.from_toml(Path(kind).read_text(encoding="utf-8"), where=str(kind)))


def _by_default(model: nn.Module, kind: Kind, exclude: str | Sequence[str]) -> list[str]:
    """Where a kind's document puts it: all of its own targets that this architecture has."""
    found: set[str] = set()
    for target in kind.document.targets:
        try:
            found |= set(choose(model, target, exclude))
        except TargetError as error:
            if error.code == "E_TARGET_ARCHITECTURE":
                raise
    if not found:
        raise TargetError(
            "E_TARGET_NOTHING",
            f"kind {kind.name!r} has no targets of its own that this model has",
            expected=", ".join(kind.document.targets) or None,
            hint="give targets=, such as 'query' or 'role:attention.query'",
        )
    return [path for path, _ in model.named_modules() if path in found]


def choose(model: nn.Module, targets: str | Sequence[str] | Choice, exclude: str | Sequence[str]) -> list[str]:
    """The paths of the modules that an author means, in the model's order."""
    modules = {n: m for n, m in model.named_modules() if n and SITE_PREFIX not in n}
    wanted = [targets] if isinstance(targets, str) or callable(targets) else list(targets)
    found: set[str] = set()
    for target in wanted:
        if callable(target):
            found |= {path for path, module in modules.items() if target(path, module)}
        elif target.startswith(ROLE_PREFIX):
            found |= set(paths_of(model, target.removeprefix(ROLE_PREFIX), modules))
        else:
            found |= set(select(modules, target))
    if exclude:
        found -= set(select(modules, "**")) - set(select(modules, "**", exclude))
    if not found:
        raise TargetError("E_TARGET_NOTHING", "no module is left to attach to", hint="see model.named_modules()")
    return [path for path in modules if path in found]


def attach_parts(
    model: nn.Module,
    name: str,
    parts: Sequence[Part],
    *,
    frozen: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    active: bool = True,
) -> Delta:
    """Attach the parts of one delta at exact paths; the mechanism behind :func:`attach` and ``deltahub.load``.

    Everything is resolved, checked and built before the model is touched.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "E_USAGE_NAME", "a delta's name is 1 to 64 letters, digits, '_' and '-', a letter first", found=name
        )
    home = registry(model) or Registry()
    if name in home:
        raise InjectionError("E_INJECTION_NAME_TAKEN", f"a delta {name!r} is attached already", hint="give name=")
    require_unmixed(home)
    modules = {n: m for n, m in model.named_modules() if SITE_PREFIX not in n}
    generator = generator or torch.default_generator
    built: list[tuple[Part, nn.Module, Site]] = []
    for part in parts:
        known: dict[HostShape, tuple[Bound, Mapping[str, TensorSpec]]] = {}
        for path in part.paths:
            module = _module(modules, path)
            slot = slot_of(module)
            if slot is not None and slot.switch is not home.switch:
                raise InjectionError(
                    "E_INJECTION_NESTED",
                    "this module carries a delta that was attached to another root",
                    where=path,
                    hint="attach all deltas through the same outer model",
                )
            built.append((part, module, _build(name, part, path, module, known, dtype, generator)))
    providers = {path: None for _, module, site in built for path in _surroundings(site, modules, module)}
    delta = Delta(name=name, model=model, parts=parts)
    delta.providers = tuple(providers)
    for part, module, site in built:
        part.sites.append((module, site))
    _find_removed(parts)
    acting = active_names(home)
    check_conflicts([*(d for n, d in home.items() if n in acting), delta][: None if active else -1])
    home[name] = delta
    model.__dict__[REGISTRY] = home
    for _, module, site in built:
        add_site(module, site, home.switch)
    give(modules, providers)
    if frozen:
        freeze(model, home)
    if active:
        home.switch.choose("\n".join([*acting, name]))
    return delta


def _module(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    module = modules.get(path) if path else None
    if module is None:
        near = difflib.get_close_matches(path, list(modules), 3, cutoff=0.5)
        raise TargetError(
            "E_TARGET_MISSING",
            "the model has no such module",
            where=path,
            expected=", ".join(near) or None,
            hint="check that the delta was made for this architecture",
        )
    return module


def _build(
    delta: str,
    part: Part,
    path: str,
    module: nn.Module,
    known: dict[HostShape, tuple[Bound, Mapping[str, TensorSpec]]],
    dtype: torch.dtype | None,
    generator: torch.Generator,
) -> Site:
    slot = slot_of(module)
    base = slot.base if slot is not None else type(module)
    view = slot.view if slot is not None else view_of(module)
    shape = shape_of(module, base, part.kind.hosts, view.shape(module, base))
    given = None if part.tensors is None else part.tensors[path]
    try:
        if given is not None:
            shapes = {n: tuple(t.shape) for n, t in given.items()}
            shape = part.kind.bind(part.config, shape, shapes)
            part.kind.tensors(part.config, shape, known=shapes)
        if shape not in known:
            known[shape] = Bound(part.kind, part.config, shape), part.kind.tensors(part.config, shape)
        bound, specs = known[shape]
        check_bias(bound.ports, module, base, path)
    except KindError as error:
        error.where = f"{path} ({base.__name__}), {error.where}" if error.where else f"{path} ({base.__name__})"
        raise
    weight = None if view is BLOCK else view.weight(module)
    like = weight if weight is not None else next(module.parameters(), None)
    device = like.device if like is not None else torch.device("cpu")
    floating = like is not None and like.is_floating_point()
    tensors: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if given is None:
            wanted = dtype or (like.dtype if like is not None and floating else torch.get_default_dtype())
            bias = view.bias(module)
            value = part.kind.init(spec, generator, W=weight, b=bias, dtype=wanted, device=device)
        else:
            value = given[name].to(device=device, dtype=dtype if given[name].is_floating_point() else None)
        trainable = spec.trainable and value.is_floating_point()
        tensors[name] = nn.Parameter(value) if trainable else value
    return Site(delta=delta, module=part.name, path=path, bound=bound, tensors=tensors, dropout=part.dropout)


def _surroundings(site: Site, modules: Mapping[str, nn.Module], module: nn.Module) -> list[str]:
    """Who tells a site what its equations ask of the surroundings; refused before anything runs where nobody can."""
    slot = slot_of(module)
    base, view = (type(module), view_of(module)) if slot is None else (slot.base, slot.view)
    if site.bound.severs:
        check_replaceable(modules, site.path, base)
    if not site.bound.context:
        return []
    if view is not BLOCK or site.bound.context != {"grid"}:
        raise HostError(
            "E_HOST_CONTEXT",
            f"kind {site.bound.kind.name!r} needs what this host cannot give",
            where=site.path,
            expected=", ".join(sorted(site.bound.context)),
            found=f"a {view.name.lower()}, {base.__name__}",
        )
    return [provider_of(modules, site.path)]


def _find_removed(parts: Sequence[Part]) -> None:
    """What fresh parts make unused: all parameters of the modules that they take the place of."""
    for part in parts:
        if part.tensors is None and not part.removes:
            part.removes = tuple(
                f"{site.path}.{name}"
                for module, site in part.sites
                if site.bound.severs
                for name, _ in module.named_parameters()
                if SITE_PREFIX not in name
            )
