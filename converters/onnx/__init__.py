"""ONNX: export, proof, and a runtime. Imports as ``deltahub.converters.onnx``.

export_onnx("user/delta", "out/")                    graphs with their weights, compared with PyTorch
export_onnx(model, "out/", form="swappable")         one backbone graph, and each delta as a small file
Session("out/").run({"input_ids": ids})              checked, on a provider that works
Session("out/").use("sst2").generate(ids)            deltas chosen per run
"""

from __future__ import annotations

from deltahub.converters.onnx.diffusion import OnnxUNet
from deltahub.converters.onnx.exporting import OnnxExport, export_onnx
from deltahub.converters.onnx.precision import PrecisionReport, convert_precision
from deltahub.converters.onnx.session import Session
from deltahub.converters.onnx.swapping import add_delta

__all__ = ["OnnxExport", "OnnxUNet", "PrecisionReport", "Session", "add_delta", "convert_precision", "export_onnx"]
