"""What a kind may know of the module it acts on: sizes and layout, never the module itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

__all__ = ["FAMILIES", "Family", "HostShape"]

Family = Literal["linear", "conv", "embedding", "norm", "block", "attention", "transformer"]
FAMILIES: tuple[str, ...] = get_args(Family)
_WEIGHTLESS = frozenset({"block", "attention", "transformer"})


@dataclass(frozen=True, kw_only=True, slots=True)
class HostShape:
    """The facts of one host, in canonical orientation. Two hosts with equal facts share compiled functions.

    Attributes:
        family: ``linear``, ``conv``, ``embedding``, ``norm``, or ``block`` for any other module; a block may also be
            seen as ``attention`` (``d_out`` is then the width of its keys and values) or as ``transformer`` (``d_in``
            is then the number of its tokens, ``d_out`` the width of their embeddings).
        d_in: second axis of the canonical weight: input features, input channels *per group*,
            vocabulary; None where the module does not say (blocks) or has no such axis (norms).
        d_out: first axis of the canonical weight: output features, channels, embedding size,
            normalised size; None where a block does not say.
        kernel: kernel sizes of a convolution, one per spatial axis.
        bias: whether the module has a bias parameter.
        spatial: number of spatial axes of the activations: 1, 2 or 3 for convolutions.
        channels_first: whether channels are axis 1 of the activations and not their last axis.
        grouped: whether channels live in groups that never mix (grouped convolutions), or the host offers no
            channel axis at all (norms over maps of any rank): live equations that mix channels do not fit.
        plain: whether applying the module with another weight is exactly ``F.linear`` or ``F.embedding``
            (linear and embedding families); False sends it through ``deltahub_apply``, as a scaled
            embedding needs.
    """

    family: Family
    d_in: int | None = None
    d_out: int | None = None
    kernel: tuple[int, ...] = ()
    bias: bool = False
    spatial: int = 0
    channels_first: bool = False
    grouped: bool = False
    plain: bool = True

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape of the canonical weight, or None for a block or where a size is unknown."""
        if self.family in _WEIGHTLESS or self.d_out is None:
            return None
        if self.family == "norm":
            return (self.d_out,)
        return None if self.d_in is None else (self.d_out, self.d_in, *self.kernel)

    @property
    def weight_rank(self) -> int | None:
        """Number of axes of the canonical weight; None for a block."""
        if self.family in _WEIGHTLESS:
            return None
        return 1 if self.family == "norm" else 2 + len(self.kernel)

    @property
    def weight_size(self) -> int:
        """Elements of the canonical weight; 0 where it has none that is known."""
        shape = self.weight_shape
        return 0 if shape is None else prod(shape)
