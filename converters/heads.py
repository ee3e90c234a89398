"""Outputs of attention heads in another order: rotary embeddings turn halves in transformers, and pairs elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["halves", "heads_of", "pairs"]


def pairs(value: Tensor, heads: int) -> Tensor:
    """Rows from halves of each head to pairs: ``[heads · size, …]`` to the same shape."""
    return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def halves(value: Tensor, heads: int) -> Tensor:
    """Rows from pairs of each head to halves: the reverse of :func:`pairs`."""
    return value.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def heads_of(model: nn.Module, path: str) -> int:
    """How many heads the outputs of a query or key projection are; 0 for any other module.

    Raises:
        ConverterError: ``E_CONVERT_BACKBONE`` where the backbone's configuration does not say.
    """
    last = path.rpartition(".")[2]
    if last not in {"q_proj", "k_proj"}:
        return 0
    config: Any = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None) or queries
    found = queries if last == "q_proj" else keys
    if not isinstance(found, int) or found < 1:
        raise ConverterError(
            "E_CONVERT_BACKBONE", "the backbone's configuration does not say how many heads there are", where=path
        )
    return found
