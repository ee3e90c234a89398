"""The handle a user holds: switch, scale, merge, detach, save, push."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from deltahub.composition import (
    REGISTRY,
    Registry,
    activate,
    active_names,
    deltas,
    registry,
    thaw,
)
from deltahub.contexts import withdraw
from deltahub.errors import InjectionError, UsageError
from deltahub.hearing import unhear
from deltahub.injection import merge_slot, parameter_of, remove_site, remove_span, slot_of
from deltahub.sites import SITE_PREFIX, Part, Site
from deltahub.targets import backbone_modules

if TYPE_CHECKING:
    import os

    from deltahub.hub import PushResult
    from deltahub.package import Package

__all__ = ["Delta", "push", "save"]


class Delta:
    """A delta attached to a model. Made by :func:`attach` and ``deltahub.load``, not directly."""

    def __init__(self, *, name: str, model: nn.Module, parts: Sequence[Part]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self._model = model
        self.providers: tuple[str, ...] = ()
        """Paths of the modules that tell its sites what their equations ask of the surroundings."""
        self.prompted: tuple[str, ...] = ()
        """Paths of the transformers before whose tokens it puts something."""
        self.report: object = None
        """How it was loaded: a :class:`deltahub.loading.LoadReport`, for a delta that came from a package."""

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
        return self.name in active_names(self._home)

    @property
    def merged(self) -> bool:
        home = registry(self._model)
        if home is None or home.get(self.name) is not self:  # one that was merged for good
            return any(site.merged for site in self.sites)
        return self.name in home.merged

    def enable(self) -> Delta:
        """Let the delta act, beside those that are active already."""
        home = self._home
        acting = {*active_names(home), self.name}
        activate(home, [name for name in home if name in acting])
        return self

    def disable(self) -> Delta:
        """Let the delta rest; a merged one is unmerged first."""
        home = self._home
        if self.merged:
            self.unmerge()
        activate(home, [name for name in active_names(home) if name != self.name])
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
        if self.prompted and number not in {0.0, 1.0}:
            raise UsageError(
                "E_USAGE_SCALE", "a prompt is there or not there", expected="a scale of 0 or 1", found=number
            )
        home = self._home
        again = self.merged
        if again:
            self.unmerge()
        for bound in {id(site.bound): site.bound for site in self.sites}.values():
            if bound.kind.document.strength:
                bound.strengthened(number)
        home.switch.strength[self.name] = number
        if again:
            self.merge()

    def swap(self, other: Delta) -> Delta:
        """Exchange tensors with another delta of this model that has the same modules, configs and shapes.

        Nothing is copied and no plan is made anew, so a model compiled with ``torch.compile`` goes on with the other
        delta's numbers and is not compiled again; switching by name compiles once for each set of active deltas.
        Names, scales and what is active stay; the tensors (with their gradients) and the reports change places.

        Args:
            other: an attached delta; typically a resident one that does not act.

        Raises:
            InjectionError: ``E_INJECTION_UNLIKE`` where the two differ in more than their numbers,
                ``E_INJECTION_MERGED`` while one of them is merged.
        """
        self._home, other._home  # noqa: B018 - both must be attached
        if self.merged or other.merged:
            raise InjectionError(
                "E_INJECTION_MERGED", "a merged delta cannot be exchanged", hint="unmerge it first", found=self.name
            )
        mine, theirs = self.sites, other.sites
        unlike = next((a for a, b in zip(mine, theirs, strict=False) if _layout(a) != _layout(b)), None)
        if unlike is not None or len(mine) != len(theirs) or self._model is not other._model:
            raise InjectionError(
                "E_INJECTION_UNLIKE",
                f"{self.name!r} and {other.name!r} differ in more than their numbers",
                where=None if unlike is None else unlike.path,
                hint="switch with `deltahub.using`, or enable and disable them",
            )
        for a, b in zip(mine, theirs, strict=True):
            held: tuple[tuple[Any, Any], ...] = ((a._parameters, b._parameters), (a._buffers, b._buffers))
            for one, two in held:
                for name in one:
                    one[name], two[name] = two[name], one[name]
        self.report, other.report = other.report, self.report
        return self

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
            self._home.merged = names
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
                for port, name in zip(("weight", "bias"), site.parameters_there, strict=False):
                    p = parameter_of(module, name)
                    if p is not None and port in site.bound.ports and len(counts.get(id(p), ())) > 1:
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
            for module, (_, site) in zip(part.sources, part.sites, strict=False):
                if site.span is not None:
                    remove_span(module, site.span)
        del home[self.name]
        home.merged.discard(self.name)
        home.agreeing.clear()
        if self.providers:
            others = {path for d in home.values() for path in d.providers}
            withdraw(backbone_modules(self._model), set(self.providers) - others)
        for path in set(self.prompted) - {path for d in home.values() for path in d.prompted}:
            unhear(backbone_modules(self._model), path)
        home.switch.strength.pop(self.name, None)
        activate(home, [name for name in active_names(home) if name != self.name], check=False)
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


def _layout(site: Site) -> tuple[object, ...]:
    """All that a forward pass depends on besides the numbers."""
    bound = site.bound
    facts = [(t.shape, t.dtype, t.device, t.requires_grad) for t in site.tensors()]
    return (site.path, bound.kind, bound.config, bound.shape, site.names, site.mixed, facts)


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
        known=None if home is None else home.backbone,
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
