"""One run of an export from files to files: what the command line offers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltahub.converters.onnx.session import Session
from deltahub.errors import ConverterError

__all__ = ["run_folder"]

_SHOWN = 8


def run_folder(
    folder: str | os.PathLike[str],
    *,
    inputs: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    ids: str | None = None,
    generate: int = 0,
    deltas: Sequence[str] = (),
    provider: str = "auto",
) -> dict[str, Any]:
    """Open an export and run it once.

    Args:
        folder: the export.
        inputs: a safetensors file with inputs by name.
        out: a safetensors file for the outputs.
        ids: token ids of one row, separated by commas.
        generate: tokens to generate from the ids.
        deltas: which deltas of a swappable export act.
        provider: as for :class:`Session`.

    Returns:
        ``provider``, and by name in ``result``: what the graph takes where it was given nothing, the tokens that were
        generated, or the outputs' shapes and first values.

    Raises:
        ConverterError: as :class:`Session`, and ``E_ONNX_INPUT``.
    """
    from deltahub.tensors import write

    session = Session(folder, provider=provider).use(*deltas)
    result: dict[str, Any] = {}
    given = _given(inputs, ids)
    if not given:
        result = {name: f"{kind} {list(dims)}" for name, (kind, dims) in session.inputs.items()}
    elif generate:
        if "input_ids" not in given:
            raise ConverterError("E_ONNX_INPUT", "generation needs input_ids", found=", ".join(given))
        rows = session.generate(given["input_ids"], given.get("attention_mask"), max_new_tokens=generate)
        result = {f"row {i}": row.tolist() for i, row in enumerate(rows)}
    else:
        found = session.run(given)
        if out is not None:
            write(out, found)
        result = {name: _said(value) for name, value in found.items()}
    return {"provider": str(session.choice), "result": result}


def _given(inputs: str | os.PathLike[str] | None, ids: str | None) -> Mapping[str, Any]:
    from deltahub.tensors import TensorFile

    given: dict[str, Any] = {}
    if inputs is not None:
        with TensorFile.read(inputs) as file:
            given.update({name: file.torch(name).clone() for name in file})
    if ids is not None:
        try:
            given["input_ids"] = np.array([[int(one) for one in ids.split(",")]], np.int64)
        except ValueError:
            raise ConverterError("E_ONNX_INPUT", "token ids are whole numbers with commas between", found=ids) from None
    return given


def _said(value: Any) -> str:
    first = ", ".join(f"{v:.6g}" for v in value.reshape(-1)[:_SHOWN])
    return f"{value.dtype} {list(value.shape)}: {first}" + (" …" if value.size > _SHOWN else "")
