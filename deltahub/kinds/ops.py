"""The vocabulary of the expression language: every operation's name, signature and meaning, and nothing that computes.

The implementations live apart: :mod:`deltahub.kinds.torch_ops` for the functions that run, and
:mod:`deltahub.kinds.numpy_ops` for the executable specification. A test compares the three.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from types import MappingProxyType
from typing import Literal, TypeVar

__all__ = ["ACTIVATIONS", "CHANNEL_OPS", "OPS", "WEIGHT_OPS", "BadCallError", "Op", "Parameter", "nearest"]

_T = TypeVar("_T")

ParameterType = Literal["tensor", "int", "ints", "number", "text", "flag"]

ACTIVATIONS = (
    "elu", "gelu", "gelu_new", "hardswish", "identity", "leaky_relu", "mish", "quick_gelu", "relu", "relu6", "selu",
    "sigmoid", "silu", "softplus", "swish", "tanh",
)  # fmt: skip
"""What ``activation(x, name)`` takes; each but ``identity`` is also an operation of its own."""

CHANNEL_OPS = frozenset({"linear", "channel", "layer_norm", "rms_norm"})
"""Operations whose channel axis comes from the host: the last, or axis 1 of convolutional maps."""

WEIGHT_OPS = frozenset({"rows", "columns"})
"""Operations that need the number of axes of the host's weight."""


class BadCallError(Exception):
    """A call that does not fit its operation's signature; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter; a tensor whose default is None may be absent.

    ``ints`` is a whole number or a tuple of them, ``flag`` is 0 or 1.
    """

    name: str
    type: ParameterType
    required: bool = True
    default: object = None
    variadic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation.

    Attributes:
        name: its name in expressions.
        parameters: in order; a variadic first one takes any number of tensors.
        named: whether further keywords (axis lengths, whole numbers) are taken, as einops does.
        doc: what it computes, in one line.
        signature: as written, for people.
    """

    name: str
    parameters: tuple[Parameter, ...]
    named: bool
    doc: str
    signature: str

    def bind(self, args: Sequence[_T], kwargs: Mapping[str, _T]) -> tuple[list[object], dict[str, _T]]:
        """Put arguments into the order of the parameters, with defaults filled in.

        Returns:
            one value per parameter (a tuple for a variadic one), and the further keywords.

        Raises:
            BadCallError: an argument is missing, unknown, given twice, or one too many.
        """
        parameters, rest = list(self.parameters), list(args)
        values: list[object] = []
        given = dict(kwargs)
        if parameters[0].variadic:
            # Required parameters behind a variadic one close the call, as einops has it: einsum(a, b, "pattern").
            tail = [p for p in parameters[1:] if p.required and p.name not in given]
            count = len(rest) - len(tail)
            if count < 1:
                raise BadCallError(f"{self.name} needs at least one tensor" + "".join(f" and a {p.name}" for p in tail))
            values.append(tuple(rest[:count]))
            given |= {p.name: value for p, value in zip(tail, rest[count:], strict=True)}
            parameters, rest = parameters[1:], []
        if len(rest) > len(parameters):
            raise BadCallError(f"{self.name} takes at most {len(parameters)} positional arguments, not {len(rest)}")
        for i, parameter in enumerate(parameters):
            if i < len(rest):
                if parameter.name in given:
                    raise BadCallError(f"{self.name} got {parameter.name} twice")
                values.append(rest[i])
            elif parameter.name in given:
                values.append(given.pop(parameter.name))
            elif parameter.required:
                raise BadCallError(f"{self.name} needs {parameter.name}")
            else:
                values.append(parameter.default)
        if given and not self.named:
            name = next(iter(given))
            known = [p.name for p in parameters]
            raise BadCallError(f"{self.name} has no parameter {name!r}{nearest(name, known)}")
        return values, given


def nearest(name: str, known: Sequence[str]) -> str:
    """Finish a sentence about an unknown name: the nearest known ones, or all of a few, or nothing."""
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(close) + "?"
    return f" (there is {', '.join(known)})" if 0 < len(known) <= 8 else ""


@cache
def _parameter(text: str) -> Parameter:
    head, _, default = text.partition("=")
    name, _, kind = (part.strip() for part in head.partition(":"))
    return Parameter(
        name=name.removeprefix("*"),
        type=kind,  # type: ignore[arg-type]  # the table below is checked by a test
        required=not default,
        default=ast.literal_eval(default.strip()) if default else None,
        variadic=name.startswith("*"),
    )


def _op(signature: str, doc: str) -> Op:
    name, _, inside = signature.removesuffix(")").partition("(")
    parts = [part.strip() for part in inside.split(", ")]
    named = parts[-1] == "**lengths"
    return Op(
        name=name,
        parameters=tuple(_parameter(p) for p in parts if p != "**lengths"),
        named=named,
        doc=doc,
        signature=signature,
    )


_UNARY = (
    ("exp", "e to the x"),
    ("log", "natural logarithm"),
    ("sqrt", "square root"),
    ("rsqrt", "one over the square root"),
    ("square", "x times x"),
    ("abs", "absolute value"),
    ("sign", "-1, 0 or 1"),
    ("sin", "sine"),
    ("cos", "cosine"),
    ("round", "nearest whole number, ties to even"),
    ("floor", "largest whole number not above"),
    ("relu", "max(x, 0)"),
    ("relu6", "min(max(x, 0), 6)"),
    ("gelu", "x times the normal distribution function of x"),
    ("gelu_new", "gelu by its tanh approximation"),
    ("quick_gelu", "x sigmoid(1.702 x)"),
    ("silu", "x sigmoid(x)"),
    ("swish", "another name of silu"),
    ("mish", "x tanh(softplus(x))"),
    ("hardswish", "x relu6(x + 3) / 6"),
    ("selu", "self-normalising elu"),
    ("tanh", "hyperbolic tangent"),
    ("sigmoid", "1 / (1 + exp(-x))"),
    ("softplus", "log(1 + exp(x))"),
    ("float32", "x in single precision"),
    ("stop_gradient", "x, through which no gradient flows"),
    ("zeros_like", "zeros of x's shape"),
    ("ones_like", "ones of x's shape"),
)
_AXIS = (
    ("sum", "sum over one axis or several"),
    ("mean", "mean over one axis or several"),
    ("amax", "largest over one axis or several"),
    ("amin", "smallest over one axis or several"),
    ("norm", "Euclidean norm over one axis or several"),
    ("rms", "root of the mean square over one axis or several"),
)
_TABLE = (
    # What belongs to the host.
    ("host(x: tensor, w: tensor)", "the host applied to x with weight w ([out, in, *kernel]) and no bias"),
    ("base(x: tensor)", "the original module applied to x (port replace)"),
    ("linear(h: tensor, w: tensor, bias: tensor = None)", "w ([out, in]) applied to the channel axis of h, plus bias"),
    ("channel(v: tensor)", "vector v laid along the channel axis of activations"),
    ("layer_norm(x: tensor, weight: tensor = None, bias: tensor = None, eps: number = 1e-5)",
     "x with mean 0 and variance 1 over the channel axis, then gain and bias"),
    ("rms_norm(x: tensor, weight: tensor = None, eps: number = 1e-6)",
     "x over its root mean square along the channel axis, then gain"),
    ("rows(v: tensor)", "vector v ([out]) laid along the first axis of the host's weight"),
    ("columns(v: tensor)", "vector v ([in]) laid along the second axis of the host's weight"),
    # Elementwise.
    ("activation(x: tensor, name: text)", "the activation of that name"),
    ("leaky_relu(x: tensor, slope: number = 0.01)", "x where positive, slope x elsewhere"),
    ("elu(x: tensor, alpha: number = 1.0)", "x where positive, alpha (exp(x) - 1) elsewhere"),
    ("clip(x: tensor, low: number, high: number)", "x kept within low and high"),
    ("minimum(a: tensor, b: tensor)", "the smaller, element by element"),
    ("maximum(a: tensor, b: tensor)", "the larger, element by element"),
    ("like(x: tensor, y: tensor)", "x in the dtype of y"),
    # Along axes.
    ("softmax(x: tensor, axis: int = -1)", "exp(x) over its sum along an axis"),
    ("log_softmax(x: tensor, axis: int = -1)", "logarithm of the softmax"),
    ("normalize(x: tensor, axis: ints = -1, eps: number = 1e-12)", "x over its Euclidean norm, at least eps"),
    ("cumsum(x: tensor, axis: int)", "running sums"),
    ("group_norm(x: tensor, groups: int, weight: tensor = None, bias: tensor = None, eps: number = 1e-5)",
     "mean 0 and variance 1 within groups of channels (axis 1), then gain and bias"),
    # Shapes.
    ("reshape(x: tensor, shape: ints)", "the same elements in another shape; one length may be -1"),
    ("reshape_as(x: tensor, y: tensor)", "the elements of x in the shape of y"),
    ("expand_as(x: tensor, y: tensor)", "x broadcast to the shape of y"),
    ("transpose(x: tensor, a: int = -2, b: int = -1)", "two axes exchanged"),
    ("permute(x: tensor, axes: ints)", "axes in another order"),
    ("unsqueeze(x: tensor, axis: int)", "a new axis of length 1"),
    ("squeeze(x: tensor, axis: int)", "without an axis of length 1"),
    ("flatten(x: tensor, start: int = 0, end: int = -1)", "axes start to end as one"),
    ("flip(x: tensor, axes: ints)", "reversed along axes"),
    ("roll(x: tensor, shift: int, axis: int)", "rotated along an axis"),
    ("pad(x: tensor, widths: ints, value: number = 0)",
     "padded by (before, after) of the last axis, then of the one before"),
    ("cat(*xs: tensor, axis: int = -1)", "joined along an axis"),
    ("stack(*xs: tensor, axis: int = 0)", "joined along a new axis"),
    ("size(x: tensor, axis: int)", "length of an axis"),
    ("rearrange(x: tensor, pattern: text, **lengths)", "einops.rearrange"),
    ("reduce(x: tensor, pattern: text, how: text, **lengths)", "einops.reduce by sum, mean, max, min or prod"),
    ("repeat(x: tensor, pattern: text, **lengths)", "einops.repeat"),
    ("einsum(*xs: tensor, pattern: text)", "einops.einsum: tensors first, the pattern last"),
    # New tensors, in the dtype and on the device of another.
    ("zeros(shape: ints, like: tensor)", "zeros of a shape"),
    ("ones(shape: ints, like: tensor)", "ones of a shape"),
    ("eye(n: int, like: tensor)", "the identity matrix"),
    ("arange(n: int, like: tensor)", "0, 1 … n - 1"),
    # Linear algebra.
    ("bmm(a: tensor, b: tensor)", "matrix product over the last two axes, the others broadcast"),
    ("kron(a: tensor, b: tensor)", "Kronecker product"),
    ("inverse(x: tensor)", "inverse of square matrices"),
    ("solve(a: tensor, b: tensor)", "the x of a x = b"),
    ("diag(v: tensor)", "the matrix with v on its diagonal; leading axes are batches"),
    ("diagonal(x: tensor)", "the diagonal of the last two axes"),
    ("block_diag(x: tensor)", "matrices [n, a, b] on the diagonal of one [n a, n b]"),
    ("tril(x: tensor, k: int = 0)", "zero above the k-th diagonal"),
    ("triu(x: tensor, k: int = 0)", "zero below the k-th diagonal"),
    ("skew(v: tensor, n: int)", "[…, n (n - 1) / 2] as strict upper triangle U, row by row: U - Uᵀ"),
    ("cayley(s: tensor)", "(I - s)⁻¹ (I + s): a rotation where s is skew"),
    ("circulant(c: tensor)", "[…, n] as […, n, n] whose column j is c rotated down by j"),
    ("ifft2_real(x: tensor)", "real part of the inverse Fourier transform over the last two axes"),
    # By index.
    ("gather(x: tensor, axis: int, index: tensor)", "elements of x picked along an axis"),
    ("take(x: tensor, index: tensor, axis: int = 0)", "slices of x by a list of indices"),
    ("put(x: tensor, index: tensor, values: tensor, axis: int = 0)", "x with slices replaced by values"),
    ("scatter_add(x: tensor, axis: int, index: tensor, values: tensor)", "x plus values at indices along an axis"),
    ("embedding(index: tensor, table: tensor)", "rows of a table"),
    # Convolution, pooling, attention.
    ("avg_pool1d(x: tensor, kernel: ints, stride: ints = None, padding: ints = 0, ceil: flag = 0, count_pad: flag = 1)",
     "means of windows"),
    ("avg_pool2d(x: tensor, kernel: ints, stride: ints = None, padding: ints = 0, ceil: flag = 0, count_pad: flag = 1)",
     "means of windows"),
    ("adaptive_avg_pool1d(x: tensor, size: ints)", "means, down to a given length"),
    ("adaptive_avg_pool2d(x: tensor, size: ints)", "means, down to a given height and width"),
    ("interpolate(x: tensor, size: ints, mode: text = 'bilinear')",
     "maps resized: bilinear (corners not aligned) or nearest"),
    ("shrink2d(x: tensor, by: int, how: text = 'avg')",
     "means of by × by windows: 'avg', ragged at the far edge; or 'adaptive', equal shares of side // by windows"),
    ("grow2d(x: tensor, by: int, size: ints)", "a map shrunk by a factor, resized to a height and width: bilinear"),
    ("depthwise2d(x: tensor, weight: tensor, bias: tensor = None)",
     "each channel of [batch, channels, height, width] by its own odd window ([channels, 1, k, k]); the size stays"),
    ("gated(x: tensor, how: text = 'product', axis: int = -1)",
     "one half of an axis times the other ('product') or times its sigmoid ('sigmoid')"),
    ("attention(q: tensor, k: tensor, v: tensor, scale: number = None, causal: flag = 0)",
     "softmax(scale q kᵀ) v over the last two axes; scale 1/√d by default"),
)  # fmt: skip
_CONV = (
    "conv{n}d(x: tensor, weight: tensor, bias: tensor = None, stride: ints = 1, padding: ints = 0, "
    "dilation: ints = 1, groups: int = 1)"
)


def _table() -> dict[str, Op]:
    rows = [(f"{name}(x: tensor)", doc) for name, doc in _UNARY]
    rows += [(f"{name}(x: tensor, axis: ints, keep: flag = 0)", doc) for name, doc in _AXIS]
    rows += [(_CONV.format(n=n), f"convolution over {n} axes of [batch, channels, …]") for n in (1, 2, 3)]
    return {op.name: op for op in sorted((_op(*row) for row in (*rows, *_TABLE)), key=lambda op: op.name)}


OPS: Mapping[str, Op] = MappingProxyType(_table())
"""All operations by name."""
