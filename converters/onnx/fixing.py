"""Live exports by way of slots: the graph that any delta of these kinds fits, with this one put in for good.

Its trace does not depend on a rank or a scale, so it is there already for the next delta of the kind at these places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from deltahub.converters.onnx.graphs import Graph
from deltahub.converters.onnx.slots import check_order
from deltahub.converters.onnx.slotting import trace_slots
from deltahub.converters.onnx.swapping import slot_values
from deltahub.converters.onnx.tracing import Traced, Weight
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import onnx

__all__ = ["trace_fixed"]


def trace_fixed(
    model: nn.Module, graphs: Sequence[Graph], *, task: str, opset: int
) -> tuple[list[Traced], dict[str, Tensor]] | None:
    """Trace with slots and fill them; ``None`` where the active deltas need a graph of their own.

    Returns:
        The graphs, and the values that have become weights of theirs, by name.
    """
    from deltahub.composition import active_names, registry

    home = registry(model)
    names = [] if home is None else active_names(home)
    if home is None or not names or any(home[name].merged for name in names):
        return None
    deltas = [home[name] for name in names]
    try:
        slots, traces = trace_slots(model, graphs, deltas, task=task, opset=opset)
        each = [slot_values(slots, delta) for delta in deltas]
        check_order(slots, each, names)
    except ConverterError as error:
        if error.code in {"E_ONNX_SLOT", "E_ONNX_UNSUPPORTED", "E_ONNX_STATIC"}:
            return None  # the graph by itself may do; if not, its error says why
        raise
    values = {name: value for one in each for name, value in one.items()}
    if len(values) < sum(map(len, each)):
        return None
    return [_fixed(one, values) for one in traces], values


def _fixed(traced: Traced, values: Mapping[str, Tensor]) -> Traced:
    """Inputs that a delta fills become weights."""
    import onnx

    model = onnx.load_model_from_string(traced.data)
    graph = model.graph
    chosen = {name: values[name] for name in traced.inputs}
    for store in (graph.input, graph.initializer):
        for one in [one for one in store if one.name in chosen]:
            store.remove(one)
    graph.initializer.extend(_outside(name, value) for name, value in chosen.items())
    weights = {**traced.weights, **{name: Weight(name=name, transposed=False) for name in chosen}}
    return replace(traced, data=model.SerializeToString(), weights=weights, inputs=())


def _outside(name: str, value: Tensor) -> onnx.TensorProto:
    """A tensor whose place in the data file is filled in later."""
    import onnx
    from onnx.helper import np_dtype_to_tensor_dtype

    kind = np_dtype_to_tensor_dtype(value[:0].numpy().dtype if value.ndim else value.numpy().dtype)
    return onnx.TensorProto(
        name=name, data_type=kind, dims=list(value.shape), data_location=onnx.TensorProto.EXTERNAL
    )  # fmt: skip
