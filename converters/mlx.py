"""LoRA of MLX-LM: a folder of ``adapters.safetensors`` and ``adapter_config.json``, with both factors transposed.

MLX keeps ``x @ lora_a @ lora_b`` with one rank and one scale for all modules, and the scale multiplies as it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys, entries_of, read_json, read_tensors, write_entries
from deltahub.converters.low_rank import padded
from deltahub.converters.packages import opened
from deltahub.converters.peft_keys import fitted
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError, TensorFileError

if TYPE_CHECKING:
    from torch import nn

    from deltahub.package import Package

__all__ = ["export_", "import_", "sniff"]

EXTENSION = "com.apple.mlx-lm"
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_MOST = 65536


def sniff(path: Path) -> bool:
    """Whether a folder is an adapter of MLX-LM: by the name of its weights and a key of its configuration."""
    try:
        return (path / WEIGHTS).is_file() and bool(
            {"lora_parameters", "fine_tune_type"} & read_json(path / CONFIG).keys()
        )
    except (ConverterError, TensorFileError, OSError):
        return False


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    class_name: str | None = None,
    overwrite: bool = False,
) -> Package:
    """Make a package out of an adapter of MLX-LM.

    Args:
        path: the adapter's folder.
        out: the package's folder.
        backbone: the model that it was trained on, in its original form: a folder, a Hub name, or the live module.
        class_name: the backbone's class; that of its configuration by default.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_CONVERT_CONFIG`` without a scale, which is never guessed; ``E_CONVERT_KIND`` for a full
            fine-tune; ``E_CONVERT_MISSING``, ``E_CONVERT_SURPLUS``, ``E_CONVERT_SHAPE``.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG)
    kind = {"lora": "lora", "dora": "dora"}.get(str(config.get("fine_tune_type", "lora")))
    if kind is None:
        raise ConverterError(
            "E_CONVERT_KIND", "this is no adapter but a fine-tuned model", where=folder / CONFIG,
            found=config.get("fine_tune_type"), hint="use `deltahub diff` on the two models",
        )  # fmt: skip
    rank, scale = _parameters(config, folder)
    tensors, _ = read_tensors(folder / WEIGHTS)
    base = Base.of(backbone, class_name=class_name)
    try:
        keys = Keys(fitted(tensors, base, folder / WEIGHTS), folder / WEIGHTS)
        entries = _entries(keys, kind, rank, scale, base)
        return write_entries(out, entries, base, extensions={EXTENSION: {"config": config}}, overwrite=overwrite)
    finally:
        base.close()


def _parameters(config: dict[str, Any], folder: Path) -> tuple[int, float]:
    values = config.get("lora_parameters")
    rank = values.get("rank") if isinstance(values, dict) else None
    scale = values.get("scale") if isinstance(values, dict) else None
    numbers = isinstance(rank, int) and isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not numbers or isinstance(rank, bool):
        raise ConverterError(
            "E_CONVERT_CONFIG", "rank or scale are missing or no numbers; they are not guessed",
            where=f"{folder / CONFIG}: lora_parameters", found=f"rank={rank!r}, scale={scale!r}"[:80],
        )  # fmt: skip
    return int(rank or 0), float(scale or 0)


def _entries(keys: Keys, kind: str, rank: int, scale: float, base: Base) -> list[Entry]:
    found = []
    for key in keys:
        path, _, last = key.rpartition(".")
        if last != "lora_a":
            continue
        down, up = keys.take(key), keys.take(f"{path}.lora_b")
        if down.ndim != 2 or up.ndim != 2 or down.shape[1] != rank or up.shape[0] != rank:
            raise ConverterError(
                "E_CONVERT_SHAPE", "a pair does not have the rank that the configuration says", where=path,
                expected=f"[in, {rank}] and [{rank}, out]", found=f"{list(down.shape)} and {list(up.shape)}",
            )  # fmt: skip
        base.arch.host(path)
        values = {"down": down.T.contiguous(), "up": up.T.contiguous()}
        if kind == "dora":
            values["magnitude"] = keys.take(f"{path}.m").reshape(-1)
        found.append(Entry(path=path, kind=kind, config={"rank": rank, "scale": scale}, tensors=values))
    keys.finish()
    return found


def export_(
    package: Package | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    approximate: int | None = None,
) -> Path:
    """Write an adapter that MLX-LM loads: one rank for all, filled up with zeros, and a scale of 1.

    Args:
        package: a package of low-rank updates.
        out: the adapter's folder, which must not exist.
        backbone: needed for approximations.
        approximate: the rank to which updates that have no low rank are cut; what is lost is logged.

    Returns:
        The folder.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with everything that MLX-LM cannot say.
    """
    from deltahub.converters.serving import low_rank_only
    from deltahub.tensors import write

    source = opened(package)
    base = None if backbone is None else Base.of(backbone)
    try:
        entries = low_rank_only(entries_of(source), base, title="MLX-LM", most=_MOST, approximate=approximate)
    finally:
        if base is not None:
            base.close()
    wrong = [entry.path for entry in entries if entry.tensors["down"].ndim != 2]
    if wrong or not entries:
        what = f"a convolution at {wrong[0]}" if wrong else "there is no low-rank update in it"
        raise ConverterError("E_CONVERT_EXPORT", "MLX-LM cannot say what this package computes", found=what)
    rank = max(int(entry.config["rank"]) for entry in entries)
    tensors = {}
    for entry in entries:
        full = padded(entry, rank).tensors
        tensors[f"{entry.path}.lora_a"] = full["down"].T.contiguous()
        tensors[f"{entry.path}.lora_b"] = full["up"].T.contiguous()
    section = source.manifest.backbone.source
    config = {
        "fine_tune_type": "lora",
        "model": section.hub if section is not None else None,
        "num_layers": -1,  # all: a module with nothing stored for it starts with a second factor of zeros
        "lora_parameters": {
            "rank": rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({_in_layer(e.path) for e in entries}),
        },
    }
    with new_folder(out) as folder:
        write(folder / WEIGHTS, tensors, metadata={"format": "mlx"})
        (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return Path(out)


def _in_layer(path: str) -> str:
    """A module as MLX's ``keys`` name it: inside its layer, or from the root where it is in none."""
    words = path.split(".")
    number = next((i for i, word in enumerate(words) if word.isdigit()), None)
    return path if number is None else ".".join(words[number + 1 :])
