"""Which deltas of a model act, and whether they may act together: the registry, conflicts, ``using``."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from deltahub.errors import InjectionError
from deltahub.sites import SITE_PREFIX, Part, Site, Switch

__all__ = [
    "REGISTRY",
    "Attached",
    "Registry",
    "activate",
    "active_names",
    "check_conflicts",
    "deltas",
    "freeze",
    "registry",
    "thaw",
    "using",
]

REGISTRY = "_deltahub_deltas"


class Attached(Protocol):
    """What composition needs of a delta: the handle itself is above this room."""

    name: str
    parts: tuple[Part, ...]

    @property
    def merged(self) -> bool: ...


class Registry(dict[str, Any]):
    """The deltas of one model, the switch they share, and what to restore when the last one leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = Switch()
        self.frozen: dict[str, bool] | None = None
        self.undo: list[Callable[[], None]] = []
        self.backbone: object = None
        """The backbone section of the manifest that the model was loaded from, if it was."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Registry, (), self.__dict__, None, iter(self.items()))


def registry(model: nn.Module) -> Registry | None:
    """The deltas of a model that was attached to; ``None`` for a plain one."""
    return model.__dict__.get(REGISTRY)


def deltas(model: nn.Module) -> Mapping[str, Any]:
    """The deltas attached to a model, by name, in the order of attachment."""
    found = registry(model)
    return {} if found is None else dict(found)


def active_names(home: Registry) -> list[str]:
    """Names of the deltas that act, in order."""
    return home.switch.key.split("\n") if home.switch.key else []


def activate(home: Registry, names: Sequence[str], *, check: bool = True) -> None:
    """Let exactly these deltas act."""
    if check:
        check_conflicts([home[name] for name in names])
    home.switch.key = "\n".join(names)


def _claims(site: Site) -> list[str]:
    """What a site alone may decide: parameters that it sets without reading them, a module that it replaces."""
    ports = site.bound.ports
    claims = [f"{site.path}.{p}" for p in ("weight", "bias") if p in ports and not ports[p].uses & {"W", "b"}]
    return [*claims, f"{site.path} (replaced)"] if "replace" in ports else claims


def check_conflicts(chosen: Iterable[Attached]) -> None:
    """Refuse deltas that cannot act together.

    Two conflict when both overwrite a parameter, both replace a module, or one touches what the other removes.

    Raises:
        InjectionError: ``E_INJECTION_CONFLICT``.
    """
    parts = [(f"{delta.name}/{part.name}", part) for delta in chosen for part in delta.parts]
    owner: dict[str, str] = {}
    for me, part in parts:
        for _, site in part.sites:
            for claim in _claims(site):
                if claim in owner:
                    _conflict(me, owner[claim], claim)
                owner[claim] = me
    removed = {parameter: me for me, part in parts for parameter in part.removes}
    if not removed:
        return
    for me, part in parts:
        for _, site in part.sites:
            for parameter, other in removed.items():
                if other != me and parameter.startswith(f"{site.path}."):
                    _conflict(me, other, parameter)


def _conflict(one: str, other: str, what: str) -> None:
    raise InjectionError(
        "E_INJECTION_CONFLICT",
        f"{one} and {other} cannot both act",
        where=what,
        hint="disable or detach one of them first; `deltahub.using` switches between them",
    )


@contextlib.contextmanager
def using(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """Let exactly these deltas act inside the ``with`` block; none of them for no name.

    Args:
        model: a model with attached deltas.
        names: names of attached deltas, in the order in which they act.

    Raises:
        InjectionError: ``E_INJECTION_UNKNOWN`` for a name that is not attached, ``E_INJECTION_CONFLICT`` where two of
            them cannot act together.
    """
    home = registry(model) or Registry()
    for name in names:
        _lookup(home, name)
    before = home.switch.key
    resting = [d.name for d in home.values() if d.merged and d.name not in names]
    if resting:
        raise InjectionError(
            "E_INJECTION_MERGED", "a merged delta cannot rest", found=", ".join(resting), hint="unmerge it first"
        )
    activate(home, list(dict.fromkeys(names)))
    try:
        yield model
    finally:
        home.switch.key = before


def _lookup(home: Mapping[str, Any], name: str) -> Any:
    try:
        return home[name]
    except KeyError:
        near = difflib.get_close_matches(name, list(home), 3)
        raise InjectionError(
            "E_INJECTION_UNKNOWN",
            f"no delta {name!r} is attached",
            found=", ".join(home) or "none at all",
            hint=f"did you mean {near[0]!r}?" if near else "see deltahub.deltas(model)",
        ) from None


def thaw(model: nn.Module, home: Registry) -> None:
    """Give every parameter of the backbone the ``requires_grad`` that it had before the first delta."""
    if home.frozen is not None:
        for name, parameter in model.named_parameters():
            if name in home.frozen:
                parameter.requires_grad_(home.frozen[name])


def freeze(model: nn.Module, home: Registry) -> None:
    """Freeze the backbone once, and remember what was trainable."""
    if home.frozen is None:
        named = [(n, p) for n, p in model.named_parameters() if SITE_PREFIX not in n]
        home.frozen = {name: parameter.requires_grad for name, parameter in named}
        for _, parameter in named:
            parameter.requires_grad = False
