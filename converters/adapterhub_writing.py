"""A package as an adapter that AdapterHub's library loads.

Its loader makes the modules that a configuration asks for and fills in what the file holds, silently leaving the rest
as it was made: so only what a configuration can say exactly is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.adapterhub_documents import PFEIFFER
from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, entries_of
from deltahub.converters.packages import opened
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError, TargetError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["export_"]

_VERSION = "adapters.1.3.0"
_FLAGS = {
    "attention.query": ("selfattn_lora", "q"),
    "attention.key": ("selfattn_lora", "k"),
    "attention.value": ("selfattn_lora", "v"),
    "mlp.up": ("intermediate_lora", None),
    "mlp.down": ("output_lora", None),
}
_SWAPPED = {"llama", "mistral"}
"""There AdapterHub calls the first layer of a feed-forward network its output, and the second intermediate."""
_LAYER = re.compile(r"\.(\d+)\.")
_TENSORS = {
    "down": "adapter_down.0.weight",
    "down_bias": "adapter_down.0.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
}


def export_(
    package: Package | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    name: str = "adapter",
) -> Path:
    """Write an adapter of AdapterHub: LoRA and (IA)³ on any model, bottlenecks on those with layers as BERT's.

    Args:
        package: a package of one of these methods.
        out: the adapter's folder, which must not exist.
        backbone: the model, whose layers tell what a configuration has to say.
        name: the adapter's name.

    Returns:
        The folder.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with what AdapterHub cannot say.
    """
    source = opened(package)
    section = source.manifest.backbone.source
    base = Base.of(backbone, class_name=section.class_ if section is not None else None)
    try:
        model: Any = base.arch.model
        config, tensors = _adapter(entries_of(source), base, name)
        document = {
            "config": config,
            "hidden_size": int(model.config.hidden_size),
            "model_class": type(model).__name__,
            "model_name": section.hub if section is not None and section.hub else "",
            "model_type": model.config.model_type,
            "name": name,
            "version": _VERSION,
        }
    finally:
        base.close()
    from deltahub.tensors import write

    with new_folder(out) as folder:
        write(folder / "adapter.safetensors", tensors, metadata={"format": "pt"})
        text = json.dumps(document, indent=2, sort_keys=True)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    return Path(out)


def _cannot(why: str, where: object = None) -> ConverterError:
    return ConverterError(
        "E_CONVERT_EXPORT",
        f"AdapterHub cannot say what this package computes: {why}",
        where=where,
        hint="merge it, or load it with DeltaHub",
    )


def _adapter(entries: Sequence[Entry], base: Base, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, and the tensors by the names of the library's own state."""
    kinds = {entry.kind for entry in entries}
    if len(kinds) != 1:
        raise _cannot("several methods at once", ", ".join(sorted(kinds)))
    if kinds <= {"lora", "ia3"}:
        return _low_rank(entries, base, name)
    if kinds <= {"adapter", str(PFEIFFER["kind"])}:
        return _bottlenecks(entries, base, name)
    raise _cannot("no method of its own", *kinds)


def _one(entries: Iterable[Entry], key: str, *, default: object = None) -> Any:
    """A config value that all sites have to share."""
    found = {entry.config.get(key, default) for entry in entries}
    if len(found) != 1:
        raise _cannot(f"{key} differs from layer to layer", ", ".join(map(str, found)))
    return found.pop()


def _low_rank(entries: Sequence[Entry], base: Base, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    scaling = entries[0].kind == "ia3"
    if _one(entries, "axis", default="out") != "out" or _one(entries, "biased", default=False):
        raise _cannot("a factor for inputs, or a bias of its own", entries[0].path)
    rank = 1 if scaling else int(_one(entries, "rank"))
    alpha = 1.0 if scaling else float(_one(entries, "scale", default=1.0)) * rank
    config: dict[str, Any] = {
        "architecture": "lora",
        "r": rank,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "composition_mode": "scale" if scaling else "add",
        "init_weights": "ia3" if scaling else "lora",
        "dropout": 0.0,
        "use_gating": False,
        "use_dora": False,
        **_flags([entry.path for entry in entries], base),
    }
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        prefix = f"{entry.path}.loras.{name}."
        if scaling:
            tensors[f"{prefix}lora_B"] = entry.tensors["gain"].reshape(-1, 1)
        else:
            tensors |= {f"{prefix}lora_A": entry.tensors["down"], f"{prefix}lora_B": entry.tensors["up"]}
    return config, tensors


def _flags(paths: Sequence[str], base: Base) -> dict[str, Any]:
    """What a configuration says to get exactly these modules."""
    from deltahub.roles import targets_of

    model: Any = base.arch.model
    modules = {path: module for path, module in model.named_modules() if path}
    left, layers = set(paths), None
    found: dict[str, Any] = {"selfattn_lora": False, "intermediate_lora": False, "output_lora": False}
    matrices: list[str] = []
    every: set[int] = set()
    swapped = dict(zip(("intermediate_lora", "output_lora"), ("output_lora", "intermediate_lora"), strict=True))
    for role, (flag, matrix) in _FLAGS.items():
        if model.config.model_type in _SWAPPED:
            flag = swapped.get(flag, flag)
        try:
            own = [target.path for target in targets_of(model, role, modules) if target.rows is None]
        except TargetError:
            continue
        numbers = {_layer(path) for path in own}
        every |= numbers
        chosen = {_layer(path) for path in own if path in left}
        left -= set(own)
        if not chosen:
            continue
        if (layers is not None and chosen != layers) or len(numbers) != len(own):
            raise _cannot("other layers for one matrix than for another", role)
        layers = chosen
        found[flag] = True
        matrices += [matrix] if matrix else []
    if left:
        raise _cannot("modules that no flag of a configuration means", ", ".join(sorted(left)))
    return {**found, "attn_matrices": matrices, "leave_out": sorted(every - (layers or set()))}


def _layer(path: str) -> int:
    numbers = _LAYER.findall(path)
    if len(numbers) != 1:
        raise _cannot("layers that are not simply numbered", path)
    return int(numbers[0])


def _bottlenecks(entries: Sequence[Entry], base: Base, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    between = entries[0].kind != "adapter"
    last = "LayerNorm" if between else "dense"
    places: dict[str, set[int]] = {"mh_adapter": set(), "output_adapter": set()}
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        root = entry.path.removesuffix(f".output.{last}")
        if root == entry.path or entry.config.get("layer_norm") or not entry.config.get("residual", True):
            raise _cannot("a bottleneck at a place, or of a form, that it does not have", entry.path)
        places["mh_adapter" if root.endswith(".attention") else "output_adapter"].add(_layer(f"{root}."))
        prefix = f"{root}.output.adapters.{name}."
        tensors |= {prefix + theirs: entry.tensors[ours] for ours, theirs in _TENSORS.items()}
    used = [layers for layers in places.values() if layers]
    if any(layers != used[0] for layers in used):
        raise _cannot("other layers after attention than after the feed-forward network")
    model: Any = base.arch.model
    hidden, inner = int(model.config.hidden_size), int(_one(entries, "bottleneck"))
    factor = hidden / inner
    if int(hidden // factor) != inner:
        raise _cannot("a width that no reduction factor gives", inner)
    activation = str(_one(entries, "activation", default="relu"))
    return {
        **{flag: bool(layers) for flag, layers in places.items()},
        "original_ln_before": between,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "ln_before": False,
        "ln_after": False,
        "is_parallel": False,
        "non_linearity": {"silu": "swish", "leaky_relu": "leakyrelu"}.get(activation, activation),
        "reduction_factor": factor,
        "scaling": float(_one(entries, "scale", default=1.0)),
        "leave_out": sorted(set(range(int(model.config.num_hidden_layers))) - used[0]),
    }, tensors
