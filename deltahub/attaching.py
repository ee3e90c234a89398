"""Putting a delta on a model: targets resolved, tensors built and checked, then all sites added at once.

Attaching is all or nothing; a model is as it was when anything is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltahub.composition import REGISTRY, Registry, active, check_conflicts, freeze, registry
from deltahub.delta import Delta
from deltahub.errors import InjectionError, TargetError, UsageError
from deltahub.hosts import BLOCK, view_of
from deltahub.injection import add_site, slot_of
from deltahub.sites import SITE_PREFIX, Bound, Part, Site

if TYPE_CHECKING:
    import os

    from deltahub.kinds.host_shape import HostShape

__all__ = ["attach", "attach_parts"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


def attach(
    model: nn.Module,
    kind: str | Mapping[str, object] | os.PathLike[str],
    targets: str | Sequence[str] | Callable[[str, nn.Module], bool],
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
        targets: exact paths, dotted suffixes, globs (``**.query``), ``type:Linear``, ``{0..11}`` ranges, or a function
            of path and module. Something must match.
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
    from deltahub.kinds import resolve
    from deltahub.targets import select

    found = resolve(kind)
    name = name or found.name.rsplit(".", 1)[-1]
    modules = {n: m for n, m in model.named_modules() if n and SITE_PREFIX not in n}
    paths = select(modules, targets, exclude)
    part = Part(name=name, kind=found, config=found.check_config(config), paths=paths, dropout=dropout)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return attach_parts(model, name, [part], frozen=frozen, dtype=dtype, generator=generator)


def attach_parts(
    model: nn.Module,
    name: str,
    parts: Sequence[Part],
    *,
    frozen: bool = True,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Delta:
    """Attach the parts of one delta at exact paths; the mechanism behind :func:`attach` and ``deltahub.load``.

    Everything is resolved, checked and built before the model is touched.
    """
    if not _NAME.fullmatch(name):
        raise UsageError("E_USAGE_NAME", "a delta's name holds letters, digits, '.', '_' and '-'", found=name)
    home = registry(model) or Registry()
    if name in home:
        raise InjectionError("E_INJECTION_NAME_TAKEN", f"a delta {name!r} is attached already", hint="give name=")
    modules = {n: m for n, m in model.named_modules() if SITE_PREFIX not in n}
    built: list[tuple[Part, nn.Module, Site]] = []
    for part in parts:
        bounds: dict[tuple[HostShape, bool], Bound] = {}
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
            built.append((part, module, _build(name, part, path, module, bounds, dtype, generator)))
    delta = Delta(name=name, model=model, parts=parts)
    for part, module, site in built:
        part.sites.append((module, site))
    check_conflicts([*(d for n, d in home.items() if n in active(home)), delta])
    home[name] = delta
    model.__dict__[REGISTRY] = home
    for _, module, site in built:
        add_site(module, site, home.switch)
    if frozen:
        freeze(model, home)
    home.switch.key = "\n".join([*active(home), name])
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
    bounds: dict[tuple[HostShape, bool], Bound],
    dtype: torch.dtype | None,
    generator: torch.Generator | None,
) -> Site:
    slot = slot_of(module)
    view = slot.view if slot is not None else view_of(module)
    shape = view.shape(module, slot.base if slot is not None else type(module))
    given = None if part.tensors is None else part.tensors[path]
    known = {} if given is None else {n: tuple(t.shape) for n, t in given.items()}
    live = view.live_output(module)
    bound = bounds.get((shape, live))
    if bound is None:
        part.kind.fits(shape, part.config, where=path)
        bound = bounds[shape, live] = Bound(part.kind, part.config, shape, live_output=live)
    specs = part.kind.tensors(part.config, shape, known=known, where=path)
    tensors: dict[str, Tensor] = {}
    weight = None if view is BLOCK else view.weight(module)
    like = weight if weight is not None else next(module.parameters(), None)
    device = like.device if like is not None else torch.device("cpu")
    for name, spec in specs.items():
        if given is None:
            value = part.kind.init(
                spec,
                generator,
                W=weight,
                b=view.bias(module),
                dtype=dtype
                or (like.dtype if like is not None and like.is_floating_point() else torch.get_default_dtype()),
                device=device,
            )
        else:
            value = given[name].to(device=device, dtype=dtype if given[name].is_floating_point() else None)
        trainable = spec.trainable and value.is_floating_point()
        tensors[name] = nn.Parameter(value) if trainable else value
    return Site(delta=delta, module=part.name, path=path, bound=bound, tensors=tensors, dropout=part.dropout)
