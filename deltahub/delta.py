"""The handle a user holds: attach, switch, scale, merge, detach, save.

``attach`` is authoring: it resolves targets, builds fresh tensors and freezes the rest of the model. Attaching is all
or nothing; a model is as it was when anything is refused. ``deltas`` lists what sits on a model, ``using`` says which
of them act.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltahub.composition import (
    REGISTRY,
    Registry,
    activate,
    active,
    check_conflicts,
    deltas,
    freeze,
    registry,
    thaw,
    using,
)
from deltahub.errors import InjectionError, TargetError, UsageError
from deltahub.hosts import BLOCK, view_of
from deltahub.injection import add_site, merge_slot, remove_site, slot_of
from deltahub.sites import SITE_PREFIX, Bound, Part, Site

if TYPE_CHECKING:
    import os

    from deltahub.hub import PushResult
    from deltahub.kinds.host_shape import HostShape
    from deltahub.package import Package

__all__ = ["Delta", "attach", "attach_parts", "deltas", "push", "save", "using"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")


class Delta:
    """A delta attached to a model. Made by :func:`attach` and ``deltahub.load``, not directly."""

    def __init__(self, *, name: str, model: nn.Module, parts: Sequence[Part]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self._model = model

    def __repr__(self) -> str:
        kinds = ", ".join(f"{p.name}: {p.kind.name}@{p.kind.version} × {len(p.sites)}" for p in self.parts)
        state = "merged" if self.merged else "active" if self.active else "inactive"
        return f"<Delta {self.name!r} {state}, {self.num_parameters():,} parameters ({kinds})>"

    # --- what it holds
    @property
    def sites(self) -> list[Site]:
        """All sites, in the order of the manifest."""
        return [site for part in self.parts for _, site in part.sites]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trainable tensors under their package names, ``<module>/<target path>/<tensor>``."""
        for part in self.parts:
            for _, site in part.sites:
                for name, parameter in site._parameters.items():
                    if parameter is not None:
                        yield f"{part.name}/{site.path}/{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the delta, fixed ones included, under their package names."""
        return {
            f"{part.name}/{site.path}/{name}": tensor.detach()
            for part in self.parts
            for _, site in part.sites
            for name, tensor in zip(site.names, site.tensors(), strict=True)
        }

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def requires_grad_(self, value: bool = True) -> Delta:  # noqa: FBT001, FBT002  (torch's own signature)
        for parameter in self.parameters():
            parameter.requires_grad_(value)
        return self

    # --- whether and how strongly it acts
    @property
    def _home(self) -> Registry:
        found = registry(self._model)
        if found is None or found.get(self.name) is not self:
            raise InjectionError(
                "E_INJECTION_DETACHED", f"delta {self.name!r} is no longer attached", hint="attach or load it again"
            )
        return found

    @property
    def active(self) -> bool:
        return self.name in active(self._home)

    @property
    def merged(self) -> bool:
        return any(site.merged for site in self.sites)

    def enable(self) -> Delta:
        """Let the delta act, beside those that are active already."""
        home = self._home
        activate(home, [name for name in home if name == self.name or name in active(home)])
        return self

    def disable(self) -> Delta:
        """Let the delta rest; a merged one is unmerged first."""
        home = self._home
        if self.merged:
            self.unmerge()
        activate(home, [name for name in active(home) if name != self.name])
        return self

    @property
    def scale(self) -> float:
        """User's factor on the delta's effect; 1 is the delta as published.

        It multiplies the config number that the kind's document names as its strength, and otherwise interpolates
        each equation between its input and its result.
        """
        return self._home.switch.strength.get(self.name, 1.0)

    @scale.setter
    def scale(self, value: float) -> None:
        number = float(value)
        if not math.isfinite(number):
            raise UsageError("E_USAGE_SCALE", "a scale must be a finite number", found=value)
        home = self._home
        again = self.merged
        if again:
            self.unmerge()
        home.switch.strength[self.name] = number
        if again:
            self.merge()

    # --- merging
    def merge(self, *, permanently: bool = False) -> Delta:
        """Compute the delta into the backbone's own weights.

        The original weights are kept, so that :meth:`unmerge` restores their bits.

        Args:
            permanently: forget the originals and detach the delta; the model is then a plain one.

        Raises:
            InjectionError: ``E_INJECTION_NOT_MERGEABLE`` with the list of kinds without a merged form,
                ``E_INJECTION_TIED`` where a weight is shared with another module.
        """
        self._check_mergeable()
        home = self._home
        if not self.active:
            self.enable()
        names = {name for name, d in home.items() if d.merged} | {self.name}
        self._remerge(names)
        if permanently:
            for part in self.parts:
                for module, _ in part.sites:
                    slot = slot_of(module)
                    if slot is not None:
                        slot.kept = None
            self._leave()
        return self

    def unmerge(self) -> Delta:
        """Restore the weights that :meth:`merge` changed, bit for bit."""
        self._remerge({name for name, d in self._home.items() if d.merged} - {self.name})
        return self

    def _remerge(self, names: set[str]) -> None:
        done: list[tuple[nn.Module, set[str]]] = []
        try:
            for module in dict.fromkeys(module for part in self.parts for module, _ in part.sites):
                slot = slot_of(module)
                assert slot is not None
                before = {s.delta for s in slot.sites if s.merged}
                merge_slot(module, names)
                done.append((module, before))
        except BaseException:
            for module, before in reversed(done):
                merge_slot(module, before)
            raise

    def _check_mergeable(self) -> None:
        live = sorted({p.kind.name for p in self.parts for _, s in p.sites if not s.bound.mergeable})
        if live:
            raise InjectionError(
                "E_INJECTION_NOT_MERGEABLE",
                f"delta {self.name!r} has parts without a merged form",
                found=", ".join(live),
                hint="keep the delta live, or export the model with the delta in it",
            )
        counts: dict[int, list[str]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            if SITE_PREFIX not in path:
                for name, p in module._parameters.items():
                    if p is not None:
                        counts.setdefault(id(p), []).append(f"{path}.{name}")
        for part in self.parts:
            for module, site in part.sites:
                for name in ("weight", "bias"):
                    p = module._parameters.get(name)
                    if p is not None and name in site.bound.ports and len(counts.get(id(p), ())) > 1:
                        raise InjectionError(
                            "E_INJECTION_TIED",
                            "merging would change another module too: the weight is tied",
                            where=site.path,
                            found=", ".join(counts[id(p)]),
                            hint="untie the weight first, or keep the delta live",
                        )

    # --- leaving
    def detach(self) -> None:
        """Take the delta off. The last one leaves every bit, class and ``requires_grad`` as it was."""
        home = self._home
        if self.merged:
            self.unmerge()
        self._leave()
        if not home:
            for undo in reversed(home.undo):
                undo()

    def _leave(self) -> None:
        home = self._home
        for part in self.parts:
            for module, site in part.sites:
                remove_site(module, site)
        del home[self.name]
        home.switch.strength.pop(self.name, None)
        activate(home, [name for name in active(home) if name != self.name], check=False)
        if not home:
            thaw(self._model, home)
            del self._model.__dict__[REGISTRY]

    # --- publishing
    def save(self, directory: str | os.PathLike[str], **options: Any) -> Package:
        """Write this delta alone as a package; see :func:`save` for the options."""
        return save(self, directory, **options)

    def push(self, repo_id: str, **options: Any) -> PushResult:
        """Publish this delta alone; see :func:`push` for the options."""
        return push(self, repo_id, **options)


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


def save(model: nn.Module | Delta, directory: str | os.PathLike[str], **options: Any) -> Package:
    """Write the deltas of a model (or one of them) as a package.

    Args:
        model: a model with attached deltas, or one delta.
        directory: where to; the folder is absent or whole afterwards.
        options: see :func:`deltahub.saving.write_package` (``backbone=``, ``probe=``, ``readme=``, ``overwrite=`` …).

    Raises:
        InjectionError: ``E_INJECTION_NONE`` where no delta is attached.
    """
    from deltahub.saving import write_package

    if isinstance(model, Delta):
        chosen, root = [model], model._model
    else:
        chosen, root = list(deltas(model).values()), model
    if not chosen:
        raise InjectionError("E_INJECTION_NONE", "no delta is attached to this model", hint="attach one first")
    home = registry(root)
    return write_package(
        directory,
        model=root,
        parts=[(d.name, part) for d in chosen for part in d.parts],
        backbone_section=None if home is None else home.backbone,
        **options,
    )


def push(model: nn.Module | Delta | str | os.PathLike[str], repo_id: str, **options: Any) -> PushResult:
    """Publish a model's deltas, one delta, or a package folder; one commit on the Hub.

    Args:
        model: a model with attached deltas, one delta, or the path of a package.
        repo_id: ``user/name`` on the Hub.
        options: see :func:`deltahub.hub.push`; for a model also those of :func:`save`.
    """
    import tempfile
    from pathlib import Path

    from deltahub import hub

    if not isinstance(model, (nn.Module, Delta)):
        return hub.push(model, repo_id, **options)
    saving = {k: options.pop(k) for k in ("backbone", "probe", "readme", "extensions") if k in options}
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "package", **saving)
        return hub.push(Path(folder) / "package", repo_id, **options)
