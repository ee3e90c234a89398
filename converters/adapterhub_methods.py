"""AdapterHub's methods other than bottlenecks: LoRA and its kin, prefixes, interventions in hidden states, heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltahub.converters.adapterhub_documents import DORA
from deltahub.converters.base import Base
from deltahub.converters.entries import Entry
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["heads", "loras", "prefixes", "refts"]

Parts = Mapping[str, Mapping[str, "Tensor"]]
"""Tensors by the live path that they hang under."""


def _number(config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConverterError("E_CONVERT_CONFIG", f"{key} is missing or no number", found=value)
    return float(value)


def loras(config: Mapping[str, Any], parts: Parts, shared: Mapping[str, Tensor], base: Base) -> list[Entry]:
    """Low-rank updates, multipliers and their kin."""
    if config.get("architecture") == "mtl_lora":
        raise ConverterError("E_CONVERT_UNSUPPORTED", "updates of several tasks in one adapter", found="mtl_lora")
    if config.get("composition_mode") == "scale":
        return [_ia3(path, part, config, base) for path, part in parts.items()]
    return [_lora(path, dict(part), config, shared, base) for path, part in parts.items()]


def _lora(
    path: str, part: dict[str, Tensor], config: Mapping[str, Any], shared: Mapping[str, Tensor], base: Base
) -> Entry:
    down, up = _pair(path, part, shared)
    rank = int(config.get("r") or 0)
    scale = _number(config, "alpha") / (rank or 1)
    out = base.arch.host(path).shape.d_out
    fused = down.shape[0] != up.shape[1]
    if up.shape[1] != rank:
        raise ConverterError(
            "E_CONVERT_RANK", "the tensors have another rank", where=path, expected=rank, found=list(down.shape)
        )
    if fused:
        assert out is not None
        down, up = _unfused(path, down, up, config, out)
    tensors = {"down": down, "up": up}
    options = {"rank": int(down.shape[0]), "scale": scale}
    if "m.weight" in part:
        tensors["magnitude"] = part.pop("m.weight").reshape(-1)
        found = Entry(path=path, kind=str(DORA["kind"]), config=options, tensors=tensors, document=DORA)
    elif config.get("use_gating"):
        gate, bias = (part.pop(f"gate.{name}", None) for name in ("weight", "bias"))
        if gate is None or bias is None or gate.shape[0] != 1:
            raise ConverterError("E_CONVERT_MISSING", "this is no gate of one number", where=path, found=sorted(part))
        tensors |= {"gate": gate.reshape(-1), "gate_bias": bias}
        # The gate takes the place of the factor.
        found = Entry(path=path, kind="gated-lora", config={**options, "scale": 1.0}, tensors=tensors)
    else:
        found = Entry(path=path, kind="lora", config=options, tensors=tensors)
    if part:
        names = ", ".join(sorted(part))
        raise ConverterError("E_CONVERT_SURPLUS", "tensors of no known use", where=path, found=names)
    return found


def _pair(path: str, part: dict[str, Tensor], shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two factors; those of VeRA are square matrices times ones that all layers share."""
    pair = part.pop("lora_A", None), part.pop("lora_B", None)
    inner, outer = part.pop("vera_D", None), part.pop("vera_B", None)
    if inner is not None and outer is not None:
        pair = shared.get("lora_A"), shared.get("lora_B")
    down, up = pair
    if down is None or up is None or down.ndim != 2 or up.ndim != 2:
        raise ConverterError(
            "E_CONVERT_MISSING",
            "this is no low-rank pair",
            where=path,
            found=", ".join(sorted(part)) or None,
            hint="a model without a head does not save what its layers share: save from a model with one",
        )
    if inner is None or outer is None:
        return down, up
    return (inner.double() @ down.double()).to(down.dtype), (outer.double() @ up.double()).to(up.dtype)


def _fused(path: str, rows: int, config: Mapping[str, Any], out: int) -> list[int]:
    """Where in a fused projection the parts begin that a method acts on."""
    wanted = [name for name in ("q", "k", "v") if name in (config.get("attn_matrices") or ())]
    width = out // 3
    if rows != width * len(wanted):
        raise ConverterError(
            "E_CONVERT_SHAPE", "this is not for the parts of this projection", where=path, expected=out, found=rows
        )
    return ["qkv".index(name) * width for name in wanted]


def _unfused(path: str, down: Tensor, up: Tensor, config: Mapping[str, Any], out: int) -> tuple[Tensor, Tensor]:
    """One update of a fused projection out of those of its parts, whose factors are stacked."""
    starts, width, rank = _fused(path, int(up.shape[0]), config, out), out // 3, int(up.shape[1])
    if down.shape[0] != rank * len(starts):
        raise ConverterError("E_CONVERT_SHAPE", "these are not two factors", where=path, found=list(down.shape))
    wide = up.new_zeros(out, rank * len(starts))
    for i, at in enumerate(starts):
        wide[at : at + width, i * rank : (i + 1) * rank] = up[i * width : (i + 1) * width]
    return down, wide


def _ia3(path: str, part: Mapping[str, Tensor], config: Mapping[str, Any], base: Base) -> Entry:
    """A multiplier of the output, bias included; 1 leaves it as it is."""
    if part.keys() != {"lora_B"} or part["lora_B"].shape[1:] != (1,):
        raise ConverterError("E_CONVERT_SHAPE", "this is no vector of multipliers", where=path, found=sorted(part))
    gain = part["lora_B"].reshape(-1) * _number(config, "alpha")
    out = base.arch.host(path).shape.d_out
    if out is not None and len(gain) != out:
        whole, width = gain.new_ones(out), out // 3
        for i, at in enumerate(_fused(path, len(gain), config, out)):
            whole[at : at + width] = gain[i * width : (i + 1) * width]
        gain = whole
    return Entry(path=path, kind="ia3", config={"axis": "out"}, tensors={"gain": gain})


def prefixes(config: Mapping[str, Any], parts: Parts, gates: Parts, base: Base, where: object) -> list[Entry]:
    """Keys and values of all layers, which are shared out here.

    Args:
        config: of the prefix.
        parts: tensors by the name of the place: ``self_prefix``, ``encoder_prefix``, ``cross_prefix``.
        gates: tensors of gates by the path of what they hang under, ``….prefix_tuning``.
        base: the backbone.
        where: the file.
    """
    entries: list[Entry] = []
    left = dict(gates)
    for place, part in parts.items():
        sites = _attentions(place, config, base)
        _check_positions(sites, place, base)
        length = int(config.get("prefix_length") or 0)
        flat = _flat(dict(part), config, f"{where}: {place}").reshape(-1)
        width, over = divmod(flat.numel(), max(1, 2 * length * len(sites)))
        if over or not sites:
            raise ConverterError(
                "E_CONVERT_SHAPE",
                "these are not the keys and values of this backbone's attentions",
                where=f"{where}: {place}",
                expected=f"a multiple of 2 · {length} · {len(sites)}",
                found=flat.numel(),
            )
        layers = flat.view(length, len(sites), 2, width)
        for i, site in enumerate(sites):
            tensors = {"key": layers[:, i, 0].contiguous(), "value": layers[:, i, 1].contiguous()}
            gate = left.pop(site, None)
            if bool(config.get("use_gating")) != (gate is not None):
                raise ConverterError("E_CONVERT_MISSING", "a gate is missing, or too many", where=site)
            kind = "prefix" if gate is None else "gated-prefix"
            tensors |= {} if gate is None else _gate(gate, site)
            entries.append(Entry(path=site, kind=kind, config={"length": length}, tensors=tensors))
    if left:
        raise ConverterError("E_CONVERT_SURPLUS", "gates of no prefix", where=where, found=", ".join(sorted(left)))
    return entries


def _gate(part: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """One number for keys and values alike."""
    if part.keys() != {"weight", "bias"} or part["weight"].shape[0] != 1:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED", "keys and values have gates of their own", where=where, found=sorted(part)
        )
    return {"gate": part["weight"].reshape(-1), "gate_bias": part["bias"]}


def _flat(part: dict[str, Tensor], config: Mapping[str, Any], where: str) -> Tensor:
    """Keys and values; of a network, what it gives."""
    import torch
    import torch.nn.functional as F

    if set(part) == {"control_trans"}:
        return part["control_trans"]
    names = {"wte.weight", *(f"control_trans.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))}
    functions: dict[str, Callable[[Tensor], Tensor]]
    functions = {"tanh": torch.tanh, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu}
    act = functions.get(str(config.get("non_linearity")).lower())
    if set(part) != names or act is None:
        raise ConverterError(
            "E_CONVERT_MISSING",
            "this is no prefix that is known",
            where=where,
            found=sorted(part),
            expected=sorted(names),
        )
    hidden = F.linear(part["wte.weight"], part["control_trans.0.weight"], part["control_trans.0.bias"])
    return F.linear(act(hidden), part["control_trans.2.weight"], part["control_trans.2.bias"])


def _attentions(place: str, config: Mapping[str, Any], base: Base) -> list[str]:
    """The attentions of one place in the model's order, without the layers that are left out."""
    from deltahub.attending import attention_of

    cross = ("EncDecAttention", "encoder_attn", "crossattention")
    every = [p for p, m in base.arch.model.named_modules() if p and attention_of(type(m)) is not None]
    two = any("decoder" in p.split(".") for p in every) and any("encoder" in p.split(".") for p in every)
    chosen = []
    for path in every:
        parts = path.split(".")
        crossing = any(name in parts for name in cross)
        of_encoder = two and "encoder" in parts
        wanted = "cross_prefix" if crossing else "encoder_prefix" if of_encoder else "self_prefix"
        if wanted in (place, f"{place}_prefix") or place.endswith(f"_{wanted}"):
            chosen.append(path)
    # Layers are counted through: those of a decoder after those of its encoder.
    first = sum("encoder" in path.split(".") for path in every) if two and "encoder" not in place else 0
    left_out = set(config.get("leave_out") or ())
    return [path for i, path in enumerate(chosen, first) if i not in left_out]


def _check_positions(sites: Sequence[str], place: str, base: Base) -> None:
    """Refuse attentions with a bias of relative positions: it is for other positions there than the tokens have."""
    from deltahub.attending import attention_of

    for path in sites:
        found = attention_of(type(base.arch.model.get_submodule(path)))
        if found is not None and found.bias and not place.endswith("cross_prefix"):
            raise ConverterError(
                "E_CONVERT_UNSUPPORTED",
                "AdapterHub shifts the relative positions of the tokens by the length of the prefix",
                where=path,
            )


def refts(config: Mapping[str, Any], parts: Parts, where: object) -> list[Entry]:
    """Interventions at the first positions of a layer's output."""
    if not config.get("orthogonality") and "subtract_projection" not in config:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "the file does not say whether the projection is subtracted (NoReFT) or not (DiReFT)",
            where=where,
            hint="AdapterHub's own loader takes all of them for NoReFT; add subtract_projection to the configuration",
        )
    if config.get("suffix_positions"):
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED", "positions before the padding, which the kind cannot see", where=where
        )
    if config.get("non_linearity") is not None:
        raise ConverterError("E_CONVERT_UNSUPPORTED", "an activation in an intervention", where=where)
    return [_reft(path, dict(part), config) for path, part in parts.items()]


def _reft(path: str, part: dict[str, Tensor], config: Mapping[str, Any]) -> Entry:
    part = {name: value for name, value in part.items() if not name.startswith("units.1.")}  # of the absent suffix
    names = {name: part.pop(f"units.0.learned_source.{name}", None) for name in ("weight", "bias")}
    subspace = _projection({name.removeprefix("units.0.projection."): value for name, value in part.items()}, path)
    source, bias = names["weight"], names["bias"]
    if source is None or bias is None or source.shape != subspace.shape:
        raise ConverterError("E_CONVERT_MISSING", "this is no intervention", where=path, found=sorted(part))
    options = {
        "rank": int(source.shape[0]),
        "positions": "ends",
        "prefix": int(_number(config, "prefix_positions")),
        "suffix": 0,
    }
    if config.get("subtract_projection", True):
        tensors = {"source": source, "source_bias": bias, "subspace": subspace}
        return Entry(path=path, kind="loreft", config=options, tensors=tensors)
    tensors = {"down": source, "down_bias": bias, "up": subspace.T.contiguous()}
    return Entry(path=path, kind="direft", config=options, tensors=tensors)


def _projection(part: dict[str, Tensor], path: str) -> Tensor:
    """The rows of a subspace, of torch's parametrisation by orthogonal ones too."""
    import torch
    from torch.nn.utils.parametrizations import orthogonal

    if set(part) == {"weight"}:
        return part["weight"]
    names = {"parametrizations.weight.original", "parametrizations.weight.0.base"}
    if not names - {"parametrizations.weight.0.base"} <= set(part) <= names:
        raise ConverterError("E_CONVERT_MISSING", "this is no projection", where=path, found=sorted(part))
    rows, width = part["parametrizations.weight.original"].shape
    layer = torch.nn.Linear(width, rows, bias=False)
    orthogonal(layer)
    layer.load_state_dict(part)
    return layer.weight.detach().clone()


def heads(tensors: Mapping[str, Tensor], config: Mapping[str, Any], base: Base, where: object) -> list[Entry]:
    """A head: parameters of the backbone's own, or a flexible one that the backbone's class has too."""
    model = base.arch.model
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        path, _, name = key.rpartition(".")
        layers.setdefault(path, {})[name] = value
    if any(path.startswith("heads.") for path in layers):
        layers = _flexible(layers, config, modules, where)
    entries = []
    for path, part in layers.items():
        if path not in modules:
            raise ConverterError(
                "E_CONVERT_TARGET",
                "the backbone has no such head",
                where=f"{where}: {path}",
                found=type(model).__name__,
                hint="name the class that has it, such as class_name='transformers.BertForSequenceClassification'",
            )
        host = base.arch.host(path)
        values = {"weight": host.view.canonical(part["weight"]).contiguous()} if "weight" in part else {}
        if "bias" in part:
            values["bias"] = part["bias"]
        entries.append(Entry(path=path, kind="assign", tensors=values, group="head"))
    return entries


# Layers of a classification head by place in its list, and where transformers' own classes have the same two.
_TWINS: Sequence[tuple[str, str]] = (("classifier.dense", "classifier.out_proj"), ("pooler.dense", "classifier"))


def _flexible(
    layers: Mapping[str, dict[str, Tensor]], config: Mapping[str, Any], modules: Mapping[str, nn.Module], where: object
) -> dict[str, dict[str, Tensor]]:
    """A classification head of AdapterHub's on the first token, as the layers of a class of transformers."""
    options = config.get("config") or {}
    ordered = [layers[path] for path in sorted(layers, key=lambda path: int(path.rpartition(".")[2] or 0))]
    known = options.get("head_type") == "classification" and options.get("activation_function") == "tanh"
    if known and not options.get("use_pooler") and len(ordered) == 2:
        for dense, last in _TWINS:
            found = [path for path in modules if path == dense or path.endswith(f".{dense}")]
            if len(found) == 1 and last in modules:
                return {found[0]: ordered[0], last: ordered[1]}
    if known and options.get("use_pooler") and len(ordered) == 1 and "classifier" in modules:
        return {"classifier": ordered[0]}
    raise ConverterError(
        "E_CONVERT_UNSUPPORTED",
        "the backbone has no head that computes the same",
        where=where,
        found=f"{options.get('head_type')} of {len(ordered)} layer(s)",
        hint="import without it: move head_config.json and the head's weights away",
    )
