"""Tracing: from a module to a graph without weights, and the same graph again from a cache.

A trace never computes with the weights: each stays a named initializer whose place in a file is filled in later. So one
trace serves every delta of the same shape on a backbone, and whatever is merged into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltahub.converters.onnx.graphs import Graph, axis, symbolic
from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["SCALAR_PLACE", "Traced", "Weight", "trace", "values_of"]

SCHEMA = 1
SCALAR_PLACE = "deltahub-weights"
"""Where a cached graph says that its weights are; replaced when the graph is written."""
_WEIGHTS = "deltahub.weights"
_KNOWN_CODE = {"transformers", "diffusers", "timm", "sentence_transformers", "torch", "deltahub"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """An initializer that is a tensor of the model.

    Attributes:
        name: the tensor's name in the model.
        transposed: whether the graph holds it with its two axes exchanged, as a product wants it.
    """

    name: str
    transposed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """A graph without its weights: the serialised model, and what each of its external initializers is.

    Attributes:
        data: the model.
        weights: by the name of the initializer.
        cached: whether it came from the cache.
        inputs: slots that it has.
    """

    data: bytes
    weights: Mapping[str, Weight]
    cached: bool = False
    inputs: tuple[str, ...] = ()


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything of a model that can become an initializer, by name; tied tensors under all their names."""
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def trace(model: nn.Module, graph: Graph, *, opset: int, dtype: torch.dtype, key: str | None = None) -> Traced:
    """Trace one graph of a model, or take it from the cache.

    Args:
        model: with the deltas that stay live.
        graph: its inputs and outputs.
        opset: version of the operators.
        dtype: of floating inputs.
        key: what the result depends on besides the code; ``None`` to keep nothing.

    Raises:
        ConverterError: ``E_ONNX_UNSUPPORTED`` where something has no translation, ``E_ONNX_STATIC`` where an axis that
            is meant to vary came out as a number.
    """
    place = None if key is None else _place(key, graph, opset, dtype)
    if place is not None and (found := _load(place)) is not None:
        return found
    with _quiet():
        traced = _finish(_exported(model, graph, opset, dtype), graph, model)
    if place is not None:
        _store(place, traced)
    return traced


def _exported(model: nn.Module, graph: Graph, opset: int, dtype: torch.dtype) -> ir.Model:
    module = graph.module(model)
    sizes = graph.sizes[0]
    samples = graph.samples(sizes, dtype)
    dims = tuple(
        {i: torch.export.Dim.DYNAMIC for i, dim in enumerate(one.dims) if symbolic(dim)} for one in graph.inputs
    )
    dims = _bounded(graph, dims)
    try:
        with torch.no_grad():
            program = torch.export.export(
                module, tuple(samples.values()), dynamic_shapes={"values": dims}, strict=False
            )
            # What the trace assumed of sizes is checked by running other sizes; as code it stumbles over empty inputs.
            program._guards_code = []
            _drop_idle_squeezes(program)
            done = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=[one.name for one in graph.inputs],
                output_names=[one.name for one in graph.outputs],
                verbose=False,
            )
    except DeltaHubError:
        raise
    except Exception as error:
        from deltahub.converters.onnx.blame import unsupported

        raise unsupported(model, graph, error, opset=opset) from error
    assert done is not None
    return done.model


def _bounded(graph: Graph, dims: tuple[dict[int, Any], ...]) -> tuple[dict[int, Any], ...]:
    """Axes with a greatest size get a name of their own; one for all that are called so."""
    named = {name: torch.export.Dim(name, max=limit) for name, limit in graph.limits.items()}
    return tuple(
        {i: named.get(str(one.dims[i]), dim) for i, dim in found.items()}
        for one, found in zip(graph.inputs, dims, strict=True)
    )


def _drop_idle_squeezes(program: Any) -> None:
    """``squeeze`` of an axis that is not 1 does nothing in PyTorch and is an error in ONNX."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.squeeze.dim:
            value = node.args[0].meta["val"]
            if value.shape[node.args[1]] != 1:
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
    module.recompile()


def _finish(model: ir.Model, graph: Graph, owner: nn.Module) -> Traced:
    """Fold what is constant, name what is weight, forget where it was made."""
    import onnx_ir as ir
    from onnx_ir.passes.common import (
        ClearMetadataAndDocStringPass,
        CommonSubexpressionEliminationPass,
        RemoveUnusedNodesPass,
    )
    from onnxscript import optimizer

    known = values_of(owner)
    weights: dict[str, Weight] = {}
    for name in list(model.graph.initializers):
        plain = name.removeprefix("model.")
        if plain in known:
            weights[name] = Weight(name=plain, transposed=False)
    optimizer.fold_constants(
        model,
        should_fold=lambda node: False if any(v is not None and v.name in weights for v in node.inputs) else None,
    )
    for step in (CommonSubexpressionEliminationPass(), RemoveUnusedNodesPass()):
        step(model)
    _name_axes(model, graph)
    weights = _native(model, {k: v for k, v in weights.items() if k in model.graph.initializers})
    ClearMetadataAndDocStringPass()(model)
    inner = model.graph
    renamed: dict[str, Weight] = {}
    for name, weight in weights.items():
        value = inner.initializers[name]
        if not value.uses():
            del inner.initializers[name]
            continue
        assert value.const_value is not None
        tensor = ir.ExternalTensor(
            SCALAR_PLACE, 0, 0, value.const_value.dtype, shape=_turned(value.const_value.shape, weight), name=name
        )
        value.const_value = tensor
        value.shape, value.dtype = _turned(value.shape, weight), tensor.dtype
        renamed[name] = weight
    for node in inner.all_nodes():
        for out in node.outputs:
            if out not in inner.outputs:
                out.shape = None
    proto = ir.to_proto(model)
    return Traced(data=proto.SerializeToString(), weights=renamed)


def _turned(shape: Any, weight: Weight) -> ir.Shape:
    import onnx_ir as ir

    found = [int(dim) for dim in shape]
    return ir.Shape(found[::-1] if weight.transposed else found)


def _native(model: ir.Model, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Weights that are only ever used transposed are stored so: a product then reads the file as it lies."""
    found = dict(weights)
    for name, weight in weights.items():
        value = model.graph.initializers[name]
        users = list(value.uses())
        turns = [node for node, _ in users]
        if not users or not all(_is_turn(node) for node in turns):
            continue
        for node in turns:
            out = node.outputs[0]
            for user, index in list(out.uses()):
                user.replace_input_with(index, value)
            model.graph.remove(node, safe=True)
        found[name] = Weight(name=weight.name, transposed=True)
    return found


def _is_turn(node: Any) -> bool:
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
        return False
    perm = node.attributes.get("perm")
    return perm is not None and list(perm.value) == [1, 0]


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Axes get the names that are documented; one that was to vary and is a number is an error."""
    import onnx_ir as ir

    pairs: list[tuple[Any, Any]] = [
        *zip(model.graph.inputs, graph.inputs, strict=True),
        *zip(model.graph.outputs, graph.outputs, strict=True),
    ]
    for value, said in pairs:
        if value.shape is None:
            continue
        dims: list[Any] = []
        for dim, wanted in zip(value.shape, said.dims, strict=True):
            if symbolic(wanted) and isinstance(dim, int) and len(axis(wanted)) == 1:
                raise ConverterError(
                    "E_ONNX_STATIC",
                    "an axis that should vary came out of the trace as a number",
                    where=f"{graph.file}, {said.name}, axis {wanted}",
                    found=dim,
                    hint="the model computes with this size; no graph can be made that takes others",
                )
            dims.append(str(wanted) if symbolic(wanted) else int(dim) if isinstance(dim, int) else None)
        value.shape = ir.Shape(dims)


# --- the cache


def _place(key: str, graph: Graph, opset: int, dtype: torch.dtype) -> Any:
    from deltahub.identity.stamps import cache_folder

    facts = [
        SCHEMA, key, graph.file, opset, str(dtype), [(i.name, i.dims) for i in graph.inputs],
        [(o.name, o.dims) for o in graph.outputs], [dict(s) for s in graph.sizes], _versions(),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()
    return cache_folder() / "onnx" / f"{digest}.onnx"


def _versions() -> list[str]:
    found = []
    for name in ("torch", "onnx", "onnxscript", "onnx-ir", "transformers", "diffusers", "sentence-transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return found


def structure(model: nn.Module, live: Iterable[Any], task: str) -> str | None:
    """What a trace depends on: the module tree, its configuration, and the deltas that stay in it.

    ``None`` where a module's code is in no library whose version says what it does.
    """
    from deltahub.composition import registry
    from deltahub.injection import slot_of
    from deltahub.sites import Site

    tree = hashlib.sha256()
    for name, module in model.named_modules():
        slot = slot_of(module)
        cls = type(module) if slot is None else slot.base
        if cls.__module__.partition(".")[0] not in _KNOWN_CODE or "<locals>" in cls.__qualname__:
            return None
        if isinstance(module, Site):
            continue
        tree.update(f"{name} {cls.__module__}.{cls.__qualname__} {module.extra_repr()}\n".encode())
        config = getattr(module, "config", None)
        if config is not None:
            fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            private = ("_name_or_path", "transformers_version")
            text = json.dumps({k: v for k, v in fields.items() if k not in private}, sort_keys=True, default=str)
            tree.update(f"{text} {getattr(config, '_attn_implementation', '')}\n".encode())
        for what in (module._parameters, module._buffers):
            for key, value in what.items():
                if value is not None:
                    tree.update(f"  {key} {tuple(value.shape)} {value.dtype}\n".encode())
    home = registry(model)
    for site in live:
        bound = site.bound
        shapes = [(n, tuple(t.shape)) for n, t in zip(site.names, site.tensors(), strict=True)]
        strength = 1.0 if home is None else home.switch.strength.get(site.delta, 1.0)
        facts = [site.key, site.path, json.dumps(dict(bound.kind.document.source), sort_keys=True, default=str)]
        tree.update(repr([*facts, sorted(bound.config.items()), shapes, strength, bound.shape]).encode())
    return f"{task} {tree.hexdigest()}"


def _load(place: Any) -> Traced | None:
    """A cached graph, if it is whole."""
    import onnx

    try:
        data = place.read_bytes()
        model = onnx.load_model_from_string(data)
        said = {entry.key: entry.value for entry in model.metadata_props}
        weights = {name: Weight(name=w[0], transposed=w[1]) for name, w in json.loads(said[_WEIGHTS]).items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    except Exception as error:
        if type(error).__name__ != "DecodeError":
            raise
        return None
    return Traced(data=data, weights=weights, cached=True)


def _store(place: Any, traced: Traced) -> None:
    """Keep a graph; a cache that cannot be written is no error."""
    import secrets

    import onnx

    model = onnx.load_model_from_string(traced.data)
    model.metadata_props.add(
        key=_WEIGHTS, value=json.dumps({name: [w.name, w.transposed] for name, w in traced.weights.items()})
    )
    beside = place.with_name(f".{secrets.token_hex(6)}.part")
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(model.SerializeToString())
        os.replace(beside, place)  # noqa: PTH105


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of what it skips and where; an error says what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
