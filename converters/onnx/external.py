"""What a graph reads from outside itself: checked before ONNX Runtime sees the graph."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

__all__ = ["check_digest", "check_graph", "read_graph"]

_LARGEST_GRAPH = (1 << 31) - 1


def read_graph(path: Path) -> ModelProto:
    """A graph without its weights.

    Raises:
        ConverterError: ``E_ONNX_FILE`` where it is missing, too large or no graph.
    """
    import onnx

    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= _LARGEST_GRAPH else b""
    except OSError as error:
        raise ConverterError("E_ONNX_FILE", f"the graph cannot be read: {error.strerror}", where=path) from error
    if size > _LARGEST_GRAPH:
        raise ConverterError("E_ONNX_FILE", "a graph is at most 2 GB", where=path, found=f"{size:,} bytes")
    try:
        return onnx.load_model_from_string(data)
    except Exception as error:
        raise ConverterError("E_ONNX_FILE", "this is no ONNX graph", where=path, found=str(error)[:200]) from error


def check_graph(path: Path, model: ModelProto) -> set[str]:
    """Refuse external data that is missing, cut, or lies outside the graph's folder; gives the files' names.

    Raises:
        ConverterError: ``E_ONNX_DATA_OUTSIDE``, ``E_ONNX_DATA_MISSING``, ``E_ONNX_DATA_SIZE``.
    """
    folder = path.parent
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != 1:  # TensorProto.EXTERNAL
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{path.name}, tensor {tensor.name}"
        name = said.get("location", "")
        if name not in sizes:
            sizes[name] = _size(folder, name, where)
        begin, length = _number(said.get("offset", "0"), where), _number(said.get("length", "0"), where)
        if begin + length > sizes[name]:
            raise ConverterError("E_ONNX_DATA_SIZE", "the data file is shorter than the graph says", where=where,
                                 expected=f"at least {begin + length:,} bytes", found=f"{sizes[name]:,}",
                                 hint="fetch the file again")  # fmt: skip
    return set(sizes)


def _number(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ConverterError("E_ONNX_DATA_SIZE", "a place in a data file is a whole number", where=where, found=text)
    return int(text)


def _size(folder: Path, name: str, where: str) -> int:
    pure = PurePosixPath(name)
    plain = name and "\\" not in name and ":" not in name and "\0" not in name
    if not plain or pure.is_absolute() or ".." in pure.parts:
        raise ConverterError("E_ONNX_DATA_OUTSIDE", "the graph reads a file outside its folder", where=where,
                             found=name or "no name", hint="do not run this graph")  # fmt: skip
    place = folder / pure
    try:
        real = place.resolve(strict=True)
        found = os.stat(real)  # noqa: PTH116  (of the very path that was resolved)
    except OSError as error:
        raise ConverterError("E_ONNX_DATA_MISSING", f"the weights are not there: {error.strerror}", where=where,
                             found=name, hint="fetch the whole folder") from error  # fmt: skip
    if not real.is_relative_to(folder.resolve()):
        raise ConverterError("E_ONNX_DATA_OUTSIDE", "the graph reads a file outside its folder", where=where,
                             found=real, hint="copy the file into the folder instead of linking it")  # fmt: skip
    if not stat.S_ISREG(found.st_mode):
        raise ConverterError("E_ONNX_DATA_MISSING", "the weights are no regular file", where=where, found=name)
    return found.st_size


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (t for t in (attribute.t, *attribute.tensors) if t.ByteSize())
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield sparse.values
                yield sparse.indices
            for graph in (attribute.g, *attribute.graphs):
                if graph.ByteSize():
                    yield from _of_graph(graph)


def check_digest(path: Path, said: Mapping[str, Any] | None) -> None:
    """Compare a file with what ``export.json`` says of it.

    Raises:
        ConverterError: ``E_ONNX_CHANGED`` where the report does not list it, or says something else.
    """
    from deltahub.tensors import sha256_file

    if said is None:
        raise ConverterError("E_ONNX_CHANGED", "the export does not list this file", where=path)
    size, digest = path.stat().st_size, None
    if size == said.get("size"):
        size, digest = sha256_file(path)
    if (size, digest) != (said.get("size"), said.get("sha256")):
        raise ConverterError("E_ONNX_CHANGED", "the file is not the one that was exported", where=path,
                             expected=f"{said.get('size')} bytes, {said.get('sha256')}",
                             found=f"{size} bytes" + (f", {digest}" if digest else ""),
                             hint="fetch it again, or export again")  # fmt: skip
