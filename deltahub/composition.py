"""Which deltas of a model act, and whether they may act together: the registry, conflicts, ``using``."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from deltahub.errors import InjectionError, UsageError
from deltahub.mixing import check_mixable, is_mixed, mixed_key, rows_of
from deltahub.places import overlap
from deltahub.sites import Part, Site, Switch
from deltahub.targets import backbone_modules

__all__ = [
    "REGISTRY",
    "Attached",
    "Registry",
    "activate",
    "active_names",
    "check_conflicts",
    "check_together",
    "deltas",
    "freeze",
    "registry",
    "require_unmixed",
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
        self.backbone: Any = None
        """The backbone section of the manifest that the model was loaded from, if it was."""
        self.merged: set[str] = set()
        """Deltas that are in the backbone's weights now."""
        self.agreeing: set[tuple[str, ...]] = set()
        """Lists of deltas that were found to act together without conflict; forgotten when a delta comes or goes."""

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
    """Names of the deltas that act, in order; on any row, where each row has its own."""
    key = home.switch.chosen
    if is_mixed(key):
        acting = {name for row in rows_of(key) for name in row.split("\n")}
        return [name for name in home if name in acting]
    return key.split("\n") if key else []


def activate(home: Registry, names: Sequence[str], *, check: bool = True) -> None:
    """Let exactly these deltas act.

    Raises:
        InjectionError: ``E_INJECTION_CONFLICT``; ``E_INJECTION_ROWS`` while each row has its own.
    """
    require_unmixed(home)
    if check:
        check_together(home, names)
    home.switch.choose("\n".join(names))


def require_unmixed(home: Registry) -> None:
    """Refuse to change what acts while each row of a batch has its own deltas."""
    if is_mixed(home.switch.chosen):
        raise InjectionError(
            "E_INJECTION_ROWS",
            "which deltas act cannot be changed while each row of a batch has its own",
            hint="leave the block of `using` first",
        )


def _claims(site: Site) -> list[str]:
    """What a site alone may decide: parameters that it sets without reading them, a module that it replaces."""
    ports = site.bound.ports
    claims = [f"{site.path}.{p}" for p in ("weight", "bias") if p in ports and not ports[p].uses & {"W", "b"}]
    return [*claims, f"{site.path} (replaced)"] if "replace" in ports else claims


def check_together(home: Registry, names: Sequence[str]) -> None:
    """:func:`check_conflicts` of attached deltas; their sites are looked at once for each list of names."""
    key = tuple(names)
    if key not in home.agreeing:
        check_conflicts([home[name] for name in names])
        home.agreeing.add(key)


def check_conflicts(chosen: Iterable[Attached]) -> None:
    """Refuse deltas that cannot act together.

    Two conflict when both overwrite a parameter, both replace a module, or one touches what the other removes.

    Raises:
        InjectionError: ``E_INJECTION_CONFLICT``.
    """
    parts = [(f"{delta.name}/{part.name}", part) for delta in chosen for part in delta.parts]
    owners: dict[str, list[tuple[str, Site]]] = {}
    for me, part in parts:
        for _, site in part.sites:
            for claim in _claims(site):
                _check_claim(me, site, claim, owners.setdefault(claim, []))
    removed = {parameter: me for me, part in parts for parameter in part.removes}
    if not removed:
        return
    for me, part in parts:
        for _, site in part.sites:
            for parameter, other in removed.items():
                on = {site.path} if site.span is None else {site.path, site.span.source}
                if other != me and on & {parameter, parameter.rpartition(".")[0]}:
                    _conflict(me, other, parameter)


def _check_claim(me: str, site: Site, claim: str, before: list[tuple[str, Site]]) -> None:
    for other, theirs in before:
        if overlap(site.rows, theirs.rows):
            _conflict(me, other, claim)
    before.append((me, site))


def _conflict(one: str, other: str, what: str) -> None:
    raise InjectionError(
        "E_INJECTION_CONFLICT",
        f"{one} and {other} cannot both act",
        where=what,
        hint="disable or detach one of them first; `deltahub.using` switches between them",
    )


Row = str | Sequence[str] | None
"""What acts on one row of a batch: a delta, several in order, or none."""


@contextlib.contextmanager
def using(model: nn.Module, *names: str | Sequence[Row]) -> Iterator[nn.Module]:
    """Let exactly these deltas act inside the ``with`` block; none of them for no name.

    Given one list, each row of a batch gets its own: ``using(model, ["a", "b", None, "a"])``. The first axis of every
    module's input is then the batch: as long as the list, or a multiple of it with the rows of a sample together (the
    beams of a search, the tokens of a sequence), or 1 for what all rows share.

    Threads may each be in a block of their own on the same model, as those of a server are. A thread without one
    follows the block of another while there is just one such, so a server opens a block for every request. A block
    is left by the thread that entered it.

    Args:
        model: a model with attached deltas.
        names: names of attached deltas, in the order in which they act; or one list with an entry per row: a name,
            several, or ``None``.

    Raises:
        InjectionError: ``E_INJECTION_UNKNOWN`` for a name that is not attached, ``E_INJECTION_CONFLICT`` where two of
            them cannot act together, ``E_INJECTION_ROWS`` where a kind or a module cannot be mixed.
        UsageError: ``E_USAGE_ROWS`` where names and a list are given together, or the list is empty.
    """
    home = registry(model) or Registry()
    rows = _rows(names)
    sets = {tuple(dict.fromkeys(row)) for row in rows}
    for name in dict.fromkeys(name for row in rows for name in row):
        _lookup(home, name)
    resting = sorted(name for name in home.merged if any(name not in row for row in sets))
    if resting:
        raise InjectionError(
            "E_INJECTION_MERGED", "a merged delta cannot rest", found=", ".join(resting), hint="unmerge it first"
        )
    for row in sets:
        check_together(home, row)
    if names and not isinstance(names[0], str):
        check_mixable([s for n in {n for r in sets for n in r} for p in home[n].parts for _, s in p.sites])
        home.switch.enter(mixed_key([list(dict.fromkeys(row)) for row in rows]))
    else:
        home.switch.enter("\n".join(dict.fromkeys(rows[0])))
    try:
        yield model
    finally:
        home.switch.leave()


def _rows(names: Sequence[str | Sequence[Row]]) -> list[list[str]]:
    """One list of names; or one for each row."""
    plain = [name for name in names if isinstance(name, str)]
    if len(plain) == len(names):
        return [plain]
    if len(names) > 1 or not names[0]:
        raise UsageError(
            "E_USAGE_ROWS",
            "which deltas act is given as names, or as one list with an entry for each row",
            expected='using(model, "a", "b") or using(model, ["a", None, "b"])',
            found=names,
        )
    return [[] if row is None else [row] if isinstance(row, str) else list(row) for row in names[0]]


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
        for name, parameter in _parameters(backbone_modules(model)):
            if name in home.frozen:
                parameter.requires_grad_(home.frozen[name])


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The backbone's own parameters, each once."""
    seen: set[int] = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter


def freeze(modules: Mapping[str, nn.Module], home: Registry) -> None:
    """Freeze the backbone once, and remember what was trainable."""
    if home.frozen is None:
        home.frozen = {}
        for name, parameter in _parameters(modules):
            home.frozen[name] = parameter.requires_grad
            if parameter.requires_grad:
                parameter.requires_grad = False
