"""Putting a delta on a model: targets resolved, tensors built and checked, then all sites added at once.

Attaching is all or nothing; a model is as it was when anything is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltahub import hearing, kinds, prompting, spanning
from deltahub.attending import check_bias, shape_of
from deltahub.choosing import Choice, Modules, by_default, choose, split
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
from deltahub.hosts import BLOCK, EMBEDDING, View, view_of
from deltahub.injection import add_site, add_span, slot_of
from deltahub.kinds import Document, Kind, TensorSpec
from deltahub.kinds.initial import Draws
from deltahub.places import Place, fitted, place_of
from deltahub.sites import SITE_PREFIX, Bound, Part, Site
from deltahub.targets import backbone_modules

if TYPE_CHECKING:
    from deltahub.kinds.host_shape import HostShape

__all__ = ["attach", "attach_parts"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def attach(
    model: nn.Module,
    kind: str | Mapping[str, object] | os.PathLike[str],
    targets: str | Sequence[str] | Choice | None = None,
    *,
    name: str | None = None,
    exclude: str | Sequence[str] = (),
    inputs: str | Sequence[str] | Choice | None = None,
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
        inputs: modules whose inputs the delta reads in place of its targets' own, in the same notation: as many as
            targets, the first for the first. Where neither is given, those that the kind's document names by default.
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
    if not 0.0 <= dropout < 1.0:
        raise UsageError("E_USAGE_DROPOUT", "dropout is a probability below 1", found=dropout)
    found = _kind(kind)
    name = found.name.rpartition(".")[2] if name is None else name
    modules = backbone_modules(model)
    chosen = by_default(modules, found, exclude) if targets is None else choose(modules, targets, exclude)
    checked = found.check_config(config)
    if inputs is None and targets is None and found.document.inputs:
        inputs = found.document.inputs
    sources = () if inputs is None else choose(modules, inputs, exclude)
    parts = split(modules, name, found, checked, chosen, sources, dropout=dropout)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return attach_parts(model, name, parts, frozen=frozen, dtype=dtype, generator=generator, modules=modules)


def _kind(kind: str | Mapping[str, object] | os.PathLike[str]) -> Kind:
    """A built-in kind by name, or one from a document: a mapping, or a TOML file."""
    if isinstance(kind, str) and not kind.endswith(".toml"):
        return kinds.get(kind)
    if isinstance(kind, Mapping):
        return Kind(Document.parse(kind))
    return Kind(Document.from_toml(Path(kind).read_text(encoding="utf-8"), where=str(kind)))


def attach_parts(
    model: nn.Module,
    name: str,
    parts: Sequence[Part],
    *,
    frozen: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    active: bool = True,
    modules: Modules | None = None,
) -> Delta:
    """Attach the parts of one delta at exact paths; the mechanism behind :func:`attach` and ``deltahub.load``.

    Everything is resolved, checked and built before the model is touched. ``modules`` are those of the backbone, where
    the caller has walked over them already.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "E_USAGE_NAME", "a delta's name is 1 to 64 letters, digits, '_' and '-', a letter first", found=name
        )
    home = registry(model) or Registry()
    if name in home:
        raise InjectionError("E_INJECTION_NAME_TAKEN", f"a delta {name!r} is attached already", hint="give name=")
    require_unmixed(home)
    modules = backbone_modules(model) if modules is None else modules
    draws = Draws(generator or torch.default_generator)
    built: list[tuple[Part, nn.Module, Site]] = []
    for part in parts:
        known: dict[object, tuple[Bound, Mapping[str, TensorSpec]]] = {}
        for path, source in itertools.zip_longest(part.paths, part.inputs):
            place = _place(modules, path, source)
            module = place.module
            _check_home(place, path, home)
            built.append((part, module, _build(name, part, path, place, known, dtype, draws)))
    providers = {path: None for _, module, site in built for path in _surroundings(site, modules, module)}
    delta = Delta(name=name, model=model, parts=parts)
    delta.providers = tuple(providers)
    delta.prompted = tuple(dict.fromkeys(site.path for _, _, site in built if "prompt" in site.bound.ports))
    for part, module, site in built:
        part.sites.append((module, site))
    _find_removed(parts)
    acting = active_names(home)
    check_conflicts([*(d for n, d in home.items() if n in acting), delta][: None if active else -1])
    home[name] = delta
    home.agreeing.clear()
    model.__dict__[REGISTRY] = home
    for part, module, site in built:
        add_site(module, site, home.switch)
        _begin(modules, part, site, home)
    give(modules, providers)
    home.undo += _unnested(modules, {site.path for _, _, site in built})
    _hear(modules, delta.prompted)
    if frozen:
        freeze(modules, home)
    if active:
        home.switch.choose("\n".join([*acting, name]))
    return delta


def _check_home(place: Place, path: str, home: Registry) -> None:
    here = [(path, place.module)] if place.source is None else [(path, place.module), place.source]
    for where, module in here:
        slot = slot_of(module)
        if slot is not None and slot.switch is not home.switch:
            raise InjectionError(
                "E_INJECTION_NESTED",
                "this module carries a delta that was attached to another root",
                where=where,
                hint="attach all deltas through the same outer model",
            )


def _begin(modules: Mapping[str, nn.Module], part: Part, site: Site, home: Registry) -> None:
    """Let a site that reads another module's input hear of it."""
    if site.span is not None:
        source = modules[site.span.source]
        add_span(source, site.span, home.switch)
        part.sources.append(source)


def _place(modules: Mapping[str, nn.Module], path: str, source: str | None = None) -> Place:
    """Where a target is; with the module that it reads the input of, where that is another."""
    place = place_of(modules, path)
    if place is None:
        near = difflib.get_close_matches(path, list(modules), 3, cutoff=0.5)
        raise TargetError(
            "E_TARGET_MISSING",
            "the model has no such module",
            where=path,
            expected=", ".join(near) or None,
            hint="check that the delta was made for this architecture",
        )
    return place if source is None else dataclasses.replace(place, source=(source, _place(modules, source).module))


def _facts(part: Part, path: str, place: Place) -> tuple[HostShape, View]:
    """The host as the part's kind sees it: some of its outputs, or one map of its stack."""
    module = place.module
    slot = slot_of(module)
    base = slot.base if slot is not None else type(module)
    if place.source is not None:
        source, reader = place.source
        return spanning.shape_of(reader, module, (source, path)), BLOCK
    view: View = place.view or (slot.view if slot is not None else view_of(module))
    shape = shape_of(module, base, part.kind.hosts, view.shape(module, base))
    shape = prompting.shape_of(module, base, part.kind.hosts, shape)
    stack = 0 if place.view is None else place.view.stack(module)
    return fitted(shape, part.rows, part.stack, stack, path), view


def _build(
    delta: str,
    part: Part,
    path: str,
    place: Place,
    known: dict[object, tuple[Bound, Mapping[str, TensorSpec]]],
    dtype: torch.dtype | None,
    draws: Draws,
) -> Site:
    module = place.module
    slot = slot_of(module)
    base = slot.base if slot is not None else type(module)
    shape, view = _facts(part, path, place)
    given = None if part.tensors is None else part.tensors[path]
    runs, whole = place.view is None, part.rows is None
    try:
        alike = (shape, runs) if given is None else (shape, runs, *((n, t.shape) for n, t in given.items()))
        if alike not in known:
            shapes = {n: _of_one(n, tuple(t.shape), part.stack) for n, t in (given or {}).items()}
            shape = part.kind.bind(part.config, shape, shapes) if given is not None else shape
            wanted = part.kind.tensors(part.config, shape, known=shapes)
            if (shape, runs) not in known:
                known[shape, runs] = Bound(part.kind, part.config, shape, runs=runs, whole=whole), wanted
            known[alike] = known[shape, runs]
        bound, specs = known[alike]
        check_bias(bound.ports, module, base, path)
        _check_place(bound, place, path)
        if part.dropout and "output" not in bound.ports:
            raise UsageError("E_USAGE_DROPOUT", f"kind {part.kind.name!r} sees no input to drop from", where=path)
        if place.source is not None:
            spanning.check_ports(part.kind.name, bound.ports, path)
    except KindError as error:
        error.where = f"{path} ({base.__name__}), {error.where}" if error.where else f"{path} ({base.__name__})"
        raise
    weight = None if view is BLOCK else view.weight(module) if given is None else view.like(module)
    if shape.family == "transformer":
        weight = EMBEDDING.weight(prompting.embedding_of(module))
    like = weight if weight is not None else next(module.parameters(), None)
    device = like.device if like is not None else torch.device("cpu")
    if given is None:
        like = like if view is BLOCK or shape.family == "transformer" else view.like(module)
        tensors = _fresh(part, specs, like, weight, view.bias(module), dtype, draws)
    else:
        tensors = {
            name: given[name].to(device=device, dtype=dtype if given[name].is_floating_point() else None)
            for name in specs
        }
    for name, spec in specs.items():
        if spec.trainable and tensors[name].is_floating_point():
            tensors[name] = nn.Parameter(tensors[name])
    return Site(
        delta=delta,
        module=part.name,
        path=path,
        bound=bound,
        tensors=tensors,
        dropout=part.dropout,
        view=place.view,
        rows=part.rows,
        stack=part.stack,
        span=None if place.source is None else spanning.Span(delta=delta, source=place.source[0], target=path),
    )


def _check_place(bound: Bound, place: Place, path: str) -> None:
    """Refuse to add a bias where a module computes with a parameter that has none beside it."""
    if place.view is not None and "bias" in bound.ports and not place.view.takes_bias(place.module):
        raise HostError(
            "E_HOST_NO_BIAS",
            "this parameter has no bias of its own, so a delta that changes one cannot act on it",
            where=path,
            hint="use the kind without its bias, or another target",
        )


def _of_one(name: str, shape: tuple[int, ...], stack: int) -> tuple[int, ...]:
    """The shape of a tensor for one map of a stack."""
    if not stack:
        return shape
    if shape[:1] != (stack,):
        raise KindError(
            "E_KIND_SHAPE",
            f"tensor {name!r} does not have one of itself for every linear map of its host",
            expected=f"[{stack}, ...]",
            found=list(shape),
        )
    return shape[1:]


def _fresh(
    part: Part,
    specs: Mapping[str, TensorSpec],
    like: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    draws: Draws,
) -> dict[str, Tensor]:
    """New tensors, map by map of a stack."""
    device = like.device if like is not None else torch.device("cpu")
    wanted = dtype or (like.dtype if like is not None and like.is_floating_point() else torch.get_default_dtype())
    if part.rows is not None:
        weight = None if weight is None else part.rows.take(weight, -2)
        bias = None if bias is None else part.rows.take(bias, -1)
    made: dict[str, Tensor] = {}
    for name, spec in specs.items():
        each = [
            part.kind.init(
                spec,
                draws,
                W=weight if weight is None or not part.stack else weight[i],
                b=bias if bias is None or not part.stack else bias[i],
                dtype=wanted,
                device=device,
            )
            for i in range(part.stack or 1)
        ]
        made[name] = torch.stack(each) if part.stack else each[0]
    return made


def _hear(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> None:
    for path in paths:
        hearing.hear(modules, path)


def _unnested(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[Callable[[], None]]:
    """Let encoders of torch run their layers on plain tensors, which is all that layers with sites can take."""
    undo: list[Callable[[], None]] = []
    around = {path[:at] for path in paths for at, c in enumerate(path) if c == "."} | {""}
    for path in sorted(around):
        encoder = modules.get(path)
        if isinstance(encoder, nn.TransformerEncoder) and getattr(encoder, "use_nested_tensor", False):
            encoder.use_nested_tensor = False
            undo.append(functools.partial(_nest, encoder))
    return undo


def _nest(encoder: nn.TransformerEncoder) -> None:
    encoder.use_nested_tensor = True


def _surroundings(site: Site, modules: Mapping[str, nn.Module], module: nn.Module) -> list[str]:
    """Who tells a site what its equations ask of the surroundings; refused before anything runs where nobody can."""
    if not site.bound.severs and not site.bound.context:
        return []
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
