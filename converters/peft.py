"""PEFT adapters, both ways.

Reading: every tensor of the file is taken exactly once and every module that the configuration targets is hit, or the
import fails and says which is not. Where a tensor goes is read off its own key; ``target_modules`` and the patterns for
ranks and alphas, which PEFT evaluates as regular expressions out of a stranger's file, are only compared as names.
Flags that change the arithmetic and are not known are refused, whatever PEFT does with them.

Writing: full paths as targets, one rank and alpha per module, the scale in ``lora_B`` and alpha equal to the rank,
unless the original configuration came along and still says the same: servers and converters then agree on the scale.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys, need_kind, read_json, read_tensors, write_entries
from deltahub.converters.parameters import base_values, whole
from deltahub.converters.peft_config import EXTENSION, Scales, Wanted, check_config, kept
from deltahub.converters.peft_keys import fitted, live_names
from deltahub.converters.peft_methods import METHODS, tokens
from deltahub.errors import ConverterError, TensorFileError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["export_", "import_", "named", "read_lora", "sniff"]

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

# Endings of keys, longest first, and the tensor that each is.
_LORA = {
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".base_layer.weight": "base_weight",
    ".base_layer.bias": "base_bias",
    ".token_adapter.trainable_tokens_delta": "rows",
}
_CLASSES = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "qa_outputs.weight")


def sniff(path: Path) -> bool:
    """Whether a folder is a PEFT adapter: by its configuration's one mandatory key, and its weights' name."""
    try:
        return "peft_type" in read_json(path / CONFIG) and (
            (path / WEIGHTS).exists() or (path / PICKLE).exists() or not any(path.glob("adapter_*.pt"))
        )
    except (ConverterError, TensorFileError, OSError):
        return False


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    class_name: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Package:
    """Make a package out of a PEFT adapter.

    Args:
        path: the adapter's folder.
        out: the package's folder.
        backbone: the model that it was trained on: a folder, a Hub name, or the live module; by default what the
            adapter's configuration names.
        class_name: the backbone's class, such as ``transformers.LlamaForCausalLM``; by default what the adapter's task
            says for the backbone's architecture.
        allow_pickle: read an ``adapter_model.bin``.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: with what is unknown, missing, surplus, or cannot be said in a package.
    """
    folder = Path(path)
    config = _config(folder)
    file = folder / WEIGHTS if (folder / WEIGHTS).exists() or not (folder / PICKLE).exists() else folder / PICKLE
    tensors, _ = read_tensors(file, allow_pickle=allow_pickle)
    live = live_names(tensors, file)
    if backbone is None:
        backbone = named(config)
    base = _base(backbone, config, live, class_name)
    try:
        live = fitted(live, base, file)
        entries = _READERS[str(config["peft_type"])](config, Keys(live, file), base)
        return write_entries(out, entries, base, extensions={EXTENSION: kept(config)}, overwrite=overwrite)
    finally:
        base.close()


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        inner = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        raise ConverterError(
            "E_CONVERT_CONFIG",
            "there is no adapter here",
            where=folder / CONFIG,
            found=f"adapters in the folders {', '.join(inner)}" if inner else None,
            hint="import each of them" if inner else None,
        )
    config = read_json(folder / CONFIG)
    method = config.get("peft_type")
    if method not in _READERS:
        raise ConverterError(
            "E_CONVERT_KIND",
            "no kind of delta here computes this method of PEFT",
            where=folder / CONFIG,
            expected=", ".join(sorted(_READERS)),
            found=method,
        )
    if method == "LORA":
        check_config(config, folder / CONFIG)
    return config


def named(config: Mapping[str, Any]) -> str:
    """The backbone that an adapter names, with its revision where it says one.

    Raises:
        ConverterError: ``E_CONVERT_BACKBONE`` where it names none.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ConverterError(
            "E_CONVERT_BACKBONE",
            "the adapter does not say which model it was trained on",
            where=f"{CONFIG}: base_model_name_or_path",
            hint="pass the backbone",
        )
    return f"{name}@{revision}" if isinstance(revision, str) and not Path(name).is_dir() else name


def _base(
    backbone: nn.Module | str | os.PathLike[str],
    config: Mapping[str, Any],
    live: Mapping[str, Tensor],
    class_name: str | None,
) -> Base:
    if not isinstance(backbone, (str, os.PathLike)):
        return Base.of_module(backbone)
    plain = Base.of_folder(backbone, class_name=class_name)
    wanted = class_name or _class(config, plain)
    settings = _labels(config, plain, live)
    if wanted == plain.source["class"] and not settings:
        return plain
    plain.close()
    return Base.of_folder(backbone, class_name=wanted, settings=settings)


def _class(config: Mapping[str, Any], plain: Base) -> str:
    """The class that the adapter was trained on: as it was recorded, or as its task says."""
    from deltahub.backbones.files import read_json as backbone_json

    auto = config.get("auto_mapping")
    if isinstance(auto, dict) and str(auto.get("parent_library", "")).startswith("transformers."):
        return f"transformers.{auto.get('base_model_class')}"
    table = _CLASSES.get(str(config.get("task_type")))
    assert plain.files is not None
    if table is None or not plain.source["class"].startswith("transformers."):
        return str(plain.source["class"])
    from transformers.models.auto import modeling_auto

    model_type = backbone_json(plain.files.folder / "config.json").get("model_type")
    found = getattr(modeling_auto, table).get(model_type)
    return str(plain.source["class"]) if found is None else f"transformers.{found}"


def _labels(config: Mapping[str, Any], plain: Base, live: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A classification head of another size than the backbone's configuration gives: a setting."""
    from deltahub.backbones.files import read_json as backbone_json

    if config.get("task_type") not in {"SEQ_CLS", "TOKEN_CLS"}:
        return []
    sizes = {value.shape[0] for name, value in live.items() if name.endswith(_HEADS) and value.ndim == 2}
    assert plain.files is not None
    document = backbone_json(plain.files.folder / "config.json")
    was = document.get("num_labels", len(document.get("id2label") or (0, 0)))
    if len(sizes) != 1 or sizes == {was}:
        return []
    return [{"on": "config", "path": "num_labels", "was": was, "value": sizes.pop()}]


def read_lora(config: Mapping[str, Any], keys: Keys, base: Base) -> list[Entry]:
    """All sites of a LoRA, each key taken once.

    Raises:
        ConverterError: as :func:`import_`.
    """
    sites: dict[str, dict[str, Tensor]] = {}
    plain: list[str] = []
    for key in keys:
        ending = next((end for end in _LORA if key.endswith(end)), None)
        if ending is None:
            plain.append(key)
        else:
            part = sites.setdefault(key.removesuffix(ending), {})
            if _LORA[ending] in part:
                raise ConverterError("E_CONVERT_KEY", "two keys are one tensor", where=keys.where, found=key)
            part[_LORA[ending]] = keys.take(key)
    scales = Scales(config)
    entries: list[Entry] = []
    adapted: list[str] = []
    for path, part in sites.items():
        if "rows" in part:
            entries.append(tokens(path, part.pop("rows"), _places(config, path)))
        if not part.keys() & {"a", "b", "embedding_a", "embedding_b", "b_bias", "magnitude"}:
            entries += base_values(path, part, base)
            continue
        adapted.append(path)
        entries += base_values(path, part, base)
        entries.append(_lora_entry(path, part, scales, base, keys.where))
    entries += whole(plain, keys, base)
    keys.finish()
    scales.finish(adapted)
    Wanted(config, base).check(adapted, keys.where)
    return sorted(entries, key=lambda entry: entry.kind == "lora")  # what is set comes before what is added


def _places(config: Mapping[str, Any], path: str) -> object:
    """The rows that single tokens have, for the embedding at a path; a plain list is for the one there is."""
    table = config.get("trainable_token_indices")
    if isinstance(table, dict):
        return next((rows for name, rows in table.items() if path == name or path.endswith(f".{name}")), None)
    return table


def _lora_entry(path: str, part: dict[str, Tensor], scales: Scales, base: Base, where: object) -> Entry:
    embedded = "embedding_a" in part or "embedding_b" in part
    first, second = ("embedding_a", "embedding_b") if embedded else ("a", "b")
    for name in (first, second):
        if name not in part:
            raise ConverterError(
                "E_CONVERT_MISSING", f"half of a low-rank pair is missing ({name[-1].upper()})", where=where, found=path
            )
    down, up = part[first], part[second]
    rank = int(down.shape[0]) if down.ndim else 0
    grouped = up.ndim >= 2 and up.shape[1] != rank
    if up.ndim < 2 or grouped or up[0, 0].numel() != 1:
        raise ConverterError(
            "E_CONVERT_SHAPE",
            "the pair is not one of low rank" if not grouped else "the two ranks of a pair differ",
            where=f"{where}: {path}",
            expected=f"[out, {rank}]",
            found=list(up.shape),
        )
    tensors = {"down": down, "up": up.reshape(up.shape[0], rank)}
    scale = scales.of(path, rank)
    values: dict[str, Any] = {"rank": rank, "scale": scale}
    if "b_bias" in part:
        values["biased"] = True
        tensors["bias"] = part["b_bias"]
    if "magnitude" in part:
        need_kind("dora", "DoRA")
        tensors["magnitude"] = part["magnitude"].reshape(-1)
        return Entry(path=path, kind="dora", config=values, tensors=tensors)
    base.arch.host(path)
    return Entry(path=path, kind="lora", config=values, tensors=tensors)


_READERS: Mapping[str, Callable[[Mapping[str, Any], Keys, Base], list[Entry]]] = {
    "LORA": read_lora,
    **{name: method.read for name, method in METHODS.items()},
}


def export_(package: Package | str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Path:
    """Make a PEFT adapter out of a package; see :func:`deltahub.converters.peft_writing.export_` for the options."""
    from deltahub.converters.peft_writing import export_ as write

    return write(package, out, **options)
