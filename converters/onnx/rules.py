"""What of a kind can be a slot: found out from its document, and by running a host that carries it.

Nothing here knows a kind by name. Which axes are open is what shapes say whose equations do not mention the number;
what multiplies, what adds up and what does nothing is tried on a host, with a call that the model itself made of it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from deltahub.converters.onnx.slots import STRENGTH, held
from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    from deltahub.kinds import Kind
    from deltahub.kinds.host_shape import HostShape
    from deltahub.sites import Site

__all__ = ["Host", "Rule", "along", "neutral", "numbers_of", "open_axes", "open_numbers", "rule_for"]

_SIZE, _OTHER = 4, 6
_LARGE = 1024
"""A default of as many equal elements is one element that broadcasts, where the equations allow it."""
Tensors = Mapping[str, Tensor]
Axes = tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a kind with a config goes into slots.

    Attributes:
        scales: by tensor, the config numbers that are multiplied into it.
        fixed: numbers that no tensor can take up: deltas must have the value of the trace.
        adds: whether two deltas, laid together, are what they are one after the other.
        empty: whether open axes of the default are of size 0.
        small: whether a large default that holds one value everywhere is one element.
    """

    scales: Mapping[str, tuple[str, ...]]
    fixed: tuple[str, ...]
    adds: bool
    empty: bool
    small: bool


def open_numbers(kind: Kind, config: Mapping[str, Any], shape: HostShape) -> dict[str, int]:
    """Whole numbers of a config that nothing but sizes depends on, with the value that slots are traced with."""
    found: dict[str, int] = {}
    for name, option in kind.document.config.items():
        if option.type != "integer" or option.enum:
            continue
        try:
            both = [kind.check_config({**config, name: size}) for size in (_SIZE, _OTHER)]
            sizes = [{key: spec.shape for key, spec in kind.tensors(one, shape).items()} for one in both]
            code = [{key: str(port.graph) for key, port in kind.compile(one, shape).items()} for one in both]
        except DeltaHubError:
            continue
        if sizes[0] != sizes[1] and sizes[0].keys() == sizes[1].keys() and code[0] == code[1]:
            found[name] = _SIZE
    return found


def numbers_of(kind: Kind, config: Mapping[str, Any]) -> list[str]:
    """Numbers of a config that may multiply something."""
    options = kind.document.config
    return [name for name in config if options[name].type == "number" and not options[name].enum]


def open_axes(kind: Kind, config: Mapping[str, Any], shape: HostShape, numbers: Sequence[str]) -> dict[str, Axes]:
    """The shapes of a kind's tensors, with what says the size where it is open."""
    base: dict[str, list[int | str]] = {name: list(spec.shape) for name, spec in kind.tensors(config, shape).items()}
    for number in numbers:
        for name, spec in kind.tensors({**config, number: _OTHER}, shape).items():
            for i, (now, then) in enumerate(zip(list(base[name]), spec.shape, strict=True)):
                if isinstance(now, int) and now != then:
                    base[name][i] = _axis(number, now, then)
    return {name: tuple(dims) for name, dims in base.items()}


def _axis(number: str, now: int, then: int) -> str:
    ratio = Fraction(now, _SIZE)
    if Fraction(then, _OTHER) != ratio:
        return f"{number}?"
    above = number if ratio.numerator == 1 else f"{ratio.numerator}*{number}"
    return above if ratio.denominator == 1 else f"{above}/{ratio.denominator}"


@dataclass(frozen=True, kw_only=True)
class Host:
    """A module with two sites of one kind, and a call that the model made of it.

    Attributes:
        root: the model.
        module: the host.
        sites: the one that becomes slots, and another like it for what two deltas do one after the other.
        call: positional arguments, and the others.
    """

    root: nn.Module
    module: nn.Module
    sites: tuple[Site, Site]
    call: tuple[tuple[Any, ...], Mapping[str, Any]]

    def out(self, *tensors: Tensors, **numbers: Any) -> list[Tensor]:
        """What the host gives with these tensors in its first sites, the numbers being those of the first."""
        from deltahub.composition import using

        pairs = list(zip(self.sites, tensors, strict=False))
        values = {(site, name): value for site, given in pairs for name, value in given.items()}
        args, kwargs = copy.deepcopy(self.call[0]), copy.deepcopy(dict(self.call[1]))
        with torch.no_grad(), using(self.root, *(site.delta for site, _ in pairs)), held(values), self._with(numbers):
            return list(_floating(self.module(*args, **kwargs)))

    @contextmanager
    def _with(self, numbers: Mapping[str, Any]) -> Iterator[None]:
        """The first site with other numbers in its config, or at another strength."""
        from deltahub.composition import registry
        from deltahub.sites import Bound

        home, site = registry(self.root), self.sites[0]
        assert home is not None
        bound, strength = site.bound, home.switch.strength
        config = {name: value for name, value in numbers.items() if name != STRENGTH}
        if config:
            site.__dict__["bound"] = Bound(bound.kind, {**bound.config, **config}, bound.shape)
        if STRENGTH in numbers:
            strength[site.delta] = numbers[STRENGTH]
        try:
            yield
        finally:
            site.__dict__["bound"] = bound
            if STRENGTH in numbers:
                strength.pop(site.delta)


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        inner = value.values() if isinstance(value, Mapping) else value
        yield from itertools.chain.from_iterable(map(_floating, inner))


def _tried(host: Host, *tensors: Tensors, **numbers: Any) -> list[Tensor] | None:
    """What comes out, or ``None`` where the equations do not take these sizes."""
    try:
        return host.out(*tensors, **numbers)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError, DeltaHubError):
        return None


def _same(a: Sequence[Tensor] | None, b: Sequence[Tensor] | None) -> bool:
    if a is None or b is None or [t.shape for t in a] != [t.shape for t in b]:
        return False
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


def rule_for(host: Host, axes: Mapping[str, Axes]) -> Rule:
    """Try out how a kind behaves at a host.

    Raises:
        ConverterError: ``E_ONNX_SLOT`` where no values are found with which it does nothing.
    """
    site = host.sites[0]
    own = dict(zip(site.names, (t.detach() for t in site.tensors()), strict=True))
    kind, config = site.bound.kind, site.bound.config
    plain = host.out()
    empty, small = _nothing(host, own, axes, plain)
    values = [_random(own, seed) for seed in (1, 2)]
    scales: dict[str, list[str]] = {name: [] for name in own}
    fixed = []
    for number in (*numbers_of(kind, config), STRENGTH):
        found = _scaled(host, values[0], number)
        if found is None:
            fixed.append(number)
        for name in found or ():
            scales[name].append(number)
    laid = {
        name: torch.cat([one[name] for one in values], axis) if (axis := along(axes[name])) is not None
        else values[0][name] + values[1][name]
        for name in own
    }  # fmt: skip
    return Rule(
        scales={name: tuple(numbers) for name, numbers in scales.items()},
        fixed=tuple(fixed),
        adds=_same(_tried(host, laid), _tried(host, *values)),
        empty=empty,
        small=small,
    )


def along(axes: Axes) -> int | None:
    """The axis on which two deltas are laid side by side; ``None`` where they are added."""
    return next((i for i, axis in enumerate(axes) if isinstance(axis, str)), None)


def _nothing(host: Host, own: Tensors, axes: Mapping[str, Axes], plain: Sequence[Tensor]) -> tuple[bool, bool]:
    for empty, small in itertools.product((True, False), repeat=2):
        if empty and host.sites[0].bound.shape.family == "conv":
            continue  # ONNX Runtime has no convolutions without channels
        if _same(_tried(host, {name: neutral(own[name], axes[name], empty=empty, small=small) for name in own}), plain):
            return empty, small
    kind = host.sites[0].bound.kind.name
    raise ConverterError("E_ONNX_SLOT", f"there are no values with which the kind {kind!r} does nothing",
                         where=host.sites[0].path, hint='export it alone: form="merged" or form="live"')  # fmt: skip


def neutral(value: Tensor, axes: Axes, *, empty: bool, small: bool) -> Tensor:
    """The default of a slot, from the value with which a fresh delta begins."""
    value = value.detach()
    for i, axis in enumerate(axes):
        if isinstance(axis, str):
            value = value.narrow(i, 0, 0 if empty else max(1, value.shape[i] // _SIZE))
    if small and value.numel() >= _LARGE and bool((value == value.flatten()[0]).all()):
        value = value.flatten()[:1].reshape([1] * value.ndim)
    return value.clone()


def _random(own: Tensors, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t + 0.3 * torch.randn(t.shape, generator=generator).to(t.device, t.dtype) if t.is_floating_point() else t
        for name, t in own.items()
    }


def _scaled(host: Host, values: Tensors, number: str) -> tuple[str, ...] | None:
    """The tensors that a number is multiplied into: halving them is halving the number."""
    now = 1.0 if number == STRENGTH else float(cast("float", host.sites[0].bound.config[number]))
    wanted = _tried(host, values, **{number: now / 2})
    floats = [name for name, value in values.items() if value.is_floating_point()]
    for count in (1, 2, 3):
        for chosen in itertools.combinations(floats, count):
            if _same(_tried(host, {**values, **{name: values[name] / 2 for name in chosen}}), wanted):
                return chosen
    return None
