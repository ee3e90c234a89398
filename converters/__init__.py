"""Converters: merging, diffs, and every foreign format. Imports as ``deltahub.converters``.

    merge("user/delta", "merged/")                       a checkpoint with the delta in its weights
    import_("adapter/", "package/", backbone="base/")    a package out of a foreign checkpoint
    export_("package/", "adapter/", to="peft")           and back
    export_onnx("user/delta", "onnx/")                   graphs for ONNX Runtime, compared with PyTorch
    diff("base/", "tuned/", "package/")                  a package out of two checkpoints; pack and unpack make it small
    combine(["a/", "b/"], "sum/", weights=[1, -1])       packages added, scaled, recompressed, split, renamed

A foreign format is a module with ``sniff``, ``import_`` and perhaps ``export_``, found through the entry points
``deltahub.converters``; another distribution can bring its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "deltahub.converters":
    raise ImportError("import deltahub.converters, not converters")

from deltahub.converters.algebra import combine
from deltahub.converters.diff import DiffReport, diff
from deltahub.converters.formats import Converter, convert, export_, formats, import_, sniff
from deltahub.converters.merge import MergeReport, merge
from deltahub.converters.packing import PackReport, pack
from deltahub.converters.unpacking import unpack

if TYPE_CHECKING:
    from deltahub.converters.onnx import export_onnx

__all__ = [
    "Converter",
    "DiffReport",
    "MergeReport",
    "PackReport",
    "combine",
    "convert",
    "diff",
    "export_",
    "export_onnx",
    "formats",
    "import_",
    "merge",
    "pack",
    "sniff",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "export_onnx":  # the only one that needs torch when it is imported
        from deltahub.converters.onnx import export_onnx

        return export_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
