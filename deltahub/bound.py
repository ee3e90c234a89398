"""A kind bound to the facts of a host, and the site: its tensors there."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from deltahub.errors import KindError
from deltahub.places import ParameterView, Rows
from deltahub.products import looks_along
from deltahub.spanning import Span
from deltahub.targets import SITE_PREFIX

if TYPE_CHECKING:
    from deltahub.kinds import Kind, Port
    from deltahub.kinds.host_shape import HostShape

__all__ = ["Bound", "Site"]

_LIVE = ("input", "output", "replace")
_MERGED = ("weight", "bias")


_KEPT_STRENGTHS = 16


class Bound:
    """A kind with a config, bound to the facts of a host: its compiled ports. Pickles as data, copies as itself."""

    __slots__ = (
        "_given",
        "_strong",
        "config",
        "context",
        "kind",
        "live",
        "mergeable",
        "ports",
        "positional",
        "reads_weight",
        "severs",
        "shape",
    )

    def __init__(
        self, kind: Kind, config: Mapping[str, object], shape: HostShape, *, runs: bool = True, whole: bool = True
    ) -> None:
        """Compile the ports.

        Args:
            kind: the kind.
            config: its config.
            shape: the facts of the host; where a site is on some of its rows or on one map of a stack, of that alone.
            runs: whether the host is run as a module, so that live equations have something to act on.
            whole: whether a site is on all of the host's outputs; an ``output`` equation alone can act on some.

        Raises:
            KindError: ``E_KIND_HOST`` where no equation is left.
        """
        self.kind = kind
        self.config = dict(config)
        self.shape = shape
        self._given = (runs, whole)
        self._strong: dict[float, Bound] = {}
        self.ports: dict[str, Port] = dict(kind.compile(self.config, shape))
        self.mergeable = any(port in self.ports for port in _MERGED)
        live = {port for port in _LIVE if port in self.ports}
        if not runs or (not whole and live - {"output"}):
            if not self.mergeable:
                raise KindError(
                    "E_KIND_HOST",
                    f"kind {kind.name!r} has no equation for the weight, and a "
                    + ("part of a host" if runs else "parameter")
                    + " is nothing else",
                    hint="another target or kind",
                )
            self.ports = {name: port for name, port in self.ports.items() if name not in live}
            live = set()
        self.live = bool(live)
        """Whether it runs by live equations; otherwise the host runs with the changed weight and bias."""
        self.reads_weight = any(self.ports[p].uses & {"W", "b"} for p in _LIVE if p in self.ports)
        self.severs = "replace" in self.ports and not self.ports["replace"].uses & {"base", "W", "b"}
        """Whether the host, with all its parameters, is never run."""
        asked = {name for port in self.ports.values() for name in port.uses}
        self.context = frozenset(asked & set(kind.document.context))
        """What the equations ask of the surroundings."""

        self.positional = any(looks_along(self.ports[p].graph) for p in _LIVE if p in self.ports)
        """Whether it looks along the axis before the last, which is the batch where there is none of positions."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_bound, (self.kind, self.config, self.shape, *self._given))

    def __deepcopy__(self, memo: dict[int, object]) -> Bound:
        return self

    def strengthened(self, strength: float) -> Bound:
        """The same with the config number that the document calls its strength multiplied.

        Kept, because a compiled forward pass must find it ready; :class:`deltahub.delta.Delta` asks for it when a
        scale is set.
        """
        found = self._strong.get(strength)
        if found is None:
            name = self.kind.document.strength
            assert name is not None
            config = {**self.config, name: cast(float, self.config[name]) * strength}
            found = _bound(self.kind, config, self.shape, *self._given)
            if len(self._strong) >= _KEPT_STRENGTHS:
                self._strong.pop(next(iter(self._strong)))
            self._strong[strength] = found
        return found


def _bound(kind: Kind, config: Mapping[str, object], shape: HostShape, runs: bool, whole: bool) -> Bound:  # noqa: FBT001
    return Bound(kind, config, shape, runs=runs, whole=whole)


def _never(*args: object) -> None:
    """A hook of a module that is never called."""


_SEEN = OrderedDict({0: _never})
"""What makes ``nn.TransformerEncoderLayer`` run its modules: it looks for hooks before it computes without them."""


class Site(nn.Module):
    """One delta module at one host: its tensors, and what they do there.

    Registered as a child of the host, so that ``parameters()``, ``to()``, optimisers and wrappers see its tensors,
    but absent from ``state_dict()``: the backbone's own keys stay what they were.
    """

    delta: str
    module: str
    path: str
    bound: Bound
    dropout: float
    merged: bool
    names: tuple[str, ...]
    mixed: bool
    view: ParameterView | None
    rows: Rows | None
    stack: int
    span: Span | None

    def __init__(
        self,
        *,
        delta: str,
        module: str,
        path: str,
        bound: Bound,
        tensors: Mapping[str, Tensor],
        dropout: float = 0.0,
        view: ParameterView | None = None,
        rows: Rows | None = None,
        stack: int = 0,
        span: Span | None = None,
    ) -> None:
        super().__init__()
        # None of these is a parameter or a module, and attaching makes many sites: past nn.Module's own setattr.
        self.__dict__.update(
            delta=delta, module=module, path=path, bound=bound, dropout=dropout, merged=False, names=tuple(tensors),
            view=view, rows=rows, stack=stack, span=span, _forward_hooks=_SEEN,
        )  # fmt: skip
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self._parameters[name] = tensor
            else:
                self._buffers[name] = tensor
        self.__dict__["mixed"] = bool(self._buffers)

    @property
    def key(self) -> str:
        own = "" if self.view is None else f":{self.view.weight_name}"
        return f"{SITE_PREFIX}{self.delta}:{self.module}{own}".replace(".", "·")

    @property
    def parameters_there(self) -> tuple[str, ...]:
        """Names, below its module, of the parameters that it is on; of a module's own, those it may have."""
        view = self.view
        names = ("weight", "bias") if view is None else (view.weight_name, view.bias_name)
        return tuple(name for name in names if name is not None)

    def tensors(self) -> list[Tensor]:
        """The site's tensors in the order of its kind's document."""
        if not self.mixed:
            return cast("list[Tensor]", list(self._parameters.values()))
        parameters, buffers = self._parameters, self._buffers
        return [cast(Tensor, parameters[n] if n in parameters else buffers[n]) for n in self.names]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        destination = kwargs.get("destination", args[0] if args else None)
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The backbone's checkpoints know nothing of a site."""

    def extra_repr(self) -> str:
        kind = self.bound.kind
        return f"{kind.name}@{kind.version}, " + ", ".join(
            f"{n}={tuple(t.shape)}" for n, t in zip(self.names, self.tensors(), strict=True)
        )
