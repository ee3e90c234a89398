"""What an author means by targets: modules by name, glob, type, role or function; parts of fused and stacked ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from deltahub.errors import TargetError
from deltahub.places import Rows, parameters_of, place_of
from deltahub.roles import ROLE_PREFIX, Target, in_order, targets_of
from deltahub.sites import Part
from deltahub.targets import select

if TYPE_CHECKING:
    from deltahub.kinds import Kind

__all__ = ["Choice", "Modules", "by_default", "choose", "split"]

Modules = Mapping[str, nn.Module]
"""The modules of a backbone by path, from :func:`~deltahub.targets.backbone_modules`: the root under the empty one."""

Choice = Callable[[str, nn.Module], bool]
"""An author's own choice of modules, by path and module."""


def by_default(modules: Modules, kind: Kind, exclude: str | Sequence[str]) -> list[Target]:
    """Where a kind's document puts it: all of its own targets that this architecture has."""
    found: set[Target] = set()
    for target in kind.document.targets:
        try:
            found |= set(choose(modules, target, exclude))
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
    whole = {target.path for target in found if target.rows is None}  # a fused module that is meant whole is not cut
    return in_order(modules, {target for target in found if target.rows is None or target.path not in whole})


def choose(backbone: Modules, targets: str | Sequence[str] | Choice, exclude: str | Sequence[str]) -> list[Target]:
    """What an author means, in the model's order: modules, parameters that are hosts of their own, and rows of both."""
    model = backbone[""]
    modules = {path: module for path, module in backbone.items() if path}
    wanted = [targets] if isinstance(targets, str) or callable(targets) else list(targets)
    found: set[Target] = set()
    endings: dict[object, set[Target]] = {}  # what a single name selects, for all of them in one look
    for path in modules if any(isinstance(target, str) and target.isidentifier() for target in wanted) else ():
        endings.setdefault(path.rpartition(".")[2], set()).add(Target(path))
    for target in wanted:
        if callable(target):
            found |= {Target(path) for path, module in modules.items() if target(path, module)}
        elif target in modules:
            found.add(Target(target))
        elif target in endings:
            found |= endings[target]
        elif target.startswith(ROLE_PREFIX):
            found |= set(targets_of(model, target.removeprefix(ROLE_PREFIX), modules))
        else:
            found |= {Target(path) for path in _selected(model, modules, target)}
    if exclude:
        every = {**modules, **parameters_of(backbone)}
        kept = set(select(every, "**", exclude))
        found = {target for target in found if target.path in kept}
    if not found:
        raise TargetError("E_TARGET_NOTHING", "no module is left to attach to", hint="see model.named_modules()")
    return in_order(backbone, found)


def _selected(model: nn.Module, modules: Mapping[str, nn.Module], target: str) -> list[str]:
    """Modules; or where there is none of that name, parameters that are hosts of their own."""
    try:
        return select(modules, target)
    except TargetError as error:
        if error.code != "E_TARGET_NOTHING":
            raise
        parameters = parameters_of({"": model, **modules})
        try:
            return select(parameters, target)
        except TargetError:
            raise error from None


def split(
    modules: Modules,
    name: str,
    kind: Kind,
    config: Mapping[str, object],
    chosen: Sequence[Target],
    sources: Sequence[Target] = (),
    *,
    dropout: float = 0.0,
) -> list[Part]:
    """Targets as parts of a delta: one part for all whole modules, and one for each way of being a part of a host.

    Args:
        modules: of the backbone.
        name: of the first part; the others add to it.
        kind: of all of them.
        config: the same.
        chosen: from :func:`choose`.
        sources: modules whose inputs are read in place of the targets' own, one for each target; or none.
        dropout: as for :func:`attach`.

    Raises:
        TargetError: ``E_TARGET_SPANS`` where there are not as many sources as targets, or one is part of a module.
    """
    if sources:
        return [_spans(name, kind, config, chosen, sources, dropout=dropout)]
    alike: dict[tuple[Rows | None, int], list[str]] = {}
    for target in chosen:
        place = place_of(modules, target.path)
        stack = 0 if place is None or place.view is None else place.view.stack(place.module)
        alike.setdefault((target.rows, stack), []).append(target.path)
    return [
        Part(
            name=name if i == 0 else f"{name}-{i + 1}",
            kind=kind,
            config=config,
            paths=paths,
            rows=rows,
            stack=stack,
            dropout=dropout,
        )
        for i, ((rows, stack), paths) in enumerate(alike.items())
    ]


def _spans(
    name: str,
    kind: Kind,
    config: Mapping[str, object],
    chosen: Sequence[Target],
    sources: Sequence[Target],
    *,
    dropout: float,
) -> Part:
    """Targets with the modules whose inputs are read there, in the model's order."""
    if len(sources) != len(chosen) or any(target.rows is not None for target in (*chosen, *sources)):
        raise TargetError(
            "E_TARGET_SPANS",
            "inputs and targets are whole modules, one input for each target",
            expected=f"{len(chosen)} inputs",
            found=f"{len(sources)}: {', '.join(source.path for source in sources[:3])}",
            hint="name both by patterns that match once in every layer",
        )
    paths, inputs = [t.path for t in chosen], [s.path for s in sources]
    return Part(name=name, kind=kind, config=config, paths=paths, inputs=inputs, dropout=dropout)
