"""OpenDelta checkpoints: a folder of ``config.json`` and a pickled ``pytorch_model.bin``.

Where a delta sits is read off the keys, never out of ``modified_modules``: that list was resolved by a table of renames
that changed between versions. ``backbone_hash`` is an MD5 over a model's printed form with the delta in it, which
nobody can compute from the backbone; it is kept and not used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys, read_json, read_tensors, write_entries
from deltahub.converters.parameters import whole
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["import_", "sniff"]

EXTENSION = "org.thunlp.opendelta"
CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
_ACTIVATIONS = {"gelu_orig": "gelu", "leakyrelu": "leaky_relu", "swish": "silu"}
# A delta's name in a key, with the number that a second one of the same name has.
_PART = re.compile(
    r"(?P<path>.+)\.(?P<type>lora|adapter|parallel_adapter|low_rank_adapter|compactor|bitfit)(?P<number>_\d+)?\.(?P<name>.+)"
)
_OLD_LORA = re.compile(r"(?P<path>.+)\.(?P<name>lora_[AB])")


def sniff(path: Path) -> bool:
    """Whether a folder is an OpenDelta checkpoint: by the keys that its configuration always has."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return {"delta_type", "opendelta_version"} <= read_json(path / CONFIG).keys()
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
    """Make a package out of an OpenDelta checkpoint.

    Args:
        path: the checkpoint's folder.
        out: the package's folder.
        backbone: the model that it was trained on.
        class_name: its class; by default the one that the checkpoint names.
        allow_pickle: needed, for OpenDelta writes nothing but pickles; they are read without running code.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: with what is unknown, missing, surplus, or cannot be said in a package.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG)
    tensors, _ = read_tensors(folder / WEIGHTS, allow_pickle=allow_pickle)
    named = config.get("backbone_class")
    if class_name is None and isinstance(named, str) and named:
        class_name = f"transformers.{named}"
    base = Base.of(backbone, class_name=class_name)
    try:
        entries = _entries(config, Keys(tensors, folder / WEIGHTS), base)
        kept = {EXTENSION: {"config": config}}
        return write_entries(out, entries, base, extensions=kept, overwrite=overwrite)
    finally:
        base.close()


def _entries(config: Mapping[str, Any], keys: Keys, base: Base) -> list[Entry]:
    parts: dict[tuple[str, str, str], dict[str, Tensor]] = {}
    plain: list[str] = []
    for key in keys:
        found = _PART.fullmatch(key) or _OLD_LORA.fullmatch(key)
        if found is None:
            _check_prompt(key, keys.where)
            plain.append(key)
            continue
        groups = found.groupdict()
        place = (groups["path"], groups.get("type") or "lora", groups.get("number") or "")
        parts.setdefault(place, {})[groups["name"]] = keys.take(key)
    entries = whole([key for key in plain if not _new_bias(key, base)], keys, base)
    for key in plain:
        if key in keys and _new_bias(key, base):
            entries.append(_added(key.removesuffix(".bias"), keys.take(key)))
    for (path, kind, number), tensors in parts.items():
        entries.append(_READERS[kind](path, tensors, config, base, f"{kind}{number}"))
        if tensors:
            names = ", ".join(sorted(tensors))
            raise ConverterError("E_CONVERT_SURPLUS", "tensors of no known use", where=f"{path}.{kind}", found=names)
    keys.finish()
    return entries


def _check_prompt(key: str, where: object) -> None:
    if ".prefix." in key or ".reparams." in key or "soft_prompt_layer" in key:
        raise ConverterError(
            "E_CONVERT_KIND",
            "prefixes and soft prompts of OpenDelta are not read here",
            where=where,
            found=key,
            hint="what they attend to is no function of one module's input and output",
        )


def _new_bias(key: str, base: Base) -> bool:
    """Whether a key is a bias that the backbone's module does not have."""
    path = key.removesuffix(".bias")
    return key.endswith(".bias") and path != key and not base.arch.host(path).shape.bias


def _added(path: str, value: Tensor) -> Entry:
    return Entry(path=path, kind="bias", config={"scale": 1.0}, tensors={"value": value}, group="bitfit")


def _take(tensors: dict[str, Tensor], name: str, path: str) -> Tensor:
    if name not in tensors:
        raise ConverterError("E_CONVERT_MISSING", "a tensor is missing", where=path, found=name)
    return tensors.pop(name)


def _lora(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    down, up = _take(tensors, "lora_A", path), _take(tensors, "lora_B", path)
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or config.get("lora_r") != down.shape[0]:
        raise ConverterError(
            "E_CONVERT_RANK",
            "rank or alpha are missing or contradict the tensors",
            where=path,
            expected=list(down.shape),
            found=f"lora_r={config.get('lora_r')}, lora_alpha={alpha}",
        )
    rank = int(down.shape[0])
    return Entry(
        path=path,
        kind="lora",
        config={"rank": rank, "scale": alpha / rank},
        tensors={"down": down, "up": up},
        group=group,
    )


def _activation(config: Mapping[str, Any]) -> str:
    name = config.get("non_linearity")
    if not isinstance(name, str):
        raise ConverterError("E_CONVERT_CONFIG", "the activation is missing", where="non_linearity", found=name)
    return _ACTIVATIONS.get(name.lower(), name.lower())


def _adapter(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    values = {
        "down": _take(tensors, "modulelist.down_proj.weight", path),
        "down_bias": _take(tensors, "modulelist.down_proj.bias", path),
        "up": _take(tensors, "modulelist.up_proj.weight", path),
        "up_bias": _take(tensors, "modulelist.up_proj.bias", path),
    }
    options = {"bottleneck": int(values["down"].shape[0]), "activation": _activation(config)}
    return Entry(path=path, kind="adapter", config=options, tensors=values, group=group)


def _parallel(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    if base.arch.host(path).shape.family != "block":
        raise ConverterError(
            "E_CONVERT_KIND",
            "this parallel adapter begins at one module and ends at another, which the file does not name",
            where=path,
        )
    found = _adapter(path, tensors, config, base, group)
    return Entry(path=path, kind="parallel-adapter", config=found.config, tensors=found.tensors, group=group)


def _low_rank(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    values: dict[str, Tensor] = {}
    for side in ("down", "up"):
        values[f"{side}_left"] = _take(tensors, f"{side}_sampler.W_right", path).T.contiguous()
        values[f"{side}_right"] = _take(tensors, f"{side}_sampler.W_left", path).T.contiguous()
        values[f"{side}_bias"] = _take(tensors, f"{side}_sampler.b", path)
    bottleneck, rank = values["down_left"].shape
    options = {"bottleneck": int(bottleneck), "rank": int(rank), "activation": _activation(config)}
    return Entry(path=path, kind="low-rank-adapter", config=options, tensors=values, group=group)


def _compacter(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    """OpenDelta maps rows and the kind maps columns: each factor is transposed, left and right change places."""
    import torch

    values: dict[str, Tensor] = {}
    for side in ("down", "up"):
        prefix = f"{side}_sampler."
        if f"{prefix}phm_rule" in tensors:
            rule = _take(tensors, f"{prefix}phm_rule", path)
        else:
            left, right = (
                _take(tensors, f"{prefix}phm_rule_left", path),
                _take(tensors, f"{prefix}phm_rule_right", path),
            )
            rule = torch.bmm(left, right)
        values[f"{side}_rule"] = rule.transpose(1, 2).contiguous()
        values[f"{side}_left"] = _take(tensors, f"{prefix}W_right", path).transpose(1, 2).contiguous()
        values[f"{side}_right"] = _take(tensors, f"{prefix}W_left", path).transpose(1, 2).contiguous()
        values[f"{side}_bias"] = _take(tensors, f"{prefix}b", path)
    options = {
        "bottleneck": int(values["down_bias"].shape[0]),
        "division": int(values["down_rule"].shape[0]),
        "rank": int(values["down_left"].shape[2]),
        "activation": _activation(config),
    }
    return Entry(path=path, kind="compacter", config=options, tensors=values, group=group)


def _bitfit(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    return _added(path, _take(tensors, "bias", path))


_Reader = Callable[[str, dict[str, "Tensor"], Mapping[str, Any], Base, str], Entry]
_READERS: Mapping[str, _Reader] = {
    "lora": _lora,
    "adapter": _adapter,
    "parallel_adapter": _parallel,
    "low_rank_adapter": _low_rank,
    "compactor": _compacter,
    "bitfit": _bitfit,
}
