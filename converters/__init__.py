"""Converters: merging, diffs, ONNX and every foreign format. Imports as ``deltahub.converters``."""

if __name__ != "deltahub.converters":
    raise ImportError("import deltahub.converters, not converters")

__all__: list[str] = []
