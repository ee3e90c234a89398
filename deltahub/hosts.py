"""How one type of backbone module is seen: its sizes, its weight in canonical orientation, and how to apply it.

A *view* knows one family of modules and nothing of deltas. The canonical orientation of a weight is
``[out, in, *kernel]``: an ``nn.Linear`` as stored, GPT-2's ``Conv1D`` transposed, an ``nn.Embedding`` seen as the
linear map from one-hot rows (``[dim, vocab]``), a norm's gain as ``[dim]``, a grouped convolution as stored
(``[out, in / groups, *kernel]``). A module that no view knows is an opaque *block*: it has an input and an output
and no weight that a delta may touch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltahub.errors import HostError
from deltahub.kinds.host_shape import HostShape
from deltahub.sharing import whole

__all__ = [
    "BLOCK",
    "CONV",
    "CONV1D",
    "EMBEDDING",
    "LINEAR",
    "NORM",
    "QUANTISED",
    "View",
    "block_width",
    "shadow_of",
    "view_of",
]

_CONV1D_NAMES = frozenset({"transformers.pytorch_utils.Conv1D"})
"""GPT-2's linear layer, recognised by name so that transformers is never imported for it."""


@functools.cache
def _is_conv1d(cls: type) -> bool:
    return any(f"{c.__module__}.{c.__qualname__}" in _CONV1D_NAMES for c in cls.__mro__)


def _call_with(module: nn.Module, base: type[nn.Module], parameters: dict[str, Tensor | None], x: Tensor) -> Tensor:
    """Run ``base.forward`` of ``module`` with other parameters, leaving the module untouched.

    A shadow object shares everything but the parameter dictionary, so the call is pure: threads, ``vmap``,
    ``torch.compile`` and ``torch.export`` see no mutation.
    """
    return cast(Tensor, base.forward(shadow_of(module, base, parameters), x))


def shadow_of(module: nn.Module, base: type[nn.Module], parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """An object like a module, of the class that it had before any delta, with other parameters."""
    shadow = object.__new__(base)
    state = dict(module.__dict__)
    state["_parameters"] = {**module._parameters, **parameters}
    shadow.__dict__.update(state)
    return shadow


class View:
    """One family of modules as a host. Stateless; the instances below are shared."""

    name: str = ""

    def __reduce__(self) -> str:
        return self.name  # pickled and copied as the module's global of that name

    weight_name: str | None = "weight"
    """The name under which the module stores what :meth:`weight` returns; ``None`` where there is none."""

    bias_name: str | None = "bias"
    """The same of :meth:`bias`."""

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        raise NotImplementedError

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        raise NotImplementedError

    def canonical(self, stored: Tensor) -> Tensor:
        """The stored weight in canonical orientation (a view of it, no copy)."""
        return stored

    def stored(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return weight

    def weight(self, module: nn.Module) -> Tensor:
        """The module's weight in canonical orientation; all of one that several processes share."""
        return self.canonical(whole(cast(Tensor, module.weight)))

    def like(self, module: nn.Module) -> Tensor:
        """A tensor of the dtype and on the device of the module's weight."""
        return cast(Tensor, module.weight)

    def bias(self, module: nn.Module) -> Tensor | None:
        bias = cast("Tensor | None", getattr(module, "bias", None))
        return None if bias is None else whole(bias)

    def takes_bias(self, module: nn.Module) -> bool:
        """Whether the module's own ``forward`` would add a bias if it had one."""
        return "bias" in module._parameters

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The module's own computation with another weight (canonical) and bias.

        Any module of a known family works: its own ``forward`` is called on a shadow that holds the two.
        """
        parameters: dict[str, Tensor | None] = {"weight": self.stored(weight)}
        if "bias" in module._parameters or bias is not None:
            parameters["bias"] = bias
        return _call_with(module, base, parameters, x)

    def partial(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor) -> Tensor:
        """``host(x, w)`` of the expression language: apply the module's geometry with ``w`` and without bias."""
        raise HostError(
            "E_HOST_NO_WEIGHT",
            "this module cannot be applied with another weight",
            where=type(module).__name__,
            hint="use a kind whose equations do not call host(x, w)",
        )


class _LinearView(View):
    name = "LINEAR"

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        d_out, d_in = cast(Tensor, module.weight).shape
        return HostShape(
            family="linear",
            d_in=d_in,
            d_out=d_out,
            bias=module.bias is not None,
            plain=base.forward is nn.Linear.forward,
        )

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if base.forward is nn.Linear.forward:
            return F.linear(x, weight, bias)
        return super().apply(module, base, x, weight, bias)

    def partial(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor) -> Tensor:
        if base.forward is nn.Linear.forward:
            return F.linear(x, weight)
        return _call_with(module, base, {"weight": weight, "bias": None}, x)


class _QuantisedView(_LinearView):
    """A linear layer whose weight is kept in a few bits, by torchao or bitsandbytes.

    It computes with them as they are; what a delta asks of the weight is answered by the numbers that they stand for.
    """

    name = "QUANTISED"

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        return isinstance(module, nn.Linear) and type(module.weight).__module__.startswith(_QUANTISERS)

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        linear = cast(nn.Linear, module)
        return HostShape(
            family="linear", d_in=linear.in_features, d_out=linear.out_features, bias=linear.bias is not None
        )

    def weight(self, module: nn.Module) -> Tensor:
        return _numbers_of(cast(nn.Linear, module))

    def like(self, module: nn.Module) -> Tensor:
        linear = cast(nn.Linear, module)
        state = getattr(linear.weight, "quant_state", None)
        dtype: torch.dtype = linear.weight.dtype if state is None else state.dtype
        if not dtype.is_floating_point:
            dtype = torch.float32 if linear._parameters.get("bias") is None else linear.bias.dtype
        return torch.empty(0, dtype=dtype, device=linear.weight.device)

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def partial(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


_QUANTISERS = ("torchao.", "bitsandbytes.")
_INT8 = 127.0


def _numbers_of(linear: nn.Linear) -> Tensor:
    """The weight that a quantised one stands for."""
    weight: Any = linear.weight.detach()
    if type(linear.weight).__module__.startswith("torchao."):
        found: Tensor = weight.dequantize()
        return found
    state = getattr(linear.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)
    scale = getattr(linear.weight, "SCB", None)  # moved into the module's state by its first run
    scale = cast(Any, linear).state.SCB if scale is None else scale
    if scale is None:
        what = "the weight of this module is not quantised yet, or not in a way that is known"
        raise HostError(
            "E_HOST_QUANTISED", what, where=type(linear).__name__, hint="move the model to its device first"
        )
    dtype = torch.float32 if linear._parameters.get("bias") is None else linear.bias.dtype
    made: Tensor = (weight.data.float() * scale.float()[:, None] / _INT8).to(dtype)
    return made


class _Conv1DView(_LinearView):
    """GPT-2's ``Conv1D``: a linear layer whose weight is stored as ``[in, out]``."""

    name = "CONV1D"

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        return _is_conv1d(base)  # type: ignore[arg-type]  # mypy sees the hash of instances

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        d_in, d_out = cast(Tensor, module.weight).shape
        return HostShape(family="linear", d_in=d_in, d_out=d_out, bias=True)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, weight: Tensor) -> Tensor:
        return weight.T

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def partial(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class _ConvView(View):
    name = "CONV"

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not isinstance(
            module, nn.modules.conv._ConvTransposeNd
        )

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        d_out, d_in, *kernel = cast(Tensor, module.weight).shape
        return HostShape(
            family="conv",
            d_in=d_in,
            d_out=d_out,
            kernel=tuple(kernel),
            bias=module.bias is not None,
            spatial=len(kernel),
            channels_first=True,
            grouped=bool(module.groups != 1),
        )

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if base.forward in _PLAIN_CONV_FORWARDS:
            return cast(Tensor, module._conv_forward(x, weight, bias))  # type: ignore[operator]
        return super().apply(module, base, x, weight, bias)

    def partial(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor) -> Tensor:
        return cast(Tensor, module._conv_forward(x, weight, None))  # type: ignore[operator]


_PLAIN_CONV_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class _EmbeddingView(View):
    """``nn.Embedding`` as the linear map from one-hot rows: canonical weight ``[dim, vocab]``."""

    name = "EMBEDDING"

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        # max_norm renormalises the stored rows in place during forward, which no pure function of W can follow.
        return isinstance(module, nn.Embedding) and module.max_norm is None

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        vocab, dim = cast(Tensor, module.weight).shape
        plain = base.forward is nn.Embedding.forward
        return HostShape(family="embedding", d_in=vocab, d_out=dim, bias=False, plain=plain)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, weight: Tensor) -> Tensor:
        return weight.T

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Through the module's own forward: several models scale their embeddings there.
        y = _call_with(module, base, {"weight": weight.T}, x)
        return y if bias is None else y + bias

    def partial(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor) -> Tensor:
        return _call_with(module, base, {"weight": weight.T}, x)


class _NormView(View):
    """Normalisation layers: a gain, and perhaps a bias, of one axis."""

    name = "NORM"

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        parameters = module._parameters
        weight = parameters.get("weight")
        return (
            "norm" in base.__name__.lower()
            and weight is not None
            and weight.ndim == 1
            and set(parameters) <= {"weight", "bias"}
            and not any(name != "deltahub" and not name.startswith("deltahub:") for name in module._modules)
        )

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        dim = cast(Tensor, module.weight).shape[0]
        # A norm over channels-first maps takes inputs of any rank: its channel axis is not known beforehand.
        first = isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase))
        return HostShape(
            family="norm",
            d_in=dim,
            d_out=dim,
            bias=self.bias(module) is not None,
            channels_first=first,
        )

    def apply(self, module: nn.Module, base: type[nn.Module], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None and module._parameters.get("bias") is None:
            # An RMS norm's forward knows no bias and would ignore one without a word.
            return _call_with(module, base, {"weight": weight}, x) + bias
        return super().apply(module, base, x, weight, bias)


class _BlockView(View):
    name = "BLOCK"
    weight_name = None

    def matches(self, module: nn.Module, base: type[nn.Module]) -> bool:
        return True

    def shape(self, module: nn.Module, base: type[nn.Module]) -> HostShape:
        width = block_width(module)
        return HostShape(family="block", d_in=width, d_out=width, bias=False)

    def bias(self, module: nn.Module) -> Tensor | None:
        return None

    def weight(self, module: nn.Module) -> Tensor:
        raise HostError(
            "E_HOST_NO_WEIGHT",
            "a block has no weight of its own",
            where=type(module).__name__,
            hint="target the linear, convolution, embedding or norm inside it",
        )


CONV1D: View = _Conv1DView()
LINEAR: View = _LinearView()
QUANTISED: View = _QuantisedView()
CONV: View = _ConvView()
EMBEDDING: View = _EmbeddingView()
NORM: View = _NormView()
BLOCK: View = _BlockView()
_VIEWS: Sequence[View] = (CONV1D, QUANTISED, LINEAR, CONV, EMBEDDING, NORM)


def view_of(module: nn.Module, base: type[nn.Module] | None = None) -> View:
    """The view that fits a module; :data:`BLOCK` where no more is known of it.

    Args:
        module: a module of the backbone.
        base: its class before any delta was attached; the module's own class by default.
    """
    base = base or type(module)
    for view in _VIEWS:
        if view.matches(module, base):
            return view
    return BLOCK


def block_width(module: nn.Module) -> int | None:
    """The width of a block's output: that of the last module inside it whose output width is known.

    Transformer blocks end in a projection back to the hidden size, or in a norm of it, so no forward pass on
    made-up data is needed. ``None`` where nothing inside tells; an author then gives ``width=``.
    """
    last: int | None = None
    for name, child in module.named_modules():
        if not name or "deltahub:" in name:
            continue
        view = view_of(child)
        if view is not BLOCK:
            last = view.shape(child, type(child)).d_out
    return last
