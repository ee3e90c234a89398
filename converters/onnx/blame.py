"""Which part of a model has no translation: the delta's kind with its equation and line, or the backbone."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from deltahub.converters.onnx.graphs import Graph
    from deltahub.kinds import Port
    from deltahub.sites import Site

__all__ = ["unsupported"]


def unsupported(model: nn.Module, graph: Graph, error: Exception, *, opset: int) -> ConverterError:
    """The error that says what could not be exported, as closely as can be found out."""
    reason = _first_line(error)
    for site, port in _live_ports(model):
        node = _failing(site, port, opset)
        if node is not None:
            place = node.meta.get("place")
            said = "" if place is None else str(place.error("E_ONNX_UNSUPPORTED", "no translation"))
            merged = site.bound.mergeable
            return ConverterError(
                "E_ONNX_UNSUPPORTED",
                f"kind {site.bound.kind.name!r} computes what ONNX cannot say",
                where=f"{site.path}, equation of {port.name}",
                found=f"{getattr(node.target, '__name__', node.target)}: {reason}",
                hint='export it merged: form="merged"' if merged else "this kind cannot be exported",
                also=said.splitlines()[1:],
            )
    return ConverterError(
        "E_ONNX_UNSUPPORTED",
        "the model cannot be exported",
        where=f"{type(model).__name__}, {graph.file}",
        found=reason,
        hint="try another task or opset; the cause says which operation it was",
    )


def _first_line(error: BaseException) -> str:
    """The innermost cause, which names the operation; what wraps it is instructions."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else ''}"


def _live_ports(model: nn.Module) -> list[tuple[Site, Port]]:
    """One site for each different equation that runs live."""
    from deltahub.injection import slot_of
    from deltahub.sites import Plan

    found: dict[int, tuple[Site, Port]] = {}
    for module in model.modules():
        slot = slot_of(module)
        plan = None if slot is None else slot.plan()
        if not isinstance(plan, Plan):
            continue
        for site in plan.weighted:
            found.update({id(p.graph): (site, p) for n, p in site.bound.ports.items() if n in {"weight", "bias"}})
        for site in plan.wrapped:
            live = {"input", "output", "replace"}
            found.update({id(p.graph): (site, p) for n, p in site.bound.ports.items() if n in live})
    return list(found.values())


class _Alone(nn.Module):
    """One equation by itself, with everything that it is given as an input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Any:
        return self.function(None, *values)


def _failing(site: Site, port: Port, opset: int) -> fx.Node | None:
    """The first node of an equation that does not export by itself; ``None`` if all do or if it needs its host."""
    width = site.bound.shape
    inputs = {
        "x": torch.randn(2, 3, width.d_in or 4),
        "y": torch.randn(2, 3, width.d_out or 4),
        "W": torch.randn(width.weight_shape or (1,)),
        "b": torch.randn(width.d_out or 1),
    }
    if port.uses & {"host", "base"}:
        return None
    holders = [node for node in port.graph.nodes if node.op == "placeholder"]
    given = [inputs[node.name] for node in holders[1:] if node.name in inputs]
    values = (*given, *(t.detach() for t in site.tensors()))
    last: list[fx.Node] = [node for node in port.graph.nodes if node.op == "call_function"]
    for node in last:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for one in port.graph.nodes:
            if one.op == "output":
                break
            copies[one] = graph.node_copy(one, copies.__getitem__)
            if one is node:
                break
        graph.output(copies[node])
        graph.eliminate_dead_code()
        if not _exports(_Alone(fx.GraphModule(nn.Module(), graph).forward), values, opset):
            return node
    return None


def _exports(module: nn.Module, values: tuple[Tensor, ...], opset: int) -> bool:
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            program = torch.export.export(module, values, strict=False)
            torch.onnx.export(program, dynamo=True, optimize=False, opset_version=opset, verbose=False)
    except Exception:
        return False
    return True
