"""LoRA files of llama.cpp: GGUF with ``<tensor>.lora_a`` and ``<tensor>.lora_b``, as the `gguf` package names them.

llama.cpp has one alpha for a whole file and takes the rank from each pair. An alpha of 0 means that nothing is scaled:
scales go into the second factor then, so every module may have its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, entries_of, write_entries
from deltahub.converters.heads import halves, heads_of, pairs
from deltahub.converters.naming import tables
from deltahub.converters.packages import opened
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["export_", "import_", "sniff"]

EXTENSION = "org.ggml.llama-cpp"
_MOST = 65536
_MAGIC = b"GGUF"


def sniff(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    from deltahub.tensors import open_regular

    if path.suffix != ".gguf" or not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(4) == _MAGIC


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConverterError(
            "E_CONVERT_LIBRARY", "the library for this format is not installed", expected="gguf",
            hint="pip install 'deltahub[gguf]'",
        ) from None  # fmt: skip
    return gguf


def _names(gguf: Any, base: Base) -> tuple[str, bool, dict[str, str]]:
    """The architecture, whether queries and keys are permuted, and llama.cpp's name of each of our modules."""
    config: Any = getattr(base.arch.model, "config", None)
    kind = str(getattr(config, "model_type", None))
    known: Mapping[str, Mapping[str, Any]] = tables()["gguf"]["architectures"]
    if kind not in known:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED", "how llama.cpp lays this model out is not known here", where="backbone",
            expected=", ".join(known), found=kind, hint="merge the package, and convert the model with llama.cpp",
        )  # fmt: skip
    name = str(known[kind]["name"])
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, int(config.num_hidden_layers))
    found = {}
    for path, _ in base.arch.model.named_modules():
        theirs = table.get_name(path) if path else None
        if theirs is not None:
            found[path] = str(theirs)
    return name, bool(known[kind]["permuted"]), found


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    class_name: str | None = None,
    overwrite: bool = False,
) -> Package:
    """Make a package out of a LoRA of llama.cpp.

    Args:
        path: the file.
        out: the package's folder.
        backbone: the model that it was trained on, in its original form: a folder, a Hub name, or the live module.
        class_name: the backbone's class; that of its configuration by default.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_CONVERT_LIBRARY`` without the ``gguf`` package; ``E_CONVERT_CONFIG`` where it is no LoRA,
            for another architecture, or says no alpha; ``E_CONVERT_TARGET``, ``E_CONVERT_MISSING``,
            ``E_CONVERT_SHAPE``, ``E_CONVERT_VALUES``.
    """
    gguf = _library()
    fields, tensors = _read(gguf, Path(path))
    base = Base.of(backbone, class_name=class_name)
    try:
        name, permuted, names = _names(gguf, base)
        said = fields.get("general.architecture")
        if said != name:
            raise ConverterError(
                "E_CONVERT_CONFIG", "the file is for another architecture", where=path, expected=name, found=said
            )
        ours = {theirs: own for own, theirs in names.items()}
        entries = _entries(tensors, float(fields["adapter.lora.alpha"]), ours, base, permuted=permuted, where=path)
        kept = {EXTENSION: {"alpha": float(fields["adapter.lora.alpha"])}}
        return write_entries(out, entries, base, extensions=kept, overwrite=overwrite)
    finally:
        base.close()


def _read(gguf: Any, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import numpy as np
    import torch

    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        raw = {str(one.name): (one.tensor_type, one.data) for one in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError, OverflowError, UnicodeDecodeError, TypeError) as error:
        raise ConverterError("E_CONVERT_CONFIG", f"this is no whole GGUF file: {error}", where=path) from None
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise ConverterError(
            "E_CONVERT_CONFIG", "this is no LoRA", where=path, expected="general.type=adapter, adapter.type=lora",
            found=f"{fields.get('general.type')}, {fields.get('adapter.type')}",
        )  # fmt: skip
    if not isinstance(fields.get("adapter.lora.alpha"), (int, float)):
        raise ConverterError("E_CONVERT_CONFIG", "alpha is missing; it is not guessed", where=path)
    tensors = {}
    for name, (kind, data) in raw.items():
        if kind.name not in {"F32", "F16"}:
            raise ConverterError(
                "E_CONVERT_UNSUPPORTED", "a tensor is quantised", where=path, found=f"{name}: {kind.name}",
                hint="use the file before it was quantised",
            )  # fmt: skip
        value = torch.from_numpy(np.array(data))
        if not bool(value.isfinite().all()):
            raise ConverterError("E_CONVERT_VALUES", "a tensor holds NaN or infinity", where=path, found=name)
        tensors[name] = value
    return fields, tensors


def _entries(
    tensors: Mapping[str, Tensor], alpha: float, ours: Mapping[str, str], base: Base, *, permuted: bool, where: object
) -> list[Entry]:
    found, taken = [], set()
    for name, down in tensors.items():
        stem = name.removesuffix(".lora_a")
        if stem == name:
            continue
        path, up = ours.get(stem.removesuffix(".weight")), tensors.get(f"{stem}.lora_b")
        if path is None:
            raise ConverterError("E_CONVERT_TARGET", "the backbone has no such tensor", where=where, found=name)
        if up is None:
            raise ConverterError("E_CONVERT_MISSING", "half of a pair is missing", where=where, found=f"{stem}.lora_b")
        if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ConverterError(
                "E_CONVERT_SHAPE", "the pair is not one of low rank", where=f"{where}: {stem}",
                found=f"{list(down.shape)} and {list(up.shape)}",
            )  # fmt: skip
        taken |= {name, f"{stem}.lora_b"}
        heads = heads_of(base.arch.model, path) if permuted else 0
        rank = int(down.shape[0])
        up = halves(up, heads) if heads else up
        scale = alpha / rank if alpha else 1.0
        values = {"down": down, "up": up.contiguous()}
        found.append(Entry(path=path, kind="lora", config={"rank": rank, "scale": scale}, tensors=values))
    left = sorted(tensors.keys() - taken)
    if left:
        raise ConverterError(
            "E_CONVERT_SURPLUS", "tensors of no known use", where=where, found=left[0], also=tuple(left[1:])
        )
    return found


def export_(
    package: Package | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    dtype: str = "float32",
    approximate: int | None = None,
) -> Path:
    """Write a LoRA that llama.cpp loads with ``--lora``.

    Args:
        package: a package of low-rank updates of linear layers.
        out: the file, which must not exist.
        backbone: tells the architecture, the names and the heads.
        dtype: ``float32`` or ``float16``.
        approximate: the rank to which updates that have no low rank are cut; what is lost is logged.

    Returns:
        The file.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with everything that llama.cpp cannot say, or would skip;
            ``E_MERGE_NONFINITE`` where a value is too large for the dtype.
    """
    from deltahub.converters.serving import low_rank_only

    gguf = _library()
    source, target = opened(package), Path(out)
    if target.exists():
        raise ConverterError("E_MERGE_OUTPUT", "there is something here already", where=target)
    base = Base.of(backbone)
    try:
        name, permuted, names = _names(gguf, base)
        entries = low_rank_only(entries_of(source), base, title="llama.cpp", most=_MOST, approximate=approximate)
        wrong = [f"{e.path}: llama.cpp has no such linear layer" for e in entries if not _serves(e, names, base)]
        if wrong or not entries:
            raise ConverterError(
                "E_CONVERT_EXPORT", "llama.cpp cannot serve what this package computes",
                found=wrong[0] if wrong else "there is no low-rank update in it", also=tuple(wrong[1:]),
                hint="merge the package into its backbone and convert that",
            )  # fmt: skip
        tensors: dict[str, Tensor] = {}
        for entry in entries:
            heads = heads_of(base.arch.model, entry.path) if permuted else 0
            up = entry.tensors["up"]
            tensors[f"{names[entry.path]}.weight.lora_a"] = _cast(entry.tensors["down"], dtype, entry.path)
            tensors[f"{names[entry.path]}.weight.lora_b"] = _cast(pairs(up, heads) if heads else up, dtype, entry.path)
    finally:
        base.close()
    _write(gguf, target, name, tensors)
    return target


def _serves(entry: Entry, names: Mapping[str, str], base: Base) -> bool:
    return entry.path in names and base.arch.host(entry.path).shape.family == "linear"


def _cast(value: Tensor, dtype: str, path: str) -> Tensor:
    import torch

    if dtype not in {"float32", "float16"}:
        raise ConverterError("E_MERGE_DTYPE", "not a dtype of such files", expected="float32, float16", found=dtype)
    made = value.to(getattr(torch, dtype))
    if not bool(made.isfinite().all()):
        raise ConverterError("E_MERGE_NONFINITE", "a value is too large for this dtype", where=path, found=dtype)
    return made.contiguous()


def _write(gguf: Any, target: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    import secrets

    beside = target.with_name(f".{target.name[:64]}.{secrets.token_hex(6)}.part")
    writer = gguf.GGUFWriter(str(beside), name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 0.0)
        for key in sorted(tensors):
            writer.add_tensor(key, tensors[key].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        beside.rename(target)
    except OSError as error:
        raise ConverterError("E_MERGE_OUTPUT", f"the file cannot be written: {error}", where=target) from error
    finally:
        writer.close()
        beside.unlink(missing_ok=True)
