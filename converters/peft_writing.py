"""A package as a PEFT adapter that PEFT itself, vLLM, LoRAX and TGI load."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, entries_of
from deltahub.converters.packages import opened
from deltahub.converters.peft_config import EXTENSION, Scales
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["export_"]

_PREFIX = "base_model.model."
_VERSION = "0.21.2"
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_OWN_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def export_(
    package: Package | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str] | None = None,
    bake: bool | None = None,
    target: str | None = None,
    approximate: int | None = None,
) -> Path:
    """Write a PEFT adapter.

    Args:
        package: a package of LoRA, of modules set as a whole, and of biases.
        out: the adapter's folder, which must not exist.
        backbone: needed for embeddings, convolutions and biases, and to be sure that no target means a second module.
        bake: multiply the scale into ``lora_B`` and write alpha = rank. By default this is done unless all scales come
            out of the configuration that the package was imported with.
        target: a server that shall take it: ``vllm``, ``lorax``, ``tgi`` or ``trtllm``. What it would refuse or drop is
            refused, scales are multiplied in, and ranks filled up with zeros where it wants one for all.
        approximate: for a server: the rank to which updates that have no low rank are cut; what is lost is logged.

    Returns:
        The folder.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with everything that PEFT, or the server, cannot say.
    """
    from deltahub.converters.serving import for_engine

    source = opened(package)
    manifest = source.manifest
    base = None
    if backbone is not None:
        section = manifest.backbone.source
        settings = [s.model_dump() for s in manifest.settings or () if s.on == "config"]
        base = Base.of(backbone, class_name=section.class_ if section is not None else None, settings=settings)
    try:
        entries = entries_of(source)
        if target is not None:
            entries, bake = for_engine(target, entries, base, approximate=approximate), True
        config, tensors = _adapter(source, entries, base, bake=bake)
    finally:
        if base is not None:
            base.close()
    from deltahub.tensors import write

    with new_folder(out) as folder:
        write(folder / "adapter_model.safetensors", tensors, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return Path(out)


@dataclass(kw_only=True)
class _Parts:
    """A package's sites by what PEFT makes of them."""

    lora: dict[str, Entry] = field(default_factory=dict)
    saved: dict[str, Entry] = field(default_factory=dict)
    bias: dict[str, Entry] = field(default_factory=dict)


def _sorted_parts(entries: Iterable[Entry]) -> _Parts:
    parts, wrong = _Parts(), []
    places: Mapping[str, dict[str, Entry]] = {"lora": parts.lora, "dora": parts.lora, "assign": parts.saved}
    for entry in entries:
        place = parts.bias if entry.kind == "bias" else places.get(entry.kind)
        if place is None:
            wrong.append(f"{entry.kind} at {entry.path}: PEFT has no such method")
        elif entry.path in place:
            wrong.append(f"{entry.kind} at {entry.path}: twice on one module")
        else:
            place[entry.path] = entry
    wrong += [
        f"assign and lora at {path}: the one beneath the other" for path in parts.saved.keys() & parts.lora.keys()
    ]
    kinds = {entry.kind for entry in parts.lora.values()}
    biased = {bool(entry.config.get("biased")) for entry in parts.lora.values()}
    if len(kinds) > 1:
        wrong.append("lora and dora: an adapter is of one of them")
    if len(biased) > 1:
        wrong.append("lora with and without a bias of its own")
    if not parts.lora:
        wrong.append("no low-rank update: PEFT has nothing to target")
    if wrong:
        raise _cannot(wrong)
    return parts


def _cannot(reasons: Sequence[str]) -> ConverterError:
    return ConverterError(
        "E_CONVERT_EXPORT",
        "PEFT cannot say what this package computes",
        found=reasons[0],
        hint="merge it, or load it with DeltaHub",
        also=tuple(reasons[1:]),
    )


def _adapter(
    source: Package, entries: Sequence[Entry], base: Base | None, *, bake: bool | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    parts = _sorted_parts(entries)
    _check_targets([*parts.lora, *parts.saved], base)
    config = _fresh(source, parts)
    known = _original(source, parts)
    if known is not None and not bake:
        config |= known
        baked = False
    elif bake is False:
        baked = False
        config["lora_alpha"], config["alpha_pattern"] = _spread(
            {path: entry.config["scale"] * entry.config["rank"] for path, entry in parts.lora.items()}
        )
    else:
        baked = True
        config["lora_alpha"], config["alpha_pattern"] = config["r"], dict(config["rank_pattern"])
    tensors: dict[str, Tensor] = {}
    for path, entry in parts.lora.items():
        tensors |= _lora_tensors(path, entry, base, baked=baked)
    for path, entry in parts.saved.items():
        tensors |= _saved_tensors(path, entry, base)
    if parts.bias:
        config["bias"], more = _biases(parts, base)
        tensors |= more
    return config, {f"{_PREFIX}{name}": value.contiguous() for name, value in tensors.items()}


def _check_targets(paths: Sequence[str], base: Base | None) -> None:
    """PEFT takes a name to mean every module that ends in it."""
    if base is None:
        return
    names = [name for name, _ in base.arch.model.named_modules()]
    wrong = [f"{p}: PEFT would also take {n}" for p in paths for n in names if n != p and n.endswith(f".{p}")]
    if wrong:
        raise _cannot(wrong)


def _pattern(path: str) -> str:
    return "^" + re.escape(path)


def _spread(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and a pattern for every module that has another one."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {_pattern(path): value for path, value in values.items() if value != common}


def _fresh(source: Package, parts: _Parts) -> dict[str, Any]:
    rank, ranks = _spread({path: entry.config["rank"] for path, entry in parts.lora.items()})
    section = source.manifest.backbone.source
    class_name = (section.class_ if section is not None else None) or ""
    task = next((task for ending, task in _TASKS.items() if class_name.endswith(ending)), None)
    heads = _OWN_HEADS.get(task or "", ())
    # PEFT takes a head to be part of an adapter of these tasks; where it is not, the task must not be named.
    if heads and not any(path.split(".")[0] in heads or path in heads for path in parts.saved):
        task = None
    first = next(iter(parts.lora.values()))
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": section.hub if section is not None else None,
        "revision": section.commit if section is not None else None,
        "peft_version": _VERSION,
        "inference_mode": True,
        "r": rank,
        "rank_pattern": ranks,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": first.kind == "dora",
        "lora_bias": bool(first.config.get("biased")),
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "target_modules": sorted(parts.lora),
        "modules_to_save": sorted(parts.saved) or None,
    }


def _original(source: Package, parts: _Parts) -> dict[str, Any] | None:
    """Alphas as they were spelled when the package was imported, if they still give every scale exactly."""
    section = (source.manifest.extensions or {}).get(EXTENSION)
    config = section.get("config") if isinstance(section, dict) else None
    keys = ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora")
    if not isinstance(config, dict) or not all(key in config for key in keys):
        return None
    try:
        scales = Scales(config)
        if any(scales.of(path, entry.config["rank"]) != entry.config["scale"] for path, entry in parts.lora.items()):
            return None
    except (DeltaHubError, TypeError):
        return None
    return {key: config[key] for key in keys}


def _lora_tensors(path: str, entry: Entry, base: Base | None, *, baked: bool) -> dict[str, Tensor]:
    down, up = entry.tensors["down"], entry.tensors["up"]
    bias = entry.tensors.get("bias")
    scale = entry.config["scale"]
    if baked and scale != 1.0:
        up = _scaled(up, scale)
        bias = None if bias is None else _scaled(bias, scale)
    family = base.arch.host(path).shape.family if base is not None else "linear"
    if base is None and down.ndim == 2 and path.rpartition(".")[2] in {"wte", "wpe", "embed_tokens", "word_embeddings"}:
        raise _cannot([f"{path}: pass the backbone, to tell an embedding from a linear layer"])
    if family == "embedding":
        return {f"{path}.lora_embedding_A": down, f"{path}.lora_embedding_B": up}
    up = up.reshape(*up.shape, *(1,) * (down.ndim - 2))
    found = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    if bias is not None:
        found[f"{path}.lora_B.bias"] = bias
    if "magnitude" in entry.tensors:
        found[f"{path}.lora_magnitude_vector"] = entry.tensors["magnitude"]
    return found


def _scaled(value: Tensor, scale: float) -> Tensor:
    return (value.double() * scale).to(value.dtype)


def _saved_tensors(path: str, entry: Entry, base: Base | None) -> dict[str, Tensor]:
    weight = entry.tensors["weight"]
    if base is not None:
        weight = base.arch.host(path).view.stored(weight)
    found = {f"{path}.weight": weight}
    if "bias" in entry.tensors:
        found[f"{path}.bias"] = entry.tensors["bias"]
    return found


def _biases(parts: _Parts, base: Base | None) -> tuple[str, dict[str, Tensor]]:
    """Biases as the whole values that PEFT stores: those of the targeted modules, or all of the model."""
    if base is None:
        raise _cannot(["biases: pass the backbone, for PEFT stores them whole"])
    own = {n.removesuffix(".bias") for n, _ in base.arch.model.named_parameters() if n.endswith(".bias")}
    own -= parts.saved.keys()
    if set(parts.bias) <= set(parts.lora) & own:
        mode, paths = "lora_only", set(parts.lora) & own
    elif set(parts.bias) <= own:
        mode, paths = "all", own
    else:
        raise _cannot([f"a new bias at {path}" for path in sorted(set(parts.bias) - own)])
    found: dict[str, Tensor] = {}
    for path in sorted(paths):
        value = base.value(f"{path}.bias")
        assert value is not None
        if path in parts.bias:
            entry = parts.bias[path]
            value = (value.double() + entry.config["scale"] * entry.tensors["value"].double()).to(value.dtype)
        found[f"{path}.base_layer.bias" if path in parts.lora else f"{path}.bias"] = value
    return mode, found
