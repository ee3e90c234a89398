"""Weights into one file: each tensor once, aligned, written from where it lies without another copy of the model."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltahub.converters.onnx.tracing import Traced, Weight
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["DATA", "Data", "Place", "write_data", "write_model"]

DATA = "model.onnx_data"
_PAGE = 4096
_LINE = 64
_LARGEST = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor lies in the data file."""

    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data file: its size, its digest, and where each weight lies."""

    file: str
    size: int
    sha256: str
    places: Mapping[Weight, Place]


def write_data(folder: Path, values: Mapping[str, Tensor], graphs: Iterable[Traced], dtype: torch.dtype | None) -> Data:
    """Write the weights of all graphs of an export.

    Args:
        folder: where to.
        values: tensors of the model by name.
        graphs: graphs that share the file.
        dtype: what floating weights are cast to; ``None`` leaves them.

    Raises:
        ConverterError: ``E_ONNX_SPACE`` where the disk is too small, before anything is written.
    """
    wanted = list(dict.fromkeys(weight for graph in graphs for weight in graph.weights.values()))
    same: dict[object, Place] = {}
    places: dict[Weight, Place] = {}
    order: list[tuple[Weight, Place]] = []
    at = 0
    for weight in wanted:
        tensor = values[weight.name]
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, weight.transposed)
        if key not in same or tensor.numel() == 0:
            length = tensor.numel() * _cast(tensor.dtype, dtype).itemsize
            step = _PAGE if length >= _PAGE else _LINE
            at = -(-at // step) * step
            same[key] = Place(offset=at, length=length)
            order.append((weight, same[key]))
            at += length
        places[weight] = same[key]
    free = shutil.disk_usage(folder).free
    if free < at + (16 << 20):
        raise ConverterError("E_ONNX_SPACE", "the disk is too small for the weights", where=folder,
                             expected=f"{at + (16 << 20):,} bytes", found=f"{free:,} bytes free")  # fmt: skip
    digest = hashlib.sha256()
    with (folder / DATA).open("xb") as file:
        done = 0
        for weight, place in order:
            file.write(gap := b"\0" * (place.offset - done))
            digest.update(gap)
            for piece in _pieces(values[weight.name], weight, dtype):
                file.write(piece)
                digest.update(piece)
            done = place.offset + place.length
        file.flush()
        os.fsync(file.fileno())
    return Data(file=DATA, size=at, sha256=digest.hexdigest(), places=places)


def _cast(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


_ROWS = 32 << 20


def _pieces(tensor: Tensor, weight: Weight, dtype: torch.dtype | None) -> Iterator[memoryview]:
    """A tensor's bytes as they are to lie in the file, some megabytes at a time."""
    from deltahub.tensors import value_bytes

    tensor = tensor.detach()
    if weight.transposed:
        tensor = tensor.T
    rows: Sequence[Tensor] = [tensor]
    size = tensor.numel() * tensor.element_size()
    if tensor.ndim and size > _ROWS:
        step = max(1, tensor.shape[0] * _ROWS // size)
        rows = [tensor[at : at + step] for at in range(0, tensor.shape[0], step)]
    for part in rows:
        whole = part.to(device="cpu", dtype=_cast(part.dtype, dtype)).contiguous()
        yield value_bytes(weight.name, whole)


def write_model(path: Path, traced: Traced, data: Data, metadata: Mapping[str, str]) -> ModelProto:
    """Write a graph whose weights lie in a data file.

    Raises:
        ConverterError: ``E_ONNX_TOO_LARGE`` where the graph itself is above 2 GB.
    """
    import onnx

    model = onnx.load_model_from_string(traced.data)
    for tensor in model.graph.initializer:
        weight = traced.weights.get(tensor.name)
        if weight is not None:
            place = data.places[weight]
            del tensor.external_data[:]
            for key, value in (("location", data.file), ("offset", place.offset), ("length", place.length)):
                tensor.external_data.add(key=key, value=str(value))
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version, model.doc_string = "deltahub", "", ""
    if model.ByteSize() > _LARGEST:
        raise ConverterError("E_ONNX_TOO_LARGE", "the graph without its weights is above 2 GB", where=path,
                             found=f"{model.ByteSize():,} bytes")  # fmt: skip
    path.write_bytes(model.SerializeToString())
    return model
