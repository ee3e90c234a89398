"""What a model is made of, as data: modules, parameters, and where deltas sit; equal siblings are seen once."""

from __future__ import annotations

__all__ = ["DeltaSummary", "Group", "Node", "Parameter", "SiteSummary", "Structure", "fold", "nested"]

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_BITS = {"float64": 64, "int64": 64, "uint64": 64, "complex64": 64, "float32": 32, "int32": 32, "uint32": 32}
_BITS |= {"float16": 16, "bfloat16": 16, "int16": 16, "uint16": 16}


def bits_of(dtype: str) -> int:
    """How many bits an element of a dtype (torch's name) takes; 8 for those that are not listed."""
    return _BITS.get(dtype, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter of one module.

    Attributes:
        name: within its module.
        shape: as stored.
        dtype: torch's name of it, such as ``bfloat16``.
        trainable: whether it asks for a gradient.
        tied: full name of the parameter whose memory it shares and which counts instead; empty if it is its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool = False
    tied: str = ""

    @property
    def count(self) -> int:
        return 0 if self.tied else math.prod(self.shape)

    @property
    def size(self) -> int:
        return self.count * bits_of(self.dtype) // 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSummary:
    """What one delta does at one module.

    Attributes:
        delta: name of the delta; empty for a package that is not attached.
        module: name of the package's module, as in its manifest.
        kind: ``name@version``.
        config: as in the manifest.
        ports: where the kind's equations act: ``output``, ``weight`` …; empty where the host is not known.
        tensors: name to shape.
        parameters: how many numbers they hold.
        trainable: how many of these training changes.
        share: ``parameters`` over those of the module itself; ``None`` where these are not known.
    """

    delta: str
    module: str
    kind: str
    config: Mapping[str, Any]
    ports: tuple[str, ...]
    tensors: Mapping[str, tuple[int, ...]]
    parameters: int
    trainable: int
    share: float | None = None

    @property
    def signature(self) -> Hashable:
        return (self.delta, self.module, self.kind, tuple(self.config.items()), self.ports, tuple(self.tensors.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One module.

    Attributes:
        name: the last part of its path; empty for the whole model.
        type: its class, before any delta; empty where only names are known.
        family: as a host: ``linear``, ``conv``, ``embedding``, ``norm``, ``block``; empty where only names are known.
        shape: of its weight in canonical orientation, ``[out, in, *kernel]``; empty where it has none.
        host: what a kind's shapes depend on, where the module is known: ``in``, ``out``, ``kernel``, ``bias``,
            ``grouped``, ``channels_first``.
        parameters: its own.
        sites: the deltas here.
        children: the modules inside.
        same: path of the module that this one is, where a model uses one twice.
    """

    name: str
    type: str = ""
    family: str = ""
    shape: tuple[int, ...] = ()
    host: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    sites: tuple[SiteSummary, ...] = ()
    children: tuple[Node, ...] = ()
    same: str = ""

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """This module and all inside it, with their paths."""
        yield path, self
        for child in self.children:
            yield from child.walk(f"{path}.{child.name}" if path else child.name)

    def all_parameters(self) -> Iterator[Parameter]:
        for _, node in self.walk():
            yield from node.parameters

    @property
    def count(self) -> int:
        """Numbers in the parameters of this module and all inside it."""
        return sum(parameter.count for parameter in self.all_parameters())

    @property
    def delta_count(self) -> int:
        """Numbers in the deltas of this module and all inside it."""
        return sum(site.parameters for _, node in self.walk() for site in node.sites)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaSummary:
    """One delta of a model, or of a package.

    Attributes:
        name: of the delta.
        kinds: ``name@version`` of its modules.
        sites: at how many modules it sits.
        parameters: how many numbers it holds.
        share: of the backbone's; ``None`` where these are not known.
        state: ``active``, ``inactive`` or ``merged``; ``packaged`` where it is not attached.
    """

    name: str
    kinds: tuple[str, ...]
    sites: int
    parameters: int
    share: float | None
    state: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Structure:
    """A model at a glance. Printing it draws the tree; notebooks show it in colour.

    Attributes:
        source: what was asked for.
        what: ``model``, ``backbone`` or ``package``.
        class_name: ``library.Class`` where that is known, else the class.
        commit: of a Hub; empty otherwise.
        root: the tree.
        parameters: numbers in the backbone's parameters, tied ones counted once.
        trainable: how many of them ask for a gradient.
        size: their bytes.
        dtypes: dtype to how many numbers have it.
        deltas: what is attached, or packaged.
        notes: what a reader should know about how this was found out.
    """

    source: str
    what: str
    class_name: str
    root: Node
    commit: str = ""
    parameters: int = 0
    trainable: int = 0
    size: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict)
    deltas: tuple[DeltaSummary, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from deltahub.inspecting.drawing import as_text

        return as_text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from deltahub.inspecting.drawing import drawn

        return drawn(self)


def totals(root: Node) -> dict[str, Any]:
    """The figures of a structure that are sums over its tree."""
    dtypes: Counter[str] = Counter()
    trainable = size = 0
    for parameter in root.all_parameters():
        dtypes[parameter.dtype] += parameter.count
        trainable += parameter.count if parameter.trainable else 0
        size += parameter.size
    found = {dtype: count for dtype, count in dtypes.most_common() if count}
    return {"parameters": sum(found.values()), "trainable": trainable, "size": size, "dtypes": found}


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Equal siblings, seen once.

    Attributes:
        label: ``0-11``, or their names with commas.
        nodes: all of them; the first stands for the others.
        below: the groups inside it.
    """

    label: str
    nodes: tuple[Node, ...]
    below: tuple[Group, ...]


def fold(root: Node) -> Group:
    """Fold equal siblings that stand next to each other, at every depth."""
    return _group((root,), _Signatures())


class _Signatures:
    """Numbers for modules, equal for modules that look alike inside, whatever they are called."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._known: dict[int, int] = {}

    def of(self, node: Node) -> int:
        known = self._known.get(id(node))
        if known is None:
            own = tuple((p.name, p.shape, p.dtype, p.trainable, p.tied and "tied") for p in node.parameters)
            inside = tuple((child.name, self.of(child)) for child in node.children)
            what = (node.type, node.shape, own, tuple(site.signature for site in node.sites), inside, bool(node.same))
            known = self._known[id(node)] = self._numbers.setdefault(what, len(self._numbers))
        return known


def _group(nodes: Sequence[Node], signatures: _Signatures) -> Group:
    first = nodes[0]
    runs = (list(run) for _, run in itertools.groupby(first.children, key=signatures.of))
    below = tuple(_group(run, signatures) for run in runs)
    return Group(label=_label([node.name for node in nodes]), nodes=tuple(nodes), below=below)


def _label(names: Sequence[str]) -> str:
    """``0-11`` for numbers that follow one another; what else there is, with commas, and not all of very many."""
    if len(names) == 1:
        return names[0]
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, … {names[-1]}"


def nested(sites: Mapping[str, Iterable[SiteSummary]]) -> Node:
    """A tree of names alone, from the paths of sites."""
    below: dict[str, dict[str, list[SiteSummary]]] = {}
    here: list[SiteSummary] = []
    for path, found in sites.items():
        if not path:
            here += found
            continue
        first, _, rest = path.partition(".")
        below.setdefault(first, {}).setdefault(rest, []).extend(found)
    children = []
    for name, inside in below.items():
        node = nested(inside)
        children.append(Node(name=name, sites=node.sites, children=node.children))
    return Node(name="", sites=tuple(here), children=tuple(children))
