"""Headers against manifest: every tensor of every site is there once, in the shape and dtype that its kind gives it.

No backbone is at hand, so the sizes that only it knows are taken to be those that make all tensors of a site agree;
tensors for which there are none are refused. Nothing is allocated: shapes come from headers alone.
"""

from __future__ import annotations

__all__ = ["Header", "Site", "check_kinds", "check_tensors"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deltahub.errors import DeltaHubError, KindError, PackageError
from deltahub.kinds import HostShape, Kind, Registry
from deltahub.kinds.fields import Dim, holds
from deltahub.kinds.layout import conditions
from deltahub.kinds.tree import Name

if TYPE_CHECKING:
    from deltahub.manifest import Manifest, Module

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name to dtype and shape."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_SHOWN = 1000
_SPATIAL = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A module of the manifest with its kind and checked config."""

    module: Module
    kind: Kind
    config: Mapping[str, object]


def check_kinds(manifest: Manifest, *, where: str) -> tuple[Registry, dict[str, Site]]:
    """Look up the kind of every module and check its config.

    Raises:
        KindError: with the path into the manifest; of several problems the first, with the others in ``also``.
    """
    problems: list[DeltaHubError] = []
    try:
        registry = Registry(manifest.kinds or ())
    except DeltaHubError as error:
        raise _located(error, f"{where}: kinds") from None
    sites: dict[str, Site] = {}
    for i, module in enumerate(manifest.modules):
        place = f"{where}: modules[{i}]"
        try:
            kind = registry.get(module.kind, module.version)
        except DeltaHubError as error:
            problems.append(_located(error, f"{place}.kind"))
            continue
        try:
            config = kind.check_config(module.config)
            if module.inputs and "block" not in kind.hosts:
                raise KindError("E_KIND_HOST", f"kind {kind.name!r} cannot act from one module to another")
        except DeltaHubError as error:
            problems.append(_located(error, f"{place}.config"))
            continue
        sites[module.name] = Site(module=module, kind=kind, config=MappingProxyType(config))
    if problems:
        first, *others = problems
        first.also = tuple(f"[{e.code}] {e.where}: {e.what}" for e in others)
        raise first
    return registry, sites


def _located(error: DeltaHubError, place: str) -> DeltaHubError:
    error.where = place
    return error


def check_tensors(sites: Mapping[str, Site], header: Header, *, where: object) -> dict[str, dict[str, dict[str, str]]]:
    """Compare what is there with what the manifest and its kinds ask for.

    Args:
        sites: the modules by name.
        header: every tensor of the package.
        where: what to call the package in errors.

    Returns:
        For each module, for each of its paths in order: the kind's tensor names, in the document's order, to the
        names in the files.

    Raises:
        PackageError: ``E_PACKAGE_TENSORS`` if one is missing, left over, or of a dtype that the kind cannot use.
        KindError: ``E_KIND_SHAPE``, ``E_KIND_TENSOR`` or ``E_KIND_HOST`` if shapes do not fit together.
    """
    grouped, strays = _grouped(sites, header)
    problems: list[DeltaHubError] = [
        PackageError("E_PACKAGE_TENSORS", f"nothing uses the tensor {name!r}", where=where) for name in strays
    ]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for site in sites.values():
        seen: dict[object, list[str] | None] = {}
        here = found.setdefault(site.module.name, {})
        for path in site.module.paths:
            held = grouped.get((site.module.name, path), {})
            facts = {name: header[full] for name, full in held.items()}
            key = frozenset(facts.items())
            if key not in seen:
                place = f"{site.module.name}/{path}"
                names, wrong = _fitting(site, facts, place)
                problems += wrong
                seen[key] = None if wrong else names
            order = seen[key]
            if order is not None:
                here[path] = {name: held[name] for name in order}
    if problems:
        first, *others = problems
        first.also = tuple(f"[{e.code}] {_line(e)}" for e in others[:_SHOWN])
        raise first
    return found


def _line(error: DeltaHubError) -> str:
    return f"{error.where}: {error.what}" if isinstance(error, KindError) else error.what


def _grouped(sites: Mapping[str, Site], header: Header) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """Sort tensors by module and path; what belongs to none is left over."""
    paths = {name: frozenset(site.module.paths) for name, site in sites.items()}
    grouped: dict[tuple[str, str], dict[str, str]] = {}
    strays: list[str] = []
    for full in header:
        module, _, rest = full.partition("/")
        path, _, name = rest.partition("/")
        if name and "/" not in name and path in paths.get(module, ()):
            grouped.setdefault((module, path), {})[name] = full
        else:
            strays.append(full)
    return grouped, strays


def _fitting(site: Site, facts: Header, place: str) -> tuple[list[str], list[DeltaHubError]]:
    """Find a host on which a site's tensors agree: their names in order, or what is wrong if there is no such host."""
    stack = site.module.stack
    if stack is not None:
        odd = [name for name, (_, shape) in facts.items() if shape[:1] != (stack,)]
        if odd:
            what = f"tensor {odd[0]!r} does not have one of itself for every linear map of its host"
            found = list(facts[odd[0]][1])
            return [], [KindError("E_KIND_SHAPE", what, where=place, expected=f"[{stack}, ...]", found=found)]
    known = {name: shape if stack is None else shape[1:] for name, (_, shape) in facts.items()}
    best: tuple[tuple[int, int], list[DeltaHubError]] | None = None
    for shape in _hosts(site, known):
        try:
            wanted = _wanted(site, shape, known)
        except (KindError, PackageError) as error:
            # Of all hosts that do not fit, the one whose tensors at least have the right names says most.
            rank = (1, 0) if error.code == "E_KIND_SHAPE" else (2, 0)
            wrong: list[DeltaHubError] = [_located(error, place)]
        else:
            missing = [name for name in wanted if name not in known]
            if not missing:
                return list(wanted), _dtypes(wanted, facts, place)
            rank = (0, len(missing))
            wrong = [
                PackageError("E_PACKAGE_TENSORS", f"the tensor {place + '/' + name!r} is missing", where=place)
                for name in missing
            ]
        if best is None or rank < best[0]:
            best = (rank, wrong)
    assert best is not None, "a kind has at least one family of hosts"
    return [], best[1]


def _wanted(site: Site, shape: HostShape, known: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Tensor names to dtypes on a host, after the shapes that are known were compared.

    Raises:
        KindError: ``E_KIND_SHAPE``, ``E_KIND_TENSOR``, ``E_KIND_HOST``.
    """
    try:
        return {name: spec.dtype for name, spec in site.kind.tensors(site.config, shape, known=known).items()}
    except KindError as error:
        if error.code != "E_KIND_HOST":
            raise
        return _undecided(site, shape, known)


def _undecided(site: Site, shape: HostShape, known: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Compare names and ranks where the tensors do not tell a size.

    Either the tensor that would tell it is missing or has another rank, or a length such as out / 2 cannot be read
    backwards; then the host will say, before anything is attached to it.
    """
    fields = site.kind.document.tensors
    present = {name: f.dtype for name, f in fields.items() if holds(f.when, conditions(site.config, shape))}
    complete = known.keys() >= present.keys()
    for name, lengths in known.items():
        if name not in present or (complete and not _ranked(fields[name].dims, len(lengths))):
            raise PackageError(
                "E_PACKAGE_TENSORS",
                f"the tensor {name!r} does not have a name and shape that its kind gives it under this config",
                expected={n: [dim.text for dim in fields[n].dims] for n in present},
                found={name: list(lengths)},
            )
    return present


def _ranked(dims: Sequence[Dim], rank: int) -> bool:
    """Whether a tensor of this rank may have such a shape; a spread stands for any number of axes."""
    fixed = sum(not dim.spread for dim in dims)
    return rank >= fixed if fixed < len(dims) else rank == fixed


def _dtypes(wanted: Mapping[str, str], facts: Header, place: str) -> list[DeltaHubError]:
    wrong: list[DeltaHubError] = []
    for name, declared in wanted.items():
        dtype = facts[name][0]
        allowed = _FLOATS if declared == "float" else {_STORED.get(declared, declared)}
        if dtype not in allowed:
            wrong.append(
                PackageError(
                    "E_PACKAGE_TENSORS",
                    f"the tensor {place + '/' + name!r} is stored as {dtype}",
                    where=place,
                    expected=" or ".join(sorted(allowed)),
                    found=dtype,
                )
            )
    return wrong


_STORED: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "U8",
        "int8": "I8",
        "int16": "I16",
        "int32": "I32",
        "int64": "I64",
        "float16": "F16",
        "bfloat16": "BF16",
        "float32": "F32",
        "float64": "F64",
    }
)


def _hosts(site: Site, known: Mapping[str, tuple[int, ...]]) -> Iterator[HostShape]:
    """Every sort of host that the kind acts on, with the sizes that the given tensors tell of it."""
    hosts = frozenset({"block"}) if site.module.inputs else site.kind.hosts
    families = [family for family in ("linear", "embedding", "conv", "norm", "block") if family in hosts]
    rest = sorted(hosts.difference(families))
    for family, (bias, grouped, first) in product(
        [*families, *rest], product((True, False), (False, True), (False, True))
    ):
        if (grouped or first) and family != "conv":
            continue
        sizes = _sizes(site.kind, family, known)
        kernel: tuple[int, ...] = sizes.get("kernel", ()) if family == "conv" else ()
        kernel = kernel if len(kernel) <= _SPATIAL else ()
        yield HostShape(
            family=family,  # type: ignore[arg-type]
            d_in=sizes.get("iN"),
            d_out=sizes.get("out"),
            kernel=kernel,
            bias=bias,
            spatial=len(kernel),
            channels_first=first,
            grouped=grouped,
        )


def _sizes(kind: Kind, family: str, known: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Read the host's sizes off the tensors' shapes; contradictions are found when all shapes are compared."""
    sizes: dict[str, Any] = {}
    for name, field in kind.document.tensors.items():
        shape = known.get(name)
        if shape is None:
            continue
        spread = next((i for i, dim in enumerate(field.dims) if dim.spread), None)
        if spread is None:
            aligned = list(zip(field.dims, shape, strict=False))
        else:
            after = len(field.dims) - spread - 1
            middle = shape[spread : len(shape) - after]
            aligned = [
                *zip(field.dims[:spread], shape, strict=False),
                *zip(field.dims[spread + 1 :], shape[len(shape) - after :], strict=False),
            ]
            for key, value in _spread(field.dims[spread].spread, family, middle):
                sizes.setdefault(key, value)
        for dim, length in aligned:
            node = None if dim.program is None else dim.program.result
            if isinstance(node, Name) and node.name in {"iN", "out"}:
                sizes.setdefault(node.name, length)
    return sizes


def _spread(spread: str | None, family: str, lengths: tuple[int, ...]) -> Iterable[tuple[str, Any]]:
    if spread == "kernel":
        return [("kernel", lengths)]
    names: list[tuple[str, Any]] = list(zip(("out", "iN"), lengths, strict=False))
    return names if family != "conv" else [*names, ("kernel", lengths[2:])]
