"""What a merge has to do: the changes of each module, in order, and what has no merged form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltahub.converters.architecture import Architecture, HostModule
from deltahub.converters.combining import Method
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.manifest import Module
    from deltahub.merging import Change
    from deltahub.package import Package
    from deltahub.places import Rows

__all__ = ["Job", "Live", "gather", "refuse_live"]


@dataclass(frozen=True, kw_only=True)
class Live:
    """A site that has no merged form, and why.

    Attributes:
        number: of its package.
        module: its module's name in the manifest.
        path: of the host.
        why: for people.
    """

    number: int
    module: str
    path: str
    why: str


@dataclass(kw_only=True)
class Job:
    """What is to become of one module: its changes in order, and who asked for each.

    Attributes:
        owners: for messages.
        sites: number of the package and name of the module in its manifest.
    """

    host: HostModule
    owners: list[str] = field(default_factory=list)
    sites: list[tuple[int, str]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    @property
    def packages(self) -> list[int]:
        """Numbers of the packages that change it, each once."""
        return sorted({number for number, _ in self.sites})

    def reads(self, name: str) -> bool:
        """Whether what the module has now as ``weight`` or ``bias`` matters for what it will have."""
        symbol = "W" if name == "weight" else "b"
        for change in self.changes:
            port = change.ports.get(name)
            if port is not None:
                return change.strength != 1.0 or change.rows is not None or symbol in port.uses
        return True

    def live(self, why: str) -> list[Live]:
        """All its sites, as what has to stay live."""
        return [Live(number=n, module=m, path=self.host.path, why=why) for n, m in self.sites]


def gather(packages: Sequence[Package], method: Method, arch: Architecture) -> tuple[dict[str, Job], list[Live]]:
    """All changes by module path, in order; and what has no merged form.

    Raises:
        ConverterError: ``E_MERGE_TARGET``, ``E_MERGE_CONFLICT``.
    """
    jobs: dict[str, Job] = {}
    live: list[Live] = []
    for number, package in enumerate(packages):
        for module in package.manifest.modules:
            live += _gather_module(package, module, number, method, arch, jobs, several=len(packages) > 1)
    for path, job in jobs.items():
        _check_conflict(path, job, method)
    return jobs, live


def refuse_live(live: Sequence[Live]) -> None:
    """Refuse what cannot be merged as a whole, with the list.

    Raises:
        ConverterError: ``E_MERGE_UNMERGEABLE``.
    """
    if live:
        raise ConverterError(
            "E_MERGE_UNMERGEABLE",
            f"{len(live)} part(s) have no merged form",
            found=live[0].why,
            hint="keep these deltas live: deltahub.load attaches them; or bake them in, beside the weights",
            also=[one.why for one in live[1:]],
        )


def _gather_module(
    package: Package,
    module: Module,
    number: int,
    method: Method,
    arch: Architecture,
    jobs: dict[str, Job],
    *,
    several: bool,
) -> list[Live]:
    from deltahub.places import Rows, fitted
    from deltahub.sites import Bound, change_of

    rows = None if module.rows is None else Rows.of(module.rows.numbers)
    owner = f"{number}:{module.name}" if several else module.name
    factor = method.weights[number] if method.sequential else 1.0
    kind = package.registry.get(module.kind, module.version)
    config = kind.check_config(module.config)
    stored = package.tensors(module.name)
    left = []
    for path in module.paths:
        host = arch.host(path)
        shape = fitted(host.shape, rows, module.stack or 0, host.stack, path)
        if not kind.mergeable(config, shape) or module.removes:
            why = f"{owner}: {kind.name} at {path} ({host.type_name})"
            left.append(Live(number=number, module=module.name, path=path, why=why))
            continue
        bound = Bound(kind, config, shape, runs=host.runs, whole=rows is None)
        tensors = stored[path]
        known = {n: tuple(t.shape[1:] if host.stack else t.shape) for n, t in tensors.items()}
        names = list(kind.tensors(config, shape, known=known))
        job = jobs.setdefault(path, Job(host=host))
        given = [tensors[name] for name in names]
        job.changes.append(change_of(bound, names, given, factor, rows=rows, stack=host.stack))
        job.owners.append(owner)
        job.sites.append((number, module.name))
    return left


def _check_conflict(path: str, job: Job, method: Method) -> None:
    """Two that overwrite one parameter contradict each other, as they do when they are attached."""
    from deltahub.places import overlap

    setter: dict[tuple[str, int, Rows | None], str] = {}
    for change, owner, (number, _) in zip(job.changes, job.owners, job.sites, strict=True):
        for name in ("weight", "bias"):
            port = change.ports.get(name)
            if port is None or port.uses & {"W", "b"}:
                continue
            key = (name, 0 if method.sequential else number, change.rows)
            other = next((o for k, o in setter.items() if k[:2] == key[:2] and overlap(k[2], change.rows)), None)
            if other is not None:
                raise ConverterError(
                    "E_MERGE_CONFLICT",
                    f"{other} and {owner} both set this parameter",
                    where=f"{path}.{name}",
                    hint="merge one of them, or combine them by another method than their sum",
                )
            setter[key] = owner
