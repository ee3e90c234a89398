"""Sites as the parts of files of kohya, LyCORIS and diffusers: the reverse of lycoris.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from deltahub.converters.entries import Entry
from deltahub.converters.lycoris_kinds import NAMESPACE

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write"]


def write(entry: Entry) -> dict[str, Tensor] | None:
    """What a site's tensors are called in a file, with alpha in float64; ``None`` for a kind that no file can hold."""
    import torch

    t, config = dict(entry.tensors), entry.config
    inner = entry.kind.removeprefix(NAMESPACE).removesuffix("-dora") if entry.kind.endswith("-dora") else entry.kind
    writer = _WRITERS.get("lora" if inner == "dora" else inner)
    if writer is None:
        return None
    part = writer(t, config)
    if part is None:
        return None
    if "rank" in config:
        part["alpha"] = torch.tensor(config["scale"] * config["rank"], dtype=torch.float64)
    magnitude = next((key for key in ("magnitude", "magnitude_in") if key in t), None)
    if magnitude is not None:
        shape = [1] * max(value.ndim for value in t.values())
        shape[0 if magnitude == "magnitude" else 1] = -1
        part["dora_scale"] = t[magnitude].reshape(shape)
    return {key: value.contiguous() for key, value in part.items()}


_Writer = Callable[[dict[str, "Tensor"], Mapping[str, Any]], "dict[str, Tensor] | None"]


def _ones(value: Tensor, like: Tensor) -> Tensor:
    """A factor of the outputs as the 1×1 convolution that it is beside a convolution."""
    return value.reshape(*value.shape, *(1,) * (like.ndim - value.ndim))


def _write_lora(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {"lora_up.weight": _ones(t["up"], t["down"]), "lora_down.weight": t["down"]}
    return found | ({"lora_up.bias": t["bias"]} if "bias" in t else {})


def _write_locon(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    core = t["core"]
    return {
        "lora_up.weight": _ones(t["up"], core),
        "lora_down.weight": _ones(t["down"], core),
        "lora_mid.weight": core,
    }


def _write_loha(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i in (1, 2):
        if f"core_{i}" in t:
            found |= {f"hada_w{i}_a": t[f"up_{i}"].T, f"hada_w{i}_b": t[f"inner_{i}"], f"hada_t{i}": t[f"core_{i}"]}
        else:
            found |= {f"hada_w{i}_a": t[f"up_{i}"], f"hada_w{i}_b": t[f"down_{i}"].flatten(1)}
    return found


def _write_lokr(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {f"lokr_{name}": t[name] for name in ("w1", "w2") if name in t}
    if "w1_up" in t:
        found |= {"lokr_w1_a": t["w1_up"], "lokr_w1_b": t["w1_down"]}
    if "w2_core" in t:
        found |= {"lokr_w2_a": t["w2_up"].T, "lokr_w2_b": t["w2_inner"], "lokr_t2": t["w2_core"]}
    elif "w2_up" in t:
        found |= {"lokr_w2_a": t["w2_up"], "lokr_w2_b": t["w2_down"].flatten(1)}
    return found


def _write_glora(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    names = {"a1.weight": "a_up", "a2.weight": "a_down", "b1.weight": "b_up", "b2.weight": "b_down"}
    return {theirs: _ones(t[ours], t["b_down"]) for theirs, ours in names.items()}


def _write_oft(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    found = {"oft_blocks": t["blocks"], "alpha": torch.tensor(0)}
    return found | ({"rescale": t["gain"].reshape(-1, 1)} if "gain" in t else {})


def _write_ia3(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    import torch

    inner = config["axis"] == "in"
    return {"weight": t["offset_in" if inner else "offset"], "on_input": torch.tensor(int(inner))}


def _write_full(t: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor] | None:
    if config["scale"] != 1.0:
        return None
    weight, bias = ("w_norm", "b_norm") if t["weight"].ndim == 1 else ("diff", "diff_b")
    return {weight: t["weight"]} | ({bias: t["bias"]} if "bias" in t else {})


_WRITERS: Mapping[str, _Writer] = {
    "lora": _write_lora,
    "locon": _write_locon,
    "loha": _write_loha,
    "lokr": _write_lokr,
    "glora-lycoris": _write_glora,
    f"{NAMESPACE}oft": _write_oft,
    f"{NAMESPACE}boft": _write_oft,
    f"{NAMESPACE}ia3": _write_ia3,
    "diff": _write_full,
}
