"""What is to be exported: a module with named inputs and outputs, their axes, and inputs of any size to try it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Call", "Graph", "Input", "Output", "axis", "count", "symbolic"]

Dim = str | int
Sizes = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """An input of a graph.

    Attributes:
        name: as runtimes know it.
        dims: its axes: a number, a name, or a sum of names such as ``past_sequence_length + sequence_length``.
        values: what fills it when it is tried: ``ids``, ``types``, ``mask``, ``positions``, ``steps`` or ``float``.
        limit: ids and steps are below this.
        like: what it is traced with, where random values make no sense.
    """

    name: str
    dims: tuple[Dim, ...]
    values: str = "float"
    limit: int = 2
    like: Tensor | None = None

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(count(dim, sizes) for dim in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """An output of a graph.

    Attributes:
        name: as runtimes know it.
        dims: its axes, as those of an input; a ``?`` stands for a number that the model knows.
        tokens: which axis runs along the tokens of the attention mask, where padding leaves rows that mean nothing.
    """

    name: str
    dims: tuple[Dim, ...]
    tokens: int | None = None


def axis(dim: Dim) -> tuple[str, ...]:
    """The names that an axis is a sum of; none for a number."""
    return tuple(dim.split(" + ")) if isinstance(dim, str) and symbolic(dim) else ()


def symbolic(dim: Dim) -> bool:
    return isinstance(dim, str) and dim != "?"


def count(dim: Dim, sizes: Sizes) -> int:
    return dim if isinstance(dim, int) else sum(sizes[name] for name in axis(dim))


class Call(nn.Module):
    """A model called with tensors in a row, giving tensors in a row: what a graph is."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], call: Callable[[nn.Module, dict[str, Tensor]], Sequence[Tensor]]
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.call = call

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.call(self.model, dict(zip(self.names, values, strict=True))))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One graph of an export.

    Attributes:
        file: the file's name.
        call: from the model and named inputs to the outputs in order.
        inputs: in order.
        outputs: in order.
        sizes: sizes of the named axes to try; it is traced with the first, whose numbers all differ.
        left: whether padding is on the left, as decoders have it.
        limits: the greatest size that an axis may have, where the architecture has one.
        opset: the version of ONNX's operators that suits it, where the usual one does not.
    """

    file: str
    call: Callable[[nn.Module, dict[str, Tensor]], Sequence[Tensor]]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    sizes: tuple[Sizes, ...]
    left: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)
    opset: int | None = None

    def module(self, model: nn.Module) -> Call:
        return Call(model, [one.name for one in self.inputs], self.call).eval()

    def samples(self, sizes: Sizes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs of these sizes, some of their rows padded."""
        generator = torch.Generator().manual_seed(seed + sum(sizes.values()))
        found: dict[str, Tensor] = {}
        for one in self.inputs:
            found[one.name] = _sample(one, one.shape(sizes), found, generator, dtype, left=self.left)
        return found

    def compared(self, output: Output, inputs: Mapping[str, Any]) -> Tensor | None:
        """Where an output means something: a mask that broadcasts over it; ``None`` for everywhere.

        Attention of a padded row of a decoder has nothing to attend to; what comes out is left to the implementation.
        """
        mask = inputs.get("attention_mask")
        if output.tokens is None or mask is None or not self.left:
            return None
        kept = torch.as_tensor(mask).bool()
        rank = len(output.dims)
        fresh = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        length = fresh.shape[1] if "past" not in "".join(map(str, output.dims)) else kept.shape[1]
        kept = kept[:, kept.shape[1] - length :]
        shape = [1] * rank
        shape[0], shape[output.tokens] = kept.shape
        return kept.reshape(shape)


def _sample(
    one: Input,
    shape: tuple[int, ...],
    found: Mapping[str, Tensor],
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    left: bool,
) -> Tensor:
    if one.like is not None:
        return one.like.detach().clone()
    if one.values in {"ids", "types", "steps"}:
        return torch.randint(1 if one.limit > 3 else 0, one.limit, shape, generator=generator)
    if one.values == "mask":
        mask = torch.ones(shape, dtype=torch.long)
        length = shape[1]
        for row in range(1, shape[0], 2):
            cut = min(length - 1, length // 3)
            if cut:
                mask[row, slice(0, cut) if left else slice(length - cut, length)] = 0
        return mask
    if one.values == "positions":
        mask = found["attention_mask"]
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        return positions[:, mask.shape[1] - shape[1] :]
    return torch.randn(shape, generator=generator).to(dtype)
