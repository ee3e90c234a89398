"""Smaller numbers: a float32 export in float16, int8 or int4, by ONNX Runtime's own tools, with the error measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltahub.converters.onnx.exporting import EXPORT
from deltahub.converters.onnx.graphs import Graph, Input, Output
from deltahub.converters.onnx.providers import open_session
from deltahub.converters.onnx.session import check_files
from deltahub.converters.onnx.storing import DATA
from deltahub.converters.onnx.swapping import read_report
from deltahub.errors import ConverterError

__all__ = ["PRECISIONS", "Loss", "PrecisionReport", "convert_precision"]

PRECISIONS = ("float16", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What an output lost against float32, over all inputs that were tried.

    Attributes:
        graph: the graph's file.
        output: the output's name.
        greatest: greatest absolute difference.
        relative: length of the difference over the length of the output.
        agreement: share of rows whose greatest element stayed the same.
    """

    graph: str
    output: str
    greatest: float
    relative: float
    agreement: float


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """A converted export: where it is, how large it was and is, and what each output lost."""

    folder: Path
    precision: str
    before: int
    after: int
    losses: tuple[Loss, ...]

    def __str__(self) -> str:
        lines = [f"{self.precision}: {self.before / 1e6:.1f} MB became {self.after / 1e6:.1f} MB in {self.folder}"]
        lines += [
            f"  {one.graph}  {one.output}: greatest difference {one.greatest:.2g}, relative {one.relative:.2g}, "
            f"same greatest element in {one.agreement:.1%}"
            for one in self.losses
        ]
        return "\n".join(lines)


def convert_precision(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], precision: str, *, overwrite: bool = False
) -> PrecisionReport:
    """Write a float32 export in another precision, and measure what its outputs lose on the CPU.

    Args:
        folder: a merged or live export in float32.
        out: the new folder.
        precision: ``float16`` (inputs and outputs stay float32), ``int8`` (dynamic, weights and activations) or
            ``int4`` (weights only, in blocks of 32).
        overwrite: replace an existing folder.

    Raises:
        ConverterError: ``E_ONNX_PRECISION`` where the export or its graph cannot be converted so; ``E_ONNX_FILE`` and
            the like for a folder that is not whole.
    """
    from deltahub.converters.shards import new_folder
    from deltahub.tensors import sha256_file

    source = Path(folder)
    report = read_report(source)
    if precision not in PRECISIONS or report.get("dtype") != "float32" or report.get("form") == "swappable":
        raise ConverterError("E_ONNX_PRECISION", "this export cannot be converted so", where=source, found=precision,
                             expected=f"a merged or live float32 export, and {', '.join(PRECISIONS)}")  # fmt: skip
    losses: list[Loss] = []
    with new_folder(out, overwrite=overwrite) as place:
        for path in source.iterdir():
            if path.is_file() and path.name not in {*report["files"], EXPORT}:
                shutil.copyfile(path, place / path.name)
        graphs = [_graph(one) for one in report["graphs"]]
        for graph in graphs:
            check_files(source, graph.file, report, verify=True)
            data = DATA if len(graphs) == 1 else f"{graph.file}_data"
            _save(_converted(source / graph.file, precision), place / graph.file, data)
            losses += _measure(graph, source, place)
        files: dict[str, Any] = {
            path.name: dict(zip(("size", "sha256"), sha256_file(path), strict=True))
            for path in sorted(place.iterdir())
            if path.name.endswith((".onnx", "_data"))
        }
        said = {**report, "dtype": precision, "files": files, "losses": [asdict(one) for one in losses], "weights": {}}
        (place / EXPORT).write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        after = sum(int(one["size"]) for one in files.values())
    before = sum(int(one["size"]) for one in report["files"].values())
    return PrecisionReport(folder=Path(out), precision=precision, before=before, after=after, losses=tuple(losses))


def _graph(said: Mapping[str, Any]) -> Graph:
    def refuse(model: Any, inputs: Any) -> Any:
        raise AssertionError("a graph from a report has no module")

    try:
        return Graph(
            file=said["file"],
            call=refuse,
            inputs=tuple(Input(**{**one, "dims": tuple(one["dims"])}) for one in said["inputs"]),
            outputs=tuple(Output(**{**one, "dims": tuple(one["dims"])}) for one in said["outputs"]),
            sizes=tuple(said["sizes"]),
            left=bool(said["left"]),
        )
    except (KeyError, TypeError) as error:
        raise ConverterError("E_ONNX_FILE", f"the report's graphs make no sense: {error}", found=said) from error


def _converted(path: Path, precision: str) -> Any:
    import onnx

    model = onnx.load(path)
    kept = [(entry.key, entry.value) for entry in model.metadata_props]
    try:
        made = {"float16": _float16, "int8": _int8, "int4": _int4}[precision](model)
    except Exception as error:
        raise ConverterError("E_ONNX_PRECISION", f"ONNX Runtime's tools cannot convert the graph: {error}", where=path,
                             found=precision) from error  # fmt: skip
    del made.metadata_props[:]
    for key, value in (*kept, ("deltahub.precision", precision)):
        made.metadata_props.add(key=key, value=value)
    return made


def _float16(model: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)


def _int8(model: Any) -> Any:
    import tempfile

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "made.onnx"
        quantize_dynamic(model, target, weight_type=QuantType.QInt8, use_external_data_format=True,
                         op_types_to_quantize=["MatMul", "Gemm", "Gather"],  # its `Attention` is another operator
                         extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})  # fmt: skip
        made = onnx.load(target)
    if not any("Integer" in node.op_type or "Quantize" in node.op_type for node in made.graph.node):
        raise ValueError("no operation was quantised")
    return made


def _int4(model: Any) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=True)
    tool.process()
    made = tool.model.model
    if not any(node.op_type == "MatMulNBits" for node in made.graph.node):
        raise ValueError("no product was quantised")
    return made


def _save(model: Any, path: Path, data: str) -> None:
    import onnx

    onnx.save_model(
        model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data, size_threshold=1024
    )


def _measure(graph: Graph, before: Path, after: Path) -> list[Loss]:
    """Run both on the sizes that the export was proved with."""
    old, new = (open_session(place / graph.file) for place in (before, after))
    gaps: dict[str, list[Any]] = {one.name: [] for one in graph.outputs}
    for sizes in graph.sizes:
        inputs = graph.samples(sizes)
        feeds = {name: value.numpy() for name, value in inputs.items()}
        for one, a, b in zip(graph.outputs, old.run(None, feeds), new.run(None, feeds), strict=True):
            mask = graph.compared(one, inputs)
            kept = np.ones(a.shape, bool) if mask is None else np.broadcast_to(mask.numpy(), a.shape)
            rows = kept.reshape(-1, a.shape[-1]).any(-1) if a.ndim else np.ones(1, bool)
            gaps[one.name].append((a.reshape(-1, a.shape[-1])[rows], b.reshape(-1, a.shape[-1])[rows]))
    losses = []
    for name, pairs in gaps.items():
        a = np.concatenate([p[0] for p in pairs]).astype(np.float64)
        b = np.concatenate([p[1] for p in pairs]).astype(np.float64)
        losses.append(
            Loss(
                graph=graph.file,
                output=name,
                greatest=float(np.abs(a - b).max(initial=0.0)),
                relative=float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(a)), 1e-30),
                agreement=float((a.argmax(-1) == b.argmax(-1)).mean()) if len(a) else 1.0,
            )
        )
    return losses
