"""Parameters of the backbone that a foreign checkpoint holds whole: heads, saved modules, trained biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry, Keys
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["base_values", "bias_entry", "whole"]


def base_values(path: str, part: Mapping[str, Tensor], base: Base) -> list[Entry]:
    """Copies of the backbone's own parameters that PEFT stores beside an adapter: dropped where they are equal."""
    import torch

    host = base.arch.host(path)
    found: list[Entry] = []
    weight, bias = part.get("base_weight"), part.get("base_bias")
    if weight is not None:
        own = base.value(f"{path}.weight")
        same = own is not None and own.shape == weight.shape and torch.equal(own.to(weight.dtype), weight)
        if not same:
            tensors = {"weight": host.view.canonical(weight).contiguous()}
            if host.shape.bias:
                own_bias = bias if bias is not None else base.value(f"{path}.bias")
                assert own_bias is not None
                tensors["bias"] = own_bias
            return [Entry(path=path, kind="assign", tensors=tensors, group="saved")]
    if bias is not None:
        found += bias_entry(path, bias, base)
    return found


def bias_entry(path: str, bias: Tensor, base: Base) -> list[Entry]:
    """A bias that was trained as a whole, as what it adds to the backbone's."""
    import torch

    own = base.value(f"{path}.bias")
    if own is None or own.shape != bias.shape:
        raise ConverterError("E_CONVERT_TARGET", "the backbone has no such bias", where=f"{path}.bias")
    value = (bias.double() - own.double()).to(torch.promote_types(bias.dtype, torch.float32))
    if not bool(value.any()):
        return []
    return [Entry(path=path, kind="bias", config={"scale": 1.0}, tensors={"value": value})]


def whole(names: Sequence[str], keys: Keys, base: Base) -> list[Entry]:
    """Parameters that were saved whole: heads and other modules to save, and trained biases."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key in names:
        path, _, name = key.rpartition(".")
        if name in {"weight", "bias"} and path:
            saved.setdefault(path, {})[name] = keys.take(key)
    entries: list[Entry] = []
    for path, part in saved.items():
        host = base.arch.host(path)
        if part.keys() == {"bias"} and host.shape.bias:
            entries += bias_entry(path, part["bias"], base)
            continue
        if host.shape.bias != ("bias" in part) or "weight" not in part:
            raise ConverterError(
                "E_CONVERT_MISSING", "a module was saved in part", where=f"{keys.where}: {path}", found=sorted(part)
            )
        tensors = {"weight": host.view.canonical(part["weight"]).contiguous()}
        if "bias" in part:
            tensors["bias"] = part["bias"]
        entries.append(Entry(path=path, kind="assign", tensors=tensors, group="saved"))
    return entries
