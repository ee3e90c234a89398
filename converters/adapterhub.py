"""AdapterHub checkpoints: a folder of ``adapter_config.json`` and ``adapter.safetensors`` or a pickle.

The adapter's name is in every key, and a model with a head puts its prefix before all of them. What a bottleneck
computes depends on five flags; the usual one (Pfeiffer) lets the layer's own norm run twice, which is a function of
that norm: its kind document travels with the package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys, read_json, read_tensors, write_entries
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["PFEIFFER", "import_", "sniff"]

EXTENSION = "ml.adapterhub"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"

PFEIFFER: Mapping[str, Any] = {
    "kind": "ml.adapterhub.pfeiffer",
    "version": 1,
    "title": "A bottleneck between two runs of a layer's own norm",
    "reference": "arXiv:2005.00247",
    "hosts": ["norm"],
    "config": {
        "bottleneck": {"type": "integer", "minimum": 1},
        "activation": {"type": "string", "default": "relu"},
        "scale": {"type": "number", "default": 1.0},
    },
    "tensors": {
        "down": {"shape": ["bottleneck", "out"], "init": "kaiming_uniform"},
        "down_bias": {"shape": ["bottleneck"], "init": "zeros"},
        "up": {"shape": ["out", "bottleneck"], "init": "zeros"},
        "up_bias": {"shape": ["out"], "init": "zeros"},
    },
    "equations": {
        "replace": (
            "h = linear(activation(linear(base(x), down, down_bias), activation), up, up_bias)\nbase(x + scale * h)"
        )
    },
}
"""x is the sum of a sublayer's output and its residual; out = norm(x + up(act(down(norm(x)))))."""

_KEY = re.compile(r"(?P<path>.+)\.(?P<type>loras|adapters)\.(?P<adapter>[^.]+)\.(?P<name>.+)")
# Flags of a bottleneck: (before the norm, the norm runs before the adapter, it runs after) and what that is.
_FLAGS = ("residual_before_ln", "original_ln_before", "original_ln_after")
_REFUSED = {
    "cross_adapter": "a second adapter in cross-attention",
    "inv_adapter": "an invertible adapter on the embeddings",
    "is_parallel": "it reads the residual, which is no input of the module it is added to",
    "ln_after": "a norm of its own after it",
    "ln_before": "a norm of its own before it",
    "phm_layer": "hypercomplex layers, whose shared rule such a file may lack",
    "adapter_residual_before_ln": "the residual of the adapter is added elsewhere",
    "use_gating": "a learned gate",
}


def sniff(path: Path) -> bool:
    """Whether a folder is an AdapterHub adapter: PEFT's configuration has the same name and other keys."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return {"config", "model_type", "name"} <= read_json(path / CONFIG).keys()
    except ConverterError:
        return False


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    class_name: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Package:
    """Make a package out of an AdapterHub adapter.

    Args:
        path: the adapter's folder.
        out: the package's folder.
        backbone: the model that it was trained on.
        class_name: its class; by default that of its configuration.
        allow_pickle: read a ``pytorch_adapter.bin`` where there is no ``adapter.safetensors``.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: with what is unknown, missing, surplus, or cannot be said in a package.
    """
    folder = Path(path)
    document = read_json(folder / CONFIG)
    config = document.get("config")
    if not isinstance(config, dict):
        raise ConverterError("E_CONVERT_CONFIG", "this configuration has no method", where=folder / CONFIG)
    file = folder / WEIGHTS if (folder / WEIGHTS).exists() else folder / PICKLE
    base = Base.of(backbone, class_name=class_name)
    try:
        method = _method(config, folder / CONFIG)
        tensors, _ = read_tensors(file, allow_pickle=allow_pickle)
        entries = method(config, Keys(tensors, file), base)
        kept = {EXTENSION: {"config": document}}
        return write_entries(out, entries, base, extensions=kept, overwrite=overwrite)
    finally:
        base.close()


def _method(config: Mapping[str, Any], where: object) -> Any:
    name = config.get("architecture") or ("bottleneck" if "reduction_factor" in config else None)
    if name not in _METHODS:
        raise ConverterError(
            "E_CONVERT_KIND",
            "no kind of delta here computes this method of AdapterHub",
            where=where,
            expected=", ".join(_METHODS),
            found=name,
        )
    return _METHODS[name]


def _parts(keys: Keys, base: Base, kind: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by the live path that they hang under; all of one adapter."""
    found: dict[str, dict[str, Tensor]] = {}
    adapters: set[str] = set()
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None or match["type"] != kind:
            continue
        adapters.add(match["adapter"])
        found.setdefault(_live(match["path"], base), {})[match["name"]] = keys.take(key)
    keys.finish()
    if len(adapters) > 1:
        raise ConverterError(
            "E_CONVERT_KEY", "the file holds several adapters", where=keys.where, found=", ".join(sorted(adapters))
        )
    return found


def _live(path: str, base: Base) -> str:
    """A path with the prefix of the base model added or taken away, whichever is a module."""
    names = {name for name, _ in base.arch.model.named_modules()}
    prefix = str(getattr(base.arch.model, "base_model_prefix", "") or "")
    for one in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")):
        if one in names:
            return one
    raise ConverterError("E_CONVERT_TARGET", "the backbone has no such module", where=path)


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConverterError("E_CONVERT_CONFIG", f"{key} is missing or no number", found=value)
    return float(value)


def _lora(config: Mapping[str, Any], keys: Keys, base: Base) -> list[Entry]:
    if config.get("use_gating") or config.get("vera_b") is not None or config.get("vera_d") is not None:
        raise ConverterError("E_CONVERT_UNSUPPORTED", "a gate, or matrices that are not in the file", where=keys.where)
    entries = []
    for path, part in _parts(keys, base, "loras").items():
        if config.get("composition_mode") == "scale":
            entries.append(_ia3(path, part))
            continue
        if not {"lora_A", "lora_B"} <= part.keys() <= {"lora_A", "lora_B", "m.weight"}:
            raise ConverterError("E_CONVERT_MISSING", "this is no low-rank pair", where=path, found=sorted(part))
        down, up = part["lora_A"], part["lora_B"]
        rank = int(down.shape[0])
        if rank != config.get("r"):
            raise ConverterError(
                "E_CONVERT_RANK", "the tensors have another rank", where=path, expected=config.get("r"), found=rank
            )
        values = {"rank": rank, "scale": _number(config, "alpha") / rank}
        tensors = {"down": down, "up": up}
        if "m.weight" in part:
            entries.append(
                Entry(
                    path=path,
                    kind="dora",
                    config=values,
                    tensors={**tensors, "magnitude": part["m.weight"].reshape(-1)},
                )
            )
        else:
            entries.append(Entry(path=path, kind="lora", config=values, tensors=tensors))
    return entries


def _ia3(path: str, part: Mapping[str, Tensor]) -> Entry:
    """A multiplier of the output, bias included; 1 leaves it as it is."""
    if part.keys() != {"lora_B"} or part["lora_B"].shape[1:] != (1,):
        raise ConverterError("E_CONVERT_SHAPE", "this is no vector of multipliers", where=path, found=sorted(part))
    return Entry(path=path, kind="ia3", config={"axis": "out"}, tensors={"gain": part["lora_B"].reshape(-1)})


def _bottleneck(config: Mapping[str, Any], keys: Keys, base: Base) -> list[Entry]:
    for key, why in _REFUSED.items():
        if config.get(key):
            raise ConverterError("E_CONVERT_UNSUPPORTED", f"{key}: {why}", where=keys.where, found=config[key])
    flags = tuple(bool(config.get(flag)) for flag in _FLAGS)
    if not flags[2]:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "the layer's own norm does not run after the adapter",
            where=keys.where,
            found=flags,
        )
    between = flags[1]  # the layer's own norm runs before the adapter too
    if between and not flags[0]:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED", "the residual is taken after the first norm", where=keys.where, found=flags
        )
    entries = []
    for path, part in _parts(keys, base, "adapters").items():
        names = {"adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias"}
        if part.keys() != names:
            raise ConverterError(
                "E_CONVERT_MISSING",
                "this is no plain bottleneck",
                where=path,
                found=sorted(part),
                expected=sorted(names),
            )
        values = {
            "bottleneck": int(part["adapter_down.0.weight"].shape[0]),
            "activation": {"swish": "silu"}.get(str(config.get("non_linearity")), str(config.get("non_linearity"))),
            "scale": _number(config, "scaling"),
        }
        tensors = {
            "down": part["adapter_down.0.weight"],
            "down_bias": part["adapter_down.0.bias"],
            "up": part["adapter_up.weight"],
            "up_bias": part["adapter_up.bias"],
        }
        if between:
            place = _child(path, base, "norm")
            entries.append(
                Entry(path=place, kind=str(PFEIFFER["kind"]), config=values, tensors=tensors, document=PFEIFFER)
            )
        else:
            entries.append(Entry(path=_child(path, base, "linear"), kind="adapter", config=values, tensors=tensors))
    return entries


def _child(path: str, base: Base, family: str) -> str:
    """The one norm, or the one linear layer, of the module that an adapter hangs under."""
    inner = [
        f"{path}.{name}"
        for name, _ in base.arch.model.get_submodule(path).named_children()
        if base.arch.host(f"{path}.{name}").shape.family == family
    ]
    if len(inner) != 1:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            f"the adapter's module has {len(inner)} layers of the family {family}, so its place is not known",
            where=path,
            found=", ".join(inner) or None,
        )
    return inner[0]


_METHODS = {"bottleneck": _bottleneck, "lora": _lora}
