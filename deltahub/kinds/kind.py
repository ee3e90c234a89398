"""A kind: what its document says, made concrete for a config and a host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deltahub.errors import KindError
from deltahub.kinds.document import LIVE_PORTS, MERGED_PORTS, PORTS, Document
from deltahub.kinds.fields import MISSING, holds, pick
from deltahub.kinds.host_shape import HostShape
from deltahub.kinds.layout import Frozen, TensorSpec, bind, conditions, freeze, layout, match
from deltahub.kinds.ops import CHANNEL_OPS, nearest
from deltahub.kinds.tree import Program, references

if TYPE_CHECKING:
    import torch
    from torch import Tensor, fx

    from deltahub.kinds.compile import Built
    from deltahub.kinds.initial import Draws

__all__ = ["Kind", "Port"]


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Port:
    """One compiled equation. Shared by all sites whose facts are equal; pickles as data, copies as itself.

    Attributes:
        name: one of :data:`deltahub.kinds.document.PORTS`.
        fn: the function, called as ``fn(host, x, *tensors)`` (input, replace), ``fn(host, x, y, *tensors)`` (output)
            or ``fn(host, W, b, *tensors)`` (weight, bias). ``host`` gives ``deltahub_apply(x, w)``,
            ``deltahub_base(x)``, ``deltahub_weight()``, ``deltahub_bias()`` and ``deltahub_context(name)``, of which
            ``uses`` says whether any is called.
        tensors: names of the kind's tensors, in the order in which ``fn`` takes them.
        uses: those of host, base, x, y, W, b and context names that the equation asks for.
        graph: what runs; every target in it is a registered function.
    """

    name: str
    fn: Callable[..., Any] = field(repr=False)
    tensors: tuple[str, ...]
    uses: frozenset[str]
    graph: fx.Graph = field(repr=False)
    origin: tuple[Document, Frozen, HostShape] = field(repr=False)

    def __reduce__(self) -> tuple[object, ...]:
        document, config, shape = self.origin
        return (_port, (document, {name: value for name, _, value in config}, shape, self.name))

    def __copy__(self) -> Port:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Port:
        return self


def _port(document: Document, config: Mapping[str, object], shape: HostShape, name: str) -> Port:
    return Kind(document).compile(config, shape)[name]


class Kind:
    """A kind of delta: what its document says, for any config on any host that fits.

    Attributes:
        document: the document.
        name: its name.
        version: its version.
        hosts: families of modules that it can act on.
        identity_at_init: whether a fresh one leaves its host as it is, under every config.
    """

    __slots__ = ("document", "hosts", "identity_at_init", "name", "version")

    def __init__(self, document: Document) -> None:
        self.document = document
        self.name = document.name
        self.version = document.version
        self.hosts = document.hosts
        self.identity_at_init = document.identity is True

    def __repr__(self) -> str:
        return f"Kind({self.name}@{self.version})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and other.document == self.document

    def __hash__(self) -> int:
        return hash(self.document)

    def __reduce__(self) -> tuple[object, ...]:
        return (Kind, (self.document,))

    def __deepcopy__(self, memo: dict[int, object]) -> Kind:
        return self

    def check_config(self, config: Mapping[str, object]) -> dict[str, object]:
        """A config with its types and bounds checked and its defaults filled in, in the document's order.

        Raises:
            KindError: ``E_KIND_CONFIG`` for an unknown, missing or wrong value.
        """
        return dict(_checked(self.document, freeze(config)))

    def fits(self, shape: HostShape, config: Mapping[str, object]) -> None:
        """Whether the kind can act on a host.

        Raises:
            KindError: ``E_KIND_HOST`` if not.
        """
        if not self.ports(config, shape):
            raise self._unfit(shape, "none of its equations applies to this host")

    def is_identity(self, config: Mapping[str, object], shape: HostShape) -> bool:
        """Whether a fresh one leaves this host as it is, under this config."""
        identity = self.document.identity
        if isinstance(identity, bool):
            return identity
        return holds(identity, conditions(self.check_config(config), shape))

    def ports(self, config: Mapping[str, object], shape: HostShape) -> frozenset[str]:
        """The ports at which it acts. On a host that an equation cannot act on live, its merged form stands in.

        Raises:
            KindError: ``E_KIND_HOST`` if the family is not one of its hosts, or a live form that has no merged one
                mixes channels that the host keeps apart.
        """
        return _ports(self.document, freeze(config), shape)

    def mergeable(self, config: Mapping[str, object], shape: HostShape) -> bool:
        """Whether it can be folded into the host's weight and bias."""
        return bool(self.ports(config, shape) & MERGED_PORTS)

    def bind(self, config: Mapping[str, object], shape: HostShape, known: Mapping[str, tuple[int, ...]]) -> HostShape:
        """The host with widths that it does not know taken from given tensors' shapes."""
        return bind(self.document, self.check_config(config), shape, known)

    def tensors(
        self,
        config: Mapping[str, object],
        shape: HostShape,
        *,
        known: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> dict[str, TensorSpec]:
        """The kind's tensors under a config on a host, in the document's order.

        Args:
            config: config values.
            shape: facts of the host.
            known: shapes of tensors that exist already; they must be equal to what follows from config and host,
                and they tell a block's widths where it does not know them itself.

        Raises:
            KindError: ``E_KIND_CONFIG``, ``E_KIND_HOST``, ``E_KIND_SHAPE``, ``E_KIND_TENSOR``, ``E_KIND_LIMIT``.
        """
        checked = self.check_config(config)
        self._check_family(shape)
        if known:
            shape = bind(self.document, checked, shape, known)
        specs = layout(self.document, freeze(checked), shape)
        match(self.document, specs, known)
        return dict(specs)

    def init(
        self,
        spec: TensorSpec,
        generator: torch.Generator | Draws,
        *,
        W: Tensor | None = None,
        b: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A fresh tensor.

        Args:
            spec: the tensor, from :meth:`tensors`.
            generator: where random numbers come from; a :class:`~deltahub.kinds.initial.Draws` for many tensors.
            W: the host's canonical weight, for initialisers that start from it.
            b: the host's bias.
            dtype: floating type of tensors whose document leaves it open; float32 by default.
            device: where it lies; by default where it was made.

        Raises:
            KindError: ``E_KIND_INIT`` if the initialiser cannot give this shape on this host.
        """
        import torch as _torch

        from deltahub.kinds.initial import initial

        return initial(spec, generator, W=W, b=b, dtype=dtype or _torch.float32, device=device)

    def compile(self, config: Mapping[str, object], shape: HostShape) -> Mapping[str, Port]:
        """The kind's functions under a config on a host, by port. Cached: equal facts share functions.

        Raises:
            KindError: ``E_KIND_CONFIG``, ``E_KIND_HOST``, ``E_KIND_SHAPE``, ``E_KIND_LIMIT``, ``E_KIND_OP``,
                ``E_KIND_NUMBER``.
        """
        return _compiled(self.document, freeze(config), shape)

    def _programs(self, config: Mapping[str, object], shape: HostShape) -> dict[str, tuple[int, Program]]:
        """The case of each port's equation that holds, and its number."""
        self._check_family(shape)
        facts = conditions(config, shape)
        found: dict[str, tuple[int, Program]] = {}
        for port, cases in self.document.equations.items():
            program = pick(cases, facts)
            if program is not None:
                found[port] = (next(i for i, c in enumerate(cases) if c.value is program), program)
        reason = next((r for p in found if p in LIVE_PORTS and (r := _needs(found[p][1], shape))), None)
        if reason is None:
            return found
        merged = {port: case for port, case in found.items() if port in MERGED_PORTS}
        if not merged:
            raise self._unfit(shape, reason)
        return merged

    def _check_family(self, shape: HostShape) -> None:
        if shape.family not in self.hosts:
            raise self._unfit(shape, f"it acts on {', '.join(sorted(self.hosts))}")

    def _unfit(self, shape: HostShape, why: str) -> KindError:
        return KindError(
            "E_KIND_HOST", f"kind {self.name!r} cannot act on a {shape.family}: {why}", hint="another target or kind"
        )


def _needs(program: Program, shape: HostShape) -> str | None:
    """Why a live equation cannot run on a host's activations, if so."""
    _, ops = references(program)
    if shape.grouped and "host" in ops:
        return "it mixes channels, and this host keeps them apart in groups"
    if shape.channels_first and not shape.spatial and ops & CHANNEL_OPS:
        return "this host does not say which axis of its activations holds channels"
    return None


@lru_cache(maxsize=4096)
def _checked(document: Document, config: Frozen) -> Mapping[str, object]:
    given = {name: value for name, _, value in config}
    where = f"config of kind {document.name}"
    for name in given:
        if name not in document.config:
            what = f"kind {document.name!r} has no config value {name!r}{nearest(name, list(document.config))}"
            raise KindError("E_KIND_CONFIG", what, where=where, expected=list(document.config), found=name)
    checked: dict[str, object] = {}
    for name, entry in document.config.items():
        value = given.get(name, entry.default)
        if value is MISSING:
            what = f"kind {document.name!r} needs the config value {name!r}"
            raise KindError("E_KIND_CONFIG", what, where=where, expected=entry.type)
        checked[name] = entry.check(value, where)
    return MappingProxyType(checked)


@lru_cache(maxsize=4096)
def _ports(document: Document, config: Frozen, shape: HostShape) -> frozenset[str]:
    kind = Kind(document)
    return frozenset(kind._programs(kind.check_config({name: value for name, _, value in config}), shape))


@lru_cache(maxsize=4096)
def _compiled(document: Document, frozen: Frozen, shape: HostShape) -> Mapping[str, Port]:
    from deltahub.kinds.check import check

    kind = Kind(document)
    config = kind.check_config({name: value for name, _, value in frozen})
    programs = kind._programs(config, shape)  # first: what does not fit at all is said before what is missing
    specs = layout(document, freeze(config), shape)
    result = {}
    for port, (case, program) in programs.items():
        names, _ = references(program)
        sizes = names & {"d_in", "d_out", "spatial"}
        facts = HostShape(
            family=shape.family,
            d_in=shape.d_in if "d_in" in sizes else None,
            d_out=shape.d_out if "d_out" in sizes else None,
            kernel=(0,) * len(shape.kernel),
            bias=shape.bias and "b" in names,
            spatial=shape.spatial,
            channels_first=shape.channels_first,
            plain=shape.plain,
        )
        used = freeze({name: value for name, value in config.items() if name in names})
        built = _built(document, port, case, tuple(specs), used, facts)
        inputs = ("host", *PORTS[port])
        check(built.graph, port=port, inputs=inputs, specs=specs, shape=shape, place=program.result.place)
        result[port] = Port(
            name=port,
            fn=built.fn,
            tensors=tuple(specs),
            uses=built.uses,
            graph=built.graph,
            origin=(document, frozen, shape),
        )
    return MappingProxyType(result)


@lru_cache(maxsize=4096)
def _built(document: Document, port: str, case: int, present: tuple[str, ...], used: Frozen, facts: HostShape) -> Built:
    """One function for all sites that differ in nothing that the equation mentions."""
    from deltahub.kinds.compile import build

    return build(
        document.equations[port][case].value,
        inputs=("host", *PORTS[port]),
        tensors=present,
        absent=frozenset(document.tensors) - frozenset(present),
        values={name: value for name, _, value in used},
        shape=facts,
        live=port in LIVE_PORTS,
    )
