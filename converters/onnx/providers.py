"""ONNX Runtime's providers: what was wanted, what there is, what is missing and how to get it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from deltahub.errors import ConverterError

__all__ = ["PROVIDERS", "Choice", "choose", "open_session", "runtime"]

PROVIDERS: Mapping[str, str] = MappingProxyType(
    {
        "tensorrt": "TensorrtExecutionProvider",
        "cuda": "CUDAExecutionProvider",
        "directml": "DmlExecutionProvider",
        "coreml": "CoreMLExecutionProvider",
        "cpu": "CPUExecutionProvider",
    }
)
_GET: Mapping[str, str] = MappingProxyType(
    {
        "tensorrt": 'pip install "onnxruntime-gpu[cuda,cudnn]" "tensorrt-cu13-libs<11", and an NVIDIA driver',
        "cuda": 'pip install "onnxruntime-gpu[cuda,cudnn]", and an NVIDIA driver',
        "directml": "pip install onnxruntime-directml, on Windows",
        "coreml": "pip install onnxruntime, on macOS",
        "cpu": 'pip install "deltahub[onnx]"',
    }
)
_AUTO = ("cuda", "directml", "coreml", "cpu")
"""TensorRT is taken only when it is asked for: it compiles for minutes before the first run."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which provider a session runs on, and why.

    Attributes:
        wanted: what was asked for.
        provider: what was taken.
        chain: what ONNX Runtime is given, in order.
        notes: why something better was not taken, and how to get it.
    """

    wanted: str
    provider: str
    chain: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"wanted {self.wanted}, runs on {self.provider}", *self.notes])


def runtime() -> Any:
    """The ``onnxruntime`` module.

    Raises:
        ConverterError: ``E_ONNX_LIBRARY`` where it or ``onnx`` is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConverterError("E_ONNX_LIBRARY", f"a library for ONNX is missing: {error.name}",
                             hint=_GET["cpu"]) from error  # fmt: skip
    return onnxruntime


def choose(wanted: str = "auto", *, strict: bool = True) -> Choice:
    """A provider that works on this machine: each candidate runs a graph of one node before it is taken.

    ONNX Runtime itself lists providers whose libraries are missing, and runs on the CPU without a word.

    Args:
        wanted: ``auto``, ``cuda``, ``tensorrt``, ``directml``, ``coreml`` or ``cpu``.
        strict: refuse where what was asked for by name does not work; otherwise fall back to the CPU and say so.

    Raises:
        ConverterError: ``E_ONNX_PROVIDER``.
    """
    if wanted != "auto" and wanted not in PROVIDERS:
        raise ConverterError("E_ONNX_PROVIDER", "there is no such provider", expected=f"auto, {', '.join(PROVIDERS)}",
                             found=wanted)  # fmt: skip
    notes: list[str] = []
    for name in _AUTO if wanted == "auto" else (wanted, "cpu"):
        reason = _why_not(name)
        if reason is None:
            used = [name, *(["cuda"] if name == "tensorrt" and _why_not("cuda") is None else []), "cpu"]
            chain = tuple(PROVIDERS[one] for one in dict.fromkeys(used))
            return Choice(wanted=wanted, provider=name, chain=chain, notes=tuple(notes))
        if wanted != "auto" and strict:
            raise ConverterError("E_ONNX_PROVIDER", f"the provider {name!r} does not work on this machine",
                                 found=reason, hint=_GET[name])  # fmt: skip
        if wanted != "auto" or name in _listed():
            notes.append(f"{name} is not used: {reason} (to get it: {_GET[name]})")
    raise ConverterError("E_ONNX_PROVIDER", "no provider works", found="; ".join(notes), hint=_GET["cpu"])


def _listed() -> list[str]:
    available = runtime().get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in available]


@cache
def _why_not(name: str) -> str | None:
    """Why a provider does not work, in one line; ``None`` where it runs a product of two matrices."""
    ort = runtime()
    if name not in _listed():
        return f"this build of ONNX Runtime ({ort.__version__}) has no {PROVIDERS[name]}"
    if name == "cpu":
        return None
    printed = io.StringIO()
    with _Stderr() as said:
        if name in {"cuda", "tensorrt"} and hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(printed):
                ort.preload_dlls()
        try:
            options = ort.SessionOptions()
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            session = ort.InferenceSession(_one_node(), options, providers=[PROVIDERS[name]], enable_fallback=0)
            working = session.get_providers()[0] == PROVIDERS[name]
            error = ""
        except Exception as problem:
            working, error = False, str(problem)
    return None if working else _reason(printed.getvalue() + said.text, error)


def _reason(said: str, error: str) -> str:
    """The line that names a missing library, else the first that says anything."""
    lines = [line.strip() for line in (said + "\n" + error).splitlines() if line.strip()]
    for words in (("cannot open shared object", ".so"), ("Failed to load library",), ("Require",)):
        for line in lines:
            if all(word in line for word in words):
                return _missing(line)
    return lines[-1][:300] if lines else "its session gives no reason"


def _missing(line: str) -> str:
    import re

    found = re.search(r"(lib[\w.-]+\.so[\w.]*): cannot open", line)
    return f"{found[1]} is missing" if found else line[:300]


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [2, 2])
    b = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2, 2])
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "a"], ["b"])], "one", [a], [b])
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return made


class _Stderr:
    """What native code writes to the process's standard error while the block runs."""

    def __enter__(self) -> Self:
        import tempfile

        self.text = ""
        self._file = tempfile.TemporaryFile()
        self._kept = os.dup(2)
        os.dup2(self._file.fileno(), 2)
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)
        self._file.seek(0)
        self.text = self._file.read().decode(errors="replace")
        self._file.close()


def open_session(
    path: str | os.PathLike[str],
    chain: Sequence[Any] = (PROVIDERS["cpu"],),
    *,
    threads: int | None = None,
    bounded: bool = False,
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        path: the graph.
        chain: providers, in order of preference, with their options.
        threads: of the CPU; by default what ``OMP_NUM_THREADS`` says, else ONNX Runtime's own choice.
        bounded: leave weights mapped from the file instead of packing copies of them: slower and smaller.

    Raises:
        ConverterError: ``E_ONNX_RUNTIME`` where ONNX Runtime refuses the graph.
    """
    ort = runtime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    count = threads or int(os.environ.get("OMP_NUM_THREADS", "0") or 0)
    if count:
        options.intra_op_num_threads = count
    if bounded:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return ort.InferenceSession(str(Path(path)), options, providers=list(chain), enable_fallback=0)
    except Exception as error:
        raise ConverterError("E_ONNX_RUNTIME", f"ONNX Runtime refuses the graph: {error}", where=path,
                             hint="export it again; another opset may help") from error  # fmt: skip
