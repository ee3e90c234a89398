"""Text from a decoder: the cache of keys and values goes round from outputs to inputs, on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from deltahub.converters.onnx.session import Session

__all__ = ["generate", "usual"]

_PAST, _PRESENT = "past_key_values.", "present."


def usual(inputs: Mapping[str, tuple[str, tuple[Any, ...]]], given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Values for what a caller may leave out: no padding, one segment, positions in order, an empty past."""
    found: dict[str, NDArray[Any]] = {}
    if "input_ids" not in given:
        return found
    ids = np.asarray(given["input_ids"])
    past = next((np.asarray(v).shape[2] for k, v in given.items() if k.startswith(_PAST)), 0)
    for name, (kind, dims) in inputs.items():
        if name in given or ids.ndim != 2:
            continue
        if name == "attention_mask":
            found[name] = np.ones((ids.shape[0], past + ids.shape[1]), np.int64)
        elif name == "token_type_ids":
            found[name] = np.zeros(ids.shape, np.int64)
        elif name.startswith(_PAST) and len(dims) == 4 and past == 0 and "encoder" not in name:
            dtype = np.float16 if kind == "tensor(float16)" else np.float32
            found[name] = np.zeros((ids.shape[0], dims[1], 0, dims[3]), dtype)
    if "position_ids" in inputs and "position_ids" not in given and ids.ndim == 2:
        mask = np.asarray(given.get("attention_mask", found.get("attention_mask")))
        found["position_ids"] = _positions(mask)[:, mask.shape[1] - ids.shape[1] :]
    return found


def _positions(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Positions that count what is attended to; padding gets 1, as in transformers."""
    positions = mask.astype(np.int64).cumsum(-1) - 1
    return np.where(mask == 0, 1, positions)


def generate(
    session: Session,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int = 64,
    eos_token_id: int | Collection[int] | None = None,
    pad_token_id: int = 0,
) -> NDArray[np.int64]:
    """Generate greedily: each step takes the likeliest token, until all rows have ended.

    Args:
        session: an export with a cache of keys and values.
        input_ids: the prompts, of shape [batch, length]; shorter ones are padded on the left.
        attention_mask: 0 where a prompt is padded.
        max_new_tokens: at most so many.
        eos_token_id: what ends a row.
        pad_token_id: what follows in rows that have ended.

    Returns:
        Prompts and what follows, of shape [batch, length + new].

    Raises:
        ConverterError: ``E_ONNX_GENERATE`` where the graph has no cache, or the prompt is empty.
    """
    caches = [name for name in session.inputs if name.startswith(_PAST)]
    ids = np.asarray(input_ids, np.int64)
    if not caches or any(".encoder." in name for name in caches):
        raise ConverterError("E_ONNX_GENERATE", "this graph keeps no keys and values, so it cannot generate",
                             where=session.file, hint="export with task text-generation-with-past")  # fmt: skip
    if ids.ndim != 2 or ids.size == 0:
        raise ConverterError("E_ONNX_GENERATE", "a prompt has the shape [batch, length], and both are above 0",
                             found=list(ids.shape))  # fmt: skip
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    running = np.ones(len(ids), bool)
    step, whole = ids, [ids]
    cache: dict[str, Any] = {}
    presents = [name for name in session.outputs if name.startswith(_PRESENT)]
    for _ in range(max_new_tokens):
        out, left = session.run_held({"input_ids": step, "attention_mask": mask}, cache, presents)
        token = out["logits"][:, -1].argmax(-1).astype(np.int64)
        token = np.where(running, token, pad_token_id)
        running &= ~np.isin(token, list(ends))
        step = token[:, None]
        whole.append(step)
        mask = np.concatenate([mask, np.ones_like(step)], 1)
        cache = {_PAST + name.removeprefix(_PRESENT): value for name, value in left.items()}
        if not running.any():
            break
    return np.concatenate(whole, 1)
