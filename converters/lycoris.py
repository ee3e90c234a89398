"""The methods that files of kohya, LyCORIS and diffusers hold, as kinds, both ways.

A *part* is what a file says of one module: its tensors by the names that LyCORIS gives them. A method is a line of a
table: the names that it is told by and a function that reads a part; lycoris_writing.py has the way back. Reading and
writing move values and never compute them, so what comes back is what went in, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltahub.converters.entries import Entry
from deltahub.converters.lycoris_kinds import NAMESPACE, document
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.kinds import HostShape

__all__ = ["PARAMETERS", "join", "read", "split"]


@dataclass(frozen=True, kw_only=True)
class _Method:
    """One method.

    Attributes:
        needs: names that tell it, all of which must be there.
        may: names that may be there too.
        read: gives the kind, its config and its tensors.
        outputs: axis of each tensor along which the module's outputs lie, where fused modules can be told apart.
    """

    needs: frozenset[str]
    may: frozenset[str]
    read: Callable[[_Reading], tuple[str, dict[str, Any], dict[str, Tensor]]]
    outputs: Mapping[str, int] | None = None


class _Reading:
    """A part while it is read: each tensor is shaped as its module needs it, or refused by name."""

    def __init__(self, part: Mapping[str, Tensor], shape: HostShape, where: str) -> None:
        self.part, self.shape, self.where = part, shape, where
        self.kernel = shape.kernel

    def __contains__(self, name: str) -> bool:
        return name in self.part

    def take(self, name: str, *sizes: int) -> Tensor:
        value = self.part[name]
        count = 1
        for size in sizes:
            count *= size
        if value.numel() != count:
            raise ConverterError(
                "E_CONVERT_SHAPE",
                "a tensor does not have the size that its module and its method give it",
                where=f"{self.where}.{name}",
                expected=list(sizes),
                found=list(value.shape),
            )
        return value.reshape(sizes)

    @property
    def d_in(self) -> int:
        return self._size(self.shape.d_in)

    @property
    def d_out(self) -> int:
        return self._size(self.shape.d_out)

    def _size(self, size: int | None) -> int:
        if size is None:
            raise ConverterError("E_CONVERT_SITE", "no such method fits this module", where=self.where)
        return size

    def length(self, name: str, axis: int = 0) -> int:
        value = self.part[name]
        if value.ndim <= axis:
            raise ConverterError(
                "E_CONVERT_SHAPE", "a tensor has too few axes", where=f"{self.where}.{name}", found=list(value.shape)
            )
        return int(value.shape[axis])

    def scale(self, rank: int) -> float:
        """Alpha over rank; as every tool has it, no alpha and an alpha of 0 mean a scale of 1."""
        alpha = float(self.part["alpha"]) if "alpha" in self.part else 0.0
        return alpha / rank if alpha != 0 else 1.0

    def magnitude(self, kind: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
        """The kind with magnitudes around it, where the file has them, and on which axis they are."""
        if "dora_scale" not in self.part:
            return kind, {}, {}
        value = self.part["dora_scale"]
        inner = value.ndim >= 2 and value.shape[0] == 1 and value.shape[1] == self.d_in and self.d_out != 1
        name = "dora" if kind == "lora" else f"{NAMESPACE}{kind}-dora"
        if inner:
            return name, {"axis": "in"}, {"magnitude_in": self.take("dora_scale", self.d_in)}
        return name, {"axis": "out"}, {"magnitude": self.take("dora_scale", self.d_out)}


def _locon(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    rank = r.length("lora_down.weight")
    config = {"rank": rank, "scale": r.scale(rank)}
    tensors = {"up": r.take("lora_up.weight", r.d_out, rank)}
    if "lora_mid.weight" in r:
        kind, more, magnitude = r.magnitude("locon")
        tensors["down"] = r.take("lora_down.weight", rank, r.d_in)
        tensors["core"] = r.take("lora_mid.weight", rank, rank, *r.kernel)
        return kind, config | more, tensors | magnitude
    kind, more, magnitude = r.magnitude("lora")
    tensors["down"] = r.take("lora_down.weight", rank, r.d_in, *r.kernel)
    if "lora_up.bias" in r:
        more["biased"] = True
        tensors["bias"] = r.take("lora_up.bias", r.d_out)
    return kind, config | more, tensors | magnitude


def _loha(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    tucker = "hada_t1" in r
    rank = r.length("hada_w1_b")
    tensors: dict[str, Tensor] = {}
    for i in (1, 2):
        if tucker:
            tensors[f"up_{i}"] = r.take(f"hada_w{i}_a", rank, r.d_out).T
            tensors[f"core_{i}"] = r.take(f"hada_t{i}", rank, rank, *r.kernel)
            tensors[f"inner_{i}"] = r.take(f"hada_w{i}_b", rank, r.d_in)
        else:
            tensors[f"up_{i}"] = r.take(f"hada_w{i}_a", r.d_out, rank)
            tensors[f"down_{i}"] = r.take(f"hada_w{i}_b", rank, r.d_in, *r.kernel)
    kind, more, magnitude = r.magnitude("loha")
    return kind, {"rank": rank, "scale": r.scale(rank), "tucker": tucker, **more}, tensors | magnitude


def _lokr(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    first = "whole" if "lokr_w1" in r else "low-rank"
    second = "whole" if "lokr_w2" in r else "tucker" if "lokr_t2" in r else "low-rank"
    for name in {"low-rank": ("lokr_w1_a", "lokr_w1_b")}.get(first, ()):
        _need(r, name)
    for name in () if second == "whole" else ("lokr_w2_a", "lokr_w2_b"):
        _need(r, name)
    rows = r.length("lokr_w1" if first == "whole" else "lokr_w1_a")
    columns = r.length("lokr_w1" if first == "whole" else "lokr_w1_b", 1)
    if r.d_out % rows or r.d_in % columns:
        raise ConverterError(
            "E_CONVERT_SHAPE",
            "the first matrix does not divide the module",
            where=r.where,
            expected=[r.d_out, r.d_in],
            found=[rows, columns],
        )
    rank = r.length("lokr_w1_b") if first == "low-rank" else 1 if second == "whole" else r.length("lokr_w2_b")
    tensors: dict[str, Tensor] = {}
    if first == "whole":
        tensors["w1"] = r.take("lokr_w1", rows, columns)
    else:
        tensors |= {"w1_up": r.take("lokr_w1_a", rows, rank), "w1_down": r.take("lokr_w1_b", rank, columns)}
    out, inner = r.d_out // rows, r.d_in // columns
    if second == "whole":
        tensors["w2"] = r.take("lokr_w2", out, inner, *r.kernel)
    elif second == "tucker":
        tensors["w2_up"] = r.take("lokr_w2_a", rank, out).T
        tensors["w2_core"] = r.take("lokr_t2", rank, rank, *r.kernel)
        tensors["w2_inner"] = r.take("lokr_w2_b", rank, inner)
    else:
        tensors["w2_up"] = r.take("lokr_w2_a", out, rank)
        tensors["w2_down"] = r.take("lokr_w2_b", rank, inner, *r.kernel)
    scale = 1.0 if first == second == "whole" else r.scale(rank)
    kind, more, magnitude = r.magnitude("lokr")
    config = {"rows": rows, "columns": columns, "rank": rank, "first": first, "second": second, "scale": scale}
    return kind, config | more, tensors | magnitude


def _need(r: _Reading, name: str) -> None:
    if name not in r:
        raise ConverterError("E_CONVERT_MISSING", "a tensor is missing", where=r.where, found=name)


def _glora(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    rank = r.length("a2.weight")
    tensors = {"a_up": r.take("a1.weight", r.d_in, rank), "a_down": r.take("a2.weight", rank, r.d_in)}
    tensors |= {"b_up": r.take("b1.weight", r.d_out, rank), "b_down": r.take("b2.weight", rank, r.d_in, *r.kernel)}
    return "glora-lycoris", {"rank": rank, "scale": r.scale(rank)}, tensors


def _oft(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    blocks = r.part["oft_blocks"]
    size = int(blocks.shape[-1])
    bound = (float(r.part["alpha"]) if "alpha" in r else 0.0) * r.d_out
    if bound > 0 and float((blocks - blocks.mT).double().norm()) + 1e-8 > bound:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "the rotation is larger than its constraint, which would scale it down by its own size",
            where=f"{r.where}.alpha",
            found=bound,
            hint="scale oft_blocks down to the constraint and save the file again",
        )
    config: dict[str, Any] = {"block": size, "rescale": "rescale" in r}
    tensors: dict[str, Tensor] = {}
    if blocks.ndim == 4:
        config["factors"] = int(blocks.shape[0])
        tensors["blocks"] = r.take("oft_blocks", int(blocks.shape[0]), r.d_out // size, size, size)
    else:
        tensors["blocks"] = r.take("oft_blocks", r.d_out // size, size, size)
    if "rescale" in r:
        tensors["gain"] = r.take("rescale", r.d_out)
    return f"{NAMESPACE}{'boft' if blocks.ndim == 4 else 'oft'}", config, tensors


def _ia3(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    axis = "in" if bool(r.part["on_input"]) else "out"
    name, size = ("offset_in", r.d_in) if axis == "in" else ("offset", r.d_out)
    return f"{NAMESPACE}ia3", {"axis": axis}, {name: r.take("weight", size)}


def _full(r: _Reading) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    import torch

    sizes = r.shape.weight_shape
    weight, bias = ("w_norm", "b_norm") if "w_norm" in r else ("diff", "diff_b")
    if sizes is None:
        raise ConverterError("E_CONVERT_SITE", "this module has no weight", where=r.where)
    tensors = {"weight": r.take(weight, *sizes)}
    if r.shape.bias:  # a bias that the file leaves alone is moved by nothing
        tensors["bias"] = r.take(bias, r.d_out) if bias in r else torch.zeros(r.d_out, dtype=r.part[weight].dtype)
    elif bias in r:
        raise ConverterError("E_CONVERT_SURPLUS", "the module has no bias", where=r.where, found=bias)
    return "diff", {"scale": 1.0}, tensors


def _some(*names: str) -> frozenset[str]:
    return frozenset(names)


_METHODS = (
    _Method(
        needs=_some("lora_up.weight", "lora_down.weight"),
        may=_some("lora_mid.weight", "lora_up.bias", "alpha", "dora_scale"),
        read=_locon,
        outputs={"lora_up.weight": 0, "lora_up.bias": 0, "dora_scale": 0},
    ),
    _Method(
        needs=_some("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        may=_some("hada_t1", "hada_t2", "alpha", "dora_scale"),
        read=_loha,
        outputs={"hada_w1_a": 0, "hada_w2_a": 0, "dora_scale": 0},
    ),
    _Method(
        needs=_some(),
        may=_some(
            "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale"
        ),
        read=_lokr,
    ),
    _Method(
        needs=_some("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        may=_some("alpha"),
        read=_glora,
        outputs={"b1.weight": 0},
    ),
    _Method(needs=_some("oft_blocks"), may=_some("rescale", "alpha"), read=_oft),
    _Method(needs=_some("weight", "on_input"), may=_some(), read=_ia3),
    _Method(needs=_some("diff"), may=_some("diff_b"), read=_full, outputs={"diff": 0, "diff_b": 0}),
    _Method(needs=_some("w_norm"), may=_some("b_norm"), read=_full, outputs={"w_norm": 0, "b_norm": 0}),
)
PARAMETERS = frozenset().union(*(method.needs | method.may for method in _METHODS))
"""All names that a part's tensors may have."""


def _method(part: Mapping[str, object], where: str) -> _Method:
    for method in _METHODS:
        told = method.needs or {"lokr_w1", "lokr_w1_a"} & part.keys()
        if told and method.needs <= part.keys():
            surplus = sorted(part.keys() - method.needs - method.may)
            if surplus:
                raise ConverterError(
                    "E_CONVERT_SURPLUS", "tensors of no known use", where=where, found=", ".join(surplus)
                )
            return method
    for method in _METHODS:
        if method.needs & part.keys():
            missing = ", ".join(sorted(method.needs - part.keys()))
            raise ConverterError("E_CONVERT_MISSING", "tensors of a method are missing", where=where, found=missing)
    raise ConverterError(
        "E_CONVERT_KIND", "no method here has such tensors", where=where, found=", ".join(sorted(part))
    )


def read(part: Mapping[str, Tensor], path: str, shape: HostShape, where: str) -> Entry:
    """What a part computes at a module.

    Args:
        part: its tensors by LyCORIS' names.
        path: the module.
        shape: of the module.
        where: the part's own name, for messages.

    Raises:
        ConverterError: the tensors are of no method, incomplete, too many, or do not fit the module.
    """
    kind, config, tensors = _method(part, where).read(_Reading(part, shape, where))
    whole = {name: value.contiguous() for name, value in tensors.items()}
    return Entry(path=path, kind=kind, config=config, tensors=whole, document=document(kind))


def split(part: Mapping[str, Tensor], sizes: list[int], *, swap: bool, where: str) -> list[dict[str, Tensor]]:
    """A part of a fused module as one part for each of ours: factors of the inputs are shared, those of outputs cut.

    Raises:
        ConverterError: ``E_CONVERT_UNSUPPORTED`` for a method that mixes the outputs of all.
    """
    import torch

    method = _method(part, where)
    inner = "dora_scale" in part and part["dora_scale"].shape[0] != sum(sizes)
    if method.outputs is None or inner or "hada_t1" in part:
        raise ConverterError(
            "E_CONVERT_UNSUPPORTED",
            "this method mixes the outputs of modules that are one here and several in the backbone",
            where=where,
            found=", ".join(sorted(part)),
            hint="merge it into the original model",
        )
    parts: list[dict[str, Tensor]] = [{} for _ in sizes]
    for name, value in part.items():
        if name not in method.outputs:
            for one in parts:
                one[name] = value
            continue
        if value.shape[0] != sum(sizes):
            raise ConverterError(
                "E_CONVERT_SHAPE",
                "a fused module has another number of outputs",
                where=f"{where}.{name}",
                expected=sum(sizes),
                found=int(value.shape[0]),
            )
        whole = torch.cat(value.chunk(2)[::-1]) if swap else value
        at = 0
        for one, size in zip(parts, sizes, strict=True):
            one[name] = whole.narrow(0, at, size)
            at += size
    return parts


def join(parts: list[dict[str, Tensor]], *, swap: bool) -> dict[str, Tensor] | None:
    """The reverse of :func:`split`; ``None`` where the shared factors are not shared."""
    import torch

    first = parts[0]
    outputs = _method(first, "").outputs
    if outputs is None or any(one.keys() != first.keys() for one in parts):
        return None
    found: dict[str, Tensor] = {}
    for name, value in first.items():
        if name in outputs:
            whole = torch.cat([one[name] for one in parts])
            found[name] = torch.cat(whole.chunk(2)[::-1]) if swap else whole
        elif all(torch.equal(one[name], value) for one in parts):
            found[name] = value
        else:
            return None
    return found
