"""Kind documents for what AdapterHub computes and no built-in kind does; they travel with the package.

A *bottleneck* reads a sublayer's output h. The usual one (Pfeiffer) runs the layer's own norm before itself too, which
is a function of that norm: its host is the norm, whose input x is the sum of h and the residual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DORA", "NICE", "PFEIFFER", "Shape", "bottleneck"]

DORA: Mapping[str, Any] = {
    "kind": "ml.adapterhub.dora",
    "version": 1,
    "title": "DoRA as AdapterHub has it: norms without the factor, and the bias scaled with the weight",
    "reference": "arXiv:2402.09353",
    "hosts": ["linear"],
    "identity": True,
    "config": {"rank": {"type": "integer", "minimum": 1}, "scale": {"type": "number", "default": 1.0}},
    "tensors": {
        "down": {"shape": ["rank", "in"], "init": "kaiming_uniform"},
        "up": {"shape": ["out", "rank"], "init": "zeros"},
        "magnitude": {"shape": ["out"], "init": "norm(W, 1)"},
    },
    "equations": {
        "weight": "rows(magnitude / stop_gradient(norm(W + up @ down, 1))) * (W + scale * up @ down)",
        "bias": {"when": {"bias": True}, "expr": "b * magnitude / stop_gradient(norm(W + up @ down, 1))"},
    },
}

NICE: Mapping[str, Any] = {
    "kind": "ml.adapterhub.nice",
    "version": 1,
    "title": "Invertible coupling of the two halves of an embedding",
    "reference": "arXiv:2005.00052",
    "hosts": ["block"],
    "config": {
        "inner": {"type": "integer", "minimum": 1},
        "first": {"type": "integer", "minimum": 1, "description": "Width of the first half."},
        "second": {"type": "integer", "minimum": 1, "description": "Width of the second half."},
        "other_inner": {"type": "integer", "minimum": 1},
        "activation": {"type": "string", "default": "relu"},
    },
    "tensors": {
        "f_down": {"shape": ["inner", "second"], "init": "normal(0.02)"},
        "f_down_bias": {"shape": ["inner"], "init": "zeros"},
        "f_up": {"shape": ["first", "inner"], "init": "normal(0.02)"},
        "f_up_bias": {"shape": ["first"], "init": "zeros"},
        "g_down": {"shape": ["other_inner", "first"], "init": "normal(0.02)"},
        "g_down_bias": {"shape": ["other_inner"], "init": "zeros"},
        "g_up": {"shape": ["second", "other_inner"], "init": "normal(0.02)"},
        "g_up_bias": {"shape": ["second"], "init": "zeros"},
    },
    "equations": {
        "output": """
one = y[..., 0:first]
two = y[..., first:first + second]
new_one = one + linear(activation(linear(two, f_down, f_down_bias), activation), f_up, f_up_bias)
cat(new_one, two + linear(activation(linear(new_one, g_down, g_down_bias), activation), g_up, g_up_bias))
"""
    },
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which of the ways to compute a bottleneck it is.

    Attributes:
        twice: whether the layer's own norm runs before it too.
        before: whether a norm of its own does.
        after: whether a norm of its own runs after it: ``""``, ``"alone"``, or ``"sum"`` (with the residual in it).
        gated: whether a gate multiplies it.
    """

    twice: bool = False
    before: bool = False
    after: str = ""
    gated: bool = False

    @property
    def name(self) -> str:
        words = [
            "pfeiffer" if self.twice else "bottleneck",
            *(["prenorm"] if self.before else []),
            *([f"postnorm-{self.after}"] if self.after else []),
            *(["gated"] if self.gated else []),
        ]
        return "ml.adapterhub." + "-".join(words)


def bottleneck(shape: Shape) -> Mapping[str, Any]:
    """The document of a bottleneck."""
    tensors: dict[str, Any] = {
        "down": {"shape": ["bottleneck", "out"], "init": "kaiming_uniform"},
        "down_bias": {"shape": ["bottleneck"], "init": "zeros"},
        "up": {"shape": ["out", "bottleneck"], "init": "zeros"},
        "up_bias": {"shape": ["out"], "init": "zeros"},
    }
    for side in ("before", "after"):
        if getattr(shape, side):
            tensors[f"{side}_weight"] = {"shape": ["out"], "init": "ones"}
            tensors[f"{side}_bias"] = {"shape": ["out"], "init": "zeros"}
    if shape.gated:
        tensors |= {"gate": {"shape": ["out"], "init": "normal(0.02)"}, "gate_bias": {"shape": [1], "init": "zeros"}}
    lines = [f"z = {'base(x)' if shape.twice else 'y'}"]
    lines.append(f"n = {'layer_norm(z, before_weight, before_bias)' if shape.before else 'z'}")
    lines.append("h = scale * linear(activation(linear(n, down, down_bias), activation), up, up_bias)")
    if shape.gated:
        lines.append("g = h * mean(sigmoid(sum(z * gate, -1, keep=1) + gate_bias), -2, keep=1)")
    else:
        lines.append("g = h")
    own = {
        "": "g",
        "alone": "layer_norm(g, after_weight, after_bias)",
        "sum": "layer_norm(g + y, after_weight, after_bias)",
    }
    last = own[shape.after]
    if shape.twice:
        lines.append(f"base(x + {last})")
    else:
        lines.append(last if shape.after == "sum" else f"y + {last}")
    return {
        "kind": shape.name,
        "version": 1,
        "title": "A bottleneck between two runs of a layer's own norm" if shape.twice else "A bottleneck of AdapterHub",
        "reference": "arXiv:2005.00247",
        "hosts": ["norm"] if shape.twice else ["linear", "norm", "block"],
        "config": {
            "bottleneck": {"type": "integer", "minimum": 1},
            "activation": {"type": "string", "default": "relu"},
            "scale": {"type": "number", "default": 1.0},
        },
        "tensors": tensors,
        "equations": {"replace" if shape.twice else "output": "\n".join(lines)},
    }


PFEIFFER: Mapping[str, Any] = bottleneck(Shape(twice=True))
"""x is the sum of a sublayer's output and its residual; out = norm(x + up(act(down(norm(x)))))."""
