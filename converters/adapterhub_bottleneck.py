"""AdapterHub's bottlenecks: where they sit in a layer, what their flags mean, and their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltahub.converters.adapterhub_documents import NICE, Shape, bottleneck
from deltahub.converters.base import Base
from deltahub.converters.entries import Entry
from deltahub.converters.hypercomplex import dense, layer, same_rank
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["activation", "bottlenecks", "invertible"]

_ACTIVATIONS = {"swish": "silu", "leakyrelu": "leaky_relu", "gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_new"}
_VIRTUAL = {"attention_adapters": "mh_adapter", "output_adapters": "output_adapter"}


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where in a layer a bottleneck sits.

    Attributes:
        flag: which flag of the configuration asks for it.
        linear: path of the layer that gives its sublayer's output.
        norm: path of the layer's own norm over that plus the residual; ``None`` where a sublayer begins with its norm.
        whole: path of the module whose output is the sum with the residual, if there is one.
        source: path of the module whose input is the sublayer's residual.
    """

    flag: str
    linear: str
    norm: str | None
    whole: str | None
    source: str


# By class of the layer, or of the part of one, that a key names: paths below it.
_PLACES: Mapping[tuple[str, str], tuple[str, str | None, str | None, str | None]] = {
    ("TransformerBlock", "mh_adapter"): ("attention.out_lin", "sa_layer_norm", None, None),
    ("TransformerBlock", "output_adapter"): ("ffn.lin2", "output_layer_norm", None, "ffn.lin1"),
    ("BartEncoderLayer", "mh_adapter"): ("self_attn.out_proj", "self_attn_layer_norm", None, None),
    ("BartEncoderLayer", "output_adapter"): ("fc2", "final_layer_norm", None, "fc1"),
    ("BartDecoderLayer", "mh_adapter"): ("self_attn.out_proj", "self_attn_layer_norm", None, None),
    ("BartDecoderLayer", "output_adapter"): ("fc2", "final_layer_norm", None, "fc1"),
    ("GPT2Block", "mh_adapter"): ("attn.c_proj", None, None, "ln_1"),
    ("GPT2Block", "output_adapter"): ("mlp.c_proj", None, "", "ln_2"),
    ("LlamaDecoderLayer", "mh_adapter"): ("self_attn.o_proj", None, None, "input_layernorm"),
    ("LlamaDecoderLayer", "output_adapter"): ("mlp.down_proj", None, "", "post_attention_layernorm"),
    ("MistralDecoderLayer", "mh_adapter"): ("self_attn.o_proj", None, None, "input_layernorm"),
    ("MistralDecoderLayer", "output_adapter"): ("mlp.down_proj", None, "", "post_attention_layernorm"),
    ("T5LayerSelfAttention", "mh_adapter"): ("SelfAttention.o", None, "", "layer_norm"),
    ("T5LayerCrossAttention", "cross_adapter"): ("EncDecAttention.o", None, "", "layer_norm"),
    ("T5LayerFF", "output_adapter"): ("DenseReluDense.wo", None, "", "layer_norm"),
}


def _place(path: str, base: Base) -> _Place:
    """Where the bottleneck of a key sits; of parts of BERT's layers, that they have one linear layer and one norm."""
    model = base.arch.model
    root, _, last = path.rpartition(".")
    flag = _VIRTUAL.get(last)
    root = root if flag else path
    cls = type(model.get_submodule(root)).__name__
    for name, found in _PLACES.items():
        if name[0] == cls and name[1] == (flag or name[1]):
            linear, norm, whole, source = found
            return _Place(
                flag=name[1],
                linear=f"{root}.{linear}",
                norm=f"{root}.{norm}" if norm else None,
                whole=root if whole == "" else None,
                source=f"{root}.{source}" if source else root,
            )
    attention = root.endswith(".attention.output")
    layer = root.removesuffix(".output")
    return _Place(
        flag="mh_adapter" if attention else "output_adapter",
        linear=_child(root, base, "linear"),
        norm=_child(root, base, "norm"),
        whole=None,
        source=layer if attention else f"{layer}.intermediate.dense",
    )


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


def activation(name: object) -> str:
    """An activation of AdapterHub by its name here; an unknown one is refused where the kind is."""
    return "identity" if name is None else _ACTIVATIONS.get(str(name).lower(), str(name).lower())


def bottlenecks(
    configs: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    base: Base,
) -> list[Entry]:
    """The sites of all bottlenecks of one adapter.

    Args:
        configs: its configurations of bottlenecks.
        parts: tensors by the live path of the module that they hang under.
        shared: tensors that all layers use.
        base: the backbone.
    """
    return [_bottleneck(path, configs, dict(part), shared, base) for path, part in parts.items()]


def _bottleneck(
    path: str, configs: Sequence[Mapping[str, Any]], part: dict[str, Tensor], shared: Mapping[str, Tensor], base: Base
) -> Entry:
    place = _place(path, base)
    config = next((one for one in configs if one.get(place.flag)), configs[0])
    values = _tensors(path, config, part, shared)
    shape = Shape(
        before=bool(config.get("ln_before")),
        after=("sum" if config.get("adapter_residual_before_ln") else "alone") if config.get("ln_after") else "",
        gated=bool(config.get("use_gating")),
    )
    if config.get("is_parallel"):
        if shape != Shape():
            raise _unsupported(path, "is_parallel", "beside a norm of its own or a gate")
        return _parallel(place, config, values)
    where, twice = _host(path, place, config)
    shape = Shape(twice=twice, before=shape.before, after=shape.after, gated=shape.gated)
    if twice and shape.after == "sum":
        raise _unsupported(
            path, "adapter_residual_before_ln", "what the norm reads is not known where the adapter sits"
        )
    return _entry(where, shape, config, values)


def _unsupported(where: str, flag: str, why: str) -> ConverterError:
    return ConverterError("E_CONVERT_UNSUPPORTED", f"{flag}: {why}", where=where)


def _host(path: str, place: _Place, config: Mapping[str, Any]) -> tuple[str, bool]:
    """The module that a bottleneck is a function of, and whether that is the layer's norm, run twice."""
    before, after = bool(config.get("original_ln_before")), bool(config.get("original_ln_after", True))
    residual = config.get("residual_before_ln", True)
    if not before:
        if not after:
            raise _unsupported(path, "original_ln_after", "the residual is never added")
        return place.linear, False
    if place.norm is not None:
        if residual is True and after:
            return place.norm, True
        if residual is False and not after:
            return place.norm, False
    elif place.whole is not None and ((residual is True and after) or (residual is not True and not after)):
        return place.whole, False
    raise _unsupported(path, "residual_before_ln", "the residual is taken where no module gives it")


def _parallel(place: _Place, config: Mapping[str, Any], values: Mapping[str, Tensor]) -> Entry:
    """From what the sublayer's residual is to what the sublayer gives."""
    tensors = dict(values)
    scale = float(tensors.pop("scale")) if "scale" in tensors else 1.0
    tensors = dense(tensors) if "down_rule" in tensors else tensors
    options = {
        "activation": activation(config.get("non_linearity")),
        "scale": scale,
        "bottleneck": int(tensors["down"].shape[0]),
    }
    return Entry(path=place.linear, kind="parallel-adapter", config=options, tensors=tensors, source=place.source)


def _entry(where: str, shape: Shape, config: Mapping[str, Any], values: Mapping[str, Tensor]) -> Entry:
    tensors = dict(values)
    scale = float(tensors.pop("scale")) if "scale" in tensors else 1.0
    options = {"activation": activation(config.get("non_linearity")), "scale": scale}
    if "down_rule" in tensors:
        if shape == Shape():
            options |= {"division": int(tensors["down_rule"].shape[0]), "rank": same_rank(tensors)}
            options["bottleneck"] = int(tensors["down_bias"].shape[0])
            return Entry(path=where, kind="compacter", config=options, tensors=tensors)
        tensors = dense(tensors)
    options["bottleneck"] = int(tensors["down"].shape[0])
    if shape == Shape():
        return Entry(path=where, kind="adapter", config=options, tensors=tensors)
    return Entry(path=where, kind=shape.name, config=options, tensors=tensors, document=bottleneck(shape))


def _tensors(
    path: str, config: Mapping[str, Any], part: dict[str, Tensor], shared: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one bottleneck by the names of the kinds; every one of the file is used."""
    number = 1 if config.get("ln_before") else 0
    found: dict[str, Tensor] = {}
    if config.get("ln_before"):
        for name in ("weight", "bias"):
            found[f"before_{name}"] = _take(part, f"adapter_norm_before.{name}", path)
            part.pop(f"adapter_down.0.{name}", None)  # the same layer, listed twice
    if config.get("ln_after"):
        for name in ("weight", "bias"):
            found[f"after_{name}"] = _take(part, f"adapter_norm_after.{name}", path)
    if config.get("use_gating"):
        found |= {"gate": _take(part, "gate.weight", path).reshape(-1), "gate_bias": _take(part, "gate.bias", path)}
    for side, key in (("down", f"adapter_down.{number}"), ("up", "adapter_up")):
        if config.get("phm_layer"):
            found |= _hypercomplex(side, key, path, part, shared)
        else:
            found[side] = _take(part, f"{key}.weight", path)
            found[f"{side}_bias"] = _take(part, f"{key}.bias", path)
    _scale(config, part, found, path)
    if part:
        names = ", ".join(sorted(part))
        raise ConverterError("E_CONVERT_SURPLUS", "tensors of no known use", where=path, found=names)
    return found


def _take(part: dict[str, Tensor], name: str, path: str) -> Tensor:
    if name not in part:
        raise ConverterError(
            "E_CONVERT_MISSING", "a tensor of this bottleneck is missing", where=path, expected=name, found=sorted(part)
        )
    return part.pop(name)


def _scale(config: Mapping[str, Any], part: dict[str, Tensor], found: dict[str, Tensor], path: str) -> None:
    """The factor of the output: a number, or one or many that were trained."""
    import torch

    scaling = config.get("scaling", 1.0)
    if scaling == "learned":
        found["scale"] = _take(part, "scaling", path).reshape(())
    elif scaling == "channel":
        factor = _take(part, "scaling", path)
        rows = [name for name in ("up", "up_left") if name in found]
        for name in (*rows, "up_bias"):
            if name == "up_left":
                raise _unsupported(path, "scaling", "a factor for every channel of a hypercomplex layer")
            found[name] = found[name] * factor.reshape(-1, *[1] * (found[name].ndim - 1))
    elif isinstance(scaling, (int, float)) and not isinstance(scaling, bool):
        found["scale"] = torch.tensor(float(scaling), dtype=torch.float64)
    else:
        raise ConverterError("E_CONVERT_CONFIG", "the scaling is no factor", where=path, found=scaling)


def _hypercomplex(
    side: str, key: str, path: str, part: dict[str, Tensor], shared: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """One hypercomplex layer; it maps rows and the kind maps columns: left and right change places."""
    import torch

    def one(name: str, other: str) -> Tensor | None:
        own = part.pop(f"{key}.{name}", None)
        return own if own is not None else shared.get(other)

    left, right = one("phm_rule_left", "phm_rule_left"), one("phm_rule_right", "phm_rule_right")
    rule = torch.bmm(left, right) if left is not None and right is not None else one("phm_rule", "phm_rule")
    whole = one("W", f"W_{side}")
    inner, outer = one("W_left", f"W_{side}_left"), one("W_right", f"W_{side}_right")
    if whole is not None and inner is None:
        inner, outer = whole, None
    if rule is None or inner is None or (outer is None and whole is None):
        raise ConverterError(
            "E_CONVERT_MISSING",
            "the file lacks what its layers share",
            where=f"{path}.{key}",
            expected="phm_rule" if rule is None else "W",
            hint="a model without a head does not save it: save the adapter from a model with one",
        )
    return layer(side, rule, inner, outer, part.pop(f"{key}.b", None))


def invertible(config: Mapping[str, Any], part: dict[str, Tensor], base: Base, where: object) -> list[Entry]:
    """An invertible adapter after the embeddings."""
    if config.get("inv_adapter") != "nice":
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "only couplings of the form nice are read",
            where=where,
            found=config.get("inv_adapter"),
        )
    model = base.arch.model
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "before a head that predicts tokens the adapter runs backwards, which is not read",
            where=where,
            found=type(model).__name__,
        )
    tensors: dict[str, Tensor] = {}
    for half in ("F", "G"):
        for number, name in ((0, "down"), (2, "up")):
            tensors[f"{half.lower()}_{name}"] = _take(part, f"{half}.{number}.weight", "invertible_adapters")
            tensors[f"{half.lower()}_{name}_bias"] = _take(part, f"{half}.{number}.bias", "invertible_adapters")
    if part:
        raise ConverterError("E_CONVERT_SURPLUS", "tensors of no known use", where=where, found=", ".join(sorted(part)))
    options = {
        "inner": int(tensors["f_down"].shape[0]),
        "other_inner": int(tensors["g_down"].shape[0]),
        "first": int(tensors["f_up"].shape[0]),
        "second": int(tensors["g_up"].shape[0]),
        "activation": activation(config.get("non_linearity")),
    }
    inner = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "embeddings"]
    if len(inner) != 1:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED", "where the embeddings end is not known", where=type(model).__name__, found=inner
        )
    return [Entry(path=inner[0], kind=str(NICE["kind"]), config=options, tensors=tensors, document=NICE)]
