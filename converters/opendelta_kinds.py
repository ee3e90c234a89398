"""What each delta of OpenDelta is here: its tensors and configuration as the site of a kind.

OpenDelta's low-rank adapters map rows and the kinds here map columns, so that factors are transposed. What a file
leaves out is what OpenDelta's own configuration has by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from deltahub.converters.base import Base
from deltahub.converters.entries import Entry
from deltahub.converters.hypercomplex import layer, same_rank
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["READERS", "added_bias", "fold", "prefixes", "take"]

_ACTIVATIONS = {"gelu_orig": "gelu", "leakyrelu": "leaky_relu", "swish": "silu"}
_DEFAULT_ACTIVATIONS = {"compacter": "relu"}
_CROSS = ("EncDecAttention", "encoder_attn", "crossattention")


def take(tensors: dict[str, Tensor], name: str, path: str) -> Tensor:
    """A tensor that must be there.

    Raises:
        ConverterError: ``E_CONVERT_MISSING``.
    """
    if name not in tensors:
        raise ConverterError("E_CONVERT_MISSING", "a tensor is missing", where=path, found=name)
    return tensors.pop(name)


def added_bias(path: str, value: Tensor) -> Entry:
    """A bias on a module that has none of its own."""
    return Entry(path=path, kind="bias", config={"scale": 1.0}, tensors={"value": value}, group="bitfit")


def _lora(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    down, up = take(tensors, "lora_A", path), take(tensors, "lora_B", path)
    alpha, named = config.get("lora_alpha", 16), config.get("lora_r", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or named != down.shape[0]:
        raise ConverterError(
            "E_CONVERT_RANK",
            "rank or alpha are missing or contradict the tensors",
            where=path,
            expected=list(down.shape),
            found=f"lora_r={named}, lora_alpha={alpha}",
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
    name = config.get("non_linearity") or _DEFAULT_ACTIVATIONS.get(str(config.get("delta_type")), "gelu_new")
    if not isinstance(name, str):
        raise ConverterError("E_CONVERT_CONFIG", "the activation is no name", where="non_linearity", found=name)
    return _ACTIVATIONS.get(name.lower(), name.lower())


def _adapter(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    values = {
        "down": take(tensors, "modulelist.down_proj.weight", path),
        "down_bias": take(tensors, "modulelist.down_proj.bias", path),
        "up": take(tensors, "modulelist.up_proj.weight", path),
        "up_bias": take(tensors, "modulelist.up_proj.bias", path),
    }
    options = {"bottleneck": int(values["down"].shape[0]), "activation": _activation(config)}
    return Entry(path=path, kind="adapter", config=options, tensors=values, group=group)


def _parallel(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    """From a module's input to its own output; or, of a feed-forward network, to that of its second layer.

    OpenDelta's factor is 1, whatever its configuration says.
    """
    found = _adapter(path, tensors, config, base, group)
    block = base.arch.host(path).shape.family == "block"
    return Entry(
        path=path if block else _second(path, base),
        kind="parallel-adapter",
        config=found.config,
        tensors=found.tensors,
        group=group,
        source=None if block else path,
    )


def _second(path: str, base: Base) -> str:
    """The second layer of the feed-forward network whose first one this is."""
    from deltahub.errors import TargetError
    from deltahub.roles import targets_of

    modules = {name: module for name, module in base.arch.model.named_modules() if name}
    try:
        first, second = (
            [target.path for target in targets_of(base.arch.model, role, modules)] for role in ("mlp.up", "mlp.down")
        )
    except TargetError:
        first, second = [], []
    if path not in first or len(first) != len(second):
        raise ConverterError(
            "E_CONVERT_KIND",
            "this parallel adapter begins at one module and ends at another, which the file does not name",
            where=path,
        )
    return second[first.index(path)]


def _low_rank(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    values: dict[str, Tensor] = {}
    for side in ("down", "up"):
        values[f"{side}_left"] = take(tensors, f"{side}_sampler.W_right", path).T.contiguous()
        values[f"{side}_right"] = take(tensors, f"{side}_sampler.W_left", path).T.contiguous()
        values[f"{side}_bias"] = take(tensors, f"{side}_sampler.b", path)
    bottleneck, rank = values["down_left"].shape
    options = {"bottleneck": int(bottleneck), "rank": int(rank), "activation": _activation(config)}
    return Entry(path=path, kind="low-rank-adapter", config=options, tensors=values, group=group)


def _compacter(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    values: dict[str, Tensor] = {}
    for side in ("down", "up"):
        values |= _hypercomplex(side, tensors, f"{side}_sampler.", path)
    options = {
        "bottleneck": int(values["down_bias"].shape[0]),
        "division": int(values["down_rule"].shape[0]),
        "rank": same_rank(values),
        "activation": _activation(config),
    }
    return Entry(path=path, kind="compacter", config=options, tensors=values, group=group)


def _hypercomplex(side: str, tensors: dict[str, Tensor], prefix: str, path: str) -> dict[str, Tensor]:
    import torch

    if f"{prefix}phm_rule_left" in tensors:
        rule = torch.bmm(take(tensors, f"{prefix}phm_rule_left", path), take(tensors, f"{prefix}phm_rule_right", path))
    else:
        rule = take(tensors, f"{prefix}phm_rule", path)
    right: Tensor | None
    if f"{prefix}W" in tensors:
        left, right = take(tensors, f"{prefix}W", path), None
    else:
        left, right = take(tensors, f"{prefix}W_left", path), take(tensors, f"{prefix}W_right", path)
    return layer(side, rule, left, right, tensors.pop(f"{prefix}b", None))


def _bitfit(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    return added_bias(path, take(tensors, "bias", path))


def _prefix(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    key, value = take(tensors, "past_key", path), take(tensors, "past_value", path)
    return _attended(_attention(path, base), key, value, base)


def _prompt(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base, group: str) -> Entry:
    """Embeddings before those of the tokens of a whole model, or of an encoder."""
    from deltahub.prompting import transformer_of

    embedding = take(tensors, "soft_embeds", path)
    inside = [
        name
        for name, module in base.arch.model.named_modules()
        if (name == path or name.startswith(f"{path}." if path else "")) and transformer_of(type(module)) is not None
    ]
    if not inside:
        raise ConverterError(
            "E_CONVERT_TARGET", "no transformer that takes a prompt is here", where=path or "the model"
        )
    known = transformer_of(type(base.arch.model.get_submodule(inside[0])))
    root = type(base.arch.model).__name__
    if known is not None and known.positions == "counted" and root.endswith("ForSequenceClassification"):
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "this head reads the first position, which is the prompt's in OpenDelta and the first token's here",
            where=f"{inside[0]} ({root})",
        )
    options = {"length": int(embedding.shape[0])}
    return Entry(path=inside[0], kind="prompt", config=options, tensors={"embedding": embedding}, group="prompt")


def _attended(path: str, key: Tensor, value: Tensor, base: Base) -> Entry:
    """A prefix of one attention; on T5 with OpenDelta's own way with the bias of relative positions."""
    module = base.arch.model.get_submodule(path)
    known = _known_attention(module)
    options: dict[str, Any] = {"length": int(key.shape[0])}
    if known.bias:
        # Its prefix counts among the positions in the first layer; the others never see the first one's bias.
        options["relative_bias"] = "all" if getattr(module, known.bias, False) else "none"
    tensors = {"key": key.contiguous(), "value": value.contiguous()}
    return Entry(path=path, kind="prefix", config=options, tensors=tensors, group="prefix")


def _known_attention(module: Any) -> Any:
    from deltahub.attending import attention_of

    return attention_of(type(module))


def _attention(path: str, base: Base) -> str:
    """The attention that a prefix belongs to: the module that the file names, or the one inside it."""
    try:
        root = base.arch.model.get_submodule(path)
    except AttributeError:
        raise ConverterError("E_CONVERT_TARGET", "the backbone has no such module", where=path) from None
    inner = [name for name, module in root.named_modules() if _known_attention(module)]
    if len(inner) != 1:
        raise ConverterError(
            "E_CONVERT_TARGET",
            "this is no attention that can attend to a prefix",
            where=f"{path} ({type(root).__name__})",
            found=", ".join(inner) or None,
        )
    return f"{path}.{inner[0]}" if inner[0] else path


def fold(tensors: dict[str, Tensor], path: str) -> Tensor:
    """The network of a reparametrised prefix, computed once: ``[length, 2 · layers · width]``."""
    import torch

    embedding = take(tensors, "wte.weight", path)
    inner, inner_bias = take(tensors, "control_trans.0.weight", path), take(tensors, "control_trans.0.bias", path)
    outer, outer_bias = take(tensors, "control_trans.2.weight", path), take(tensors, "control_trans.2.bias", path)
    try:
        hidden = torch.tanh(torch.nn.functional.linear(embedding, inner, inner_bias))
        return torch.nn.functional.linear(hidden, outer, outer_bias)
    except RuntimeError as error:
        raise ConverterError("E_CONVERT_SHAPE", "these are not the layers of one network", where=path) from error


def prefixes(path: str, tensors: dict[str, Tensor], config: Mapping[str, Any], base: Base) -> list[Entry]:
    """All attentions that one reparametrised prefix is for; the file names only the first of them."""
    whole = fold(tensors, path)
    sites = _asked(config, base)
    width, left = divmod(whole.shape[1], 2 * len(sites) or 1)
    if not sites or left or not (sites[0] == path or sites[0].startswith(f"{path}.")):
        raise ConverterError(
            "E_CONVERT_TARGET",
            "what this prefix is for does not follow from the file",
            where=path,
            expected=f"{whole.shape[1]} numbers for all layers",
            found=f"{len(sites)} attentions, the first one {sites[0] if sites else None}",
        )
    layers = whole.view(whole.shape[0], len(sites), 2, width)
    return [_attended(site, layers[:, i, 0], layers[:, i, 1], base) for i, site in enumerate(sites)]


def _asked(config: Mapping[str, Any], base: Base) -> list[str]:
    """The attentions that ``modified_modules`` means, in the model's order."""
    names = config.get("modified_modules") or ["attn@"]
    if not isinstance(names, list) or not all(isinstance(name, str) and not name.startswith("[r]") for name in names):
        raise ConverterError(
            "E_CONVERT_CONFIG",
            "the modules of a prefix have to be a list of names",
            where="modified_modules",
            found=names,
        )
    every = [path for path, module in base.arch.model.named_modules() if path and _known_attention(module)]
    common = config.get("common_structure", True) and any("@" in name for name in names)
    if common:
        own = [path for path in every if not any(cross in path for cross in _CROSS)]
        return [path for path in own if any(_meant(name, path) for name in names)]
    return [path for path in every if any(f".{path}.".find(f".{name}.") >= 0 for name in names)]


def _meant(name: str, path: str) -> bool:
    """Whether a name of OpenDelta's common structure, such as ``encoder@.block@.0.attn@``, means an attention."""
    parts = name.replace("@", "").split(".")
    if parts[-1] != "attn":
        return False
    known = {"encoder", "decoder"} & set(parts)
    numbers = [part for part in parts if part.isdecimal()]
    own = path.split(".")
    return known <= set(own) and all(number in own for number in numbers)


Reader = Callable[[str, dict[str, "Tensor"], Mapping[str, Any], Base, str], Entry]
READERS: Mapping[str, Reader] = {
    "lora": _lora,
    "adapter": _adapter,
    "parallel_adapter": _parallel,
    "parallel": _parallel,
    "low_rank_adapter": _low_rank,
    "lowrankadapter": _low_rank,
    "low": _low_rank,
    "compactor": _compacter,
    "compacter": _compacter,
    "bitfit": _bitfit,
    "prefix": _prefix,
    "soft_prompt_layer": _prompt,
}
"""By the name that a delta has in a key; ``low`` and ``parallel`` are what a third one of a name is called."""
