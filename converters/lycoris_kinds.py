"""Kinds that only LyCORIS has: their documents travel with the packages.

LyCORIS stores a rotation as whole matrices of which only the skew part counts, a factor as its distance from one, and
may put magnitudes (DoRA) around any of its low-rank methods. The kinds here hold the very tensors of such files, so
that a file goes in and out byte for byte.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

__all__ = ["NAMESPACE", "document"]

NAMESPACE = "com.github.kohakublueleaf."

_OWN = {
    "com.github.kohakublueleaf.oft": """
kind = "com.github.kohakublueleaf.oft"
version = 1
title = "Rotation of the outputs, block by block, by the skew part of whole matrices"
reference = "arXiv:2306.07280"
hosts = ["linear", "conv"]
identity = true

[config.block]
type = "integer"
minimum = 1
maximum = 4096
[config.rescale]
type = "boolean"
default = false

[tensors.blocks]
shape = ["out / block", "block", "block"]
init = "zeros"
[tensors.gain]
shape = ["out"]
init = "ones"
when = { rescale = true }

[[equations.weight]]
when = { rescale = false }
expr = \"\"\"
parts = rearrange(W, '(k n) ... -> k n ...', n=block)
turn = cayley(transpose(blocks, 1, 2) - blocks)
rearrange(einsum(turn, parts, 'k m n, k n ... -> k m ...'), 'k m ... -> (k m) ...')
\"\"\"
[[equations.weight]]
when = { rescale = true }
expr = \"\"\"
parts = rearrange(W, '(k n) ... -> k n ...', n=block)
turn = cayley(transpose(blocks, 1, 2) - blocks)
rows(gain) * rearrange(einsum(turn, parts, 'k m n, k n ... -> k m ...'), 'k m ... -> (k m) ...')
\"\"\"
""",
    "com.github.kohakublueleaf.boft": """
kind = "com.github.kohakublueleaf.boft"
version = 1
title = "Rotation of the outputs by butterfly factors, by the skew part of whole matrices"
reference = "arXiv:2311.06243"
hosts = ["linear", "conv"]
identity = true

[config.block]
type = "integer"
minimum = 2
maximum = 4096
[config.factors]
type = "integer"
minimum = 1
maximum = 16
[config.rescale]
type = "boolean"
default = false

[tensors.blocks]
shape = ["factors", "out / block", "block", "block"]
init = "zeros"
[tensors.gain]
shape = ["out"]
init = "ones"
when = { rescale = true }

[[equations.weight]]
when = { rescale = false }
expr = \"\"\"
parts = rearrange(blocks, 'f k (s t) (u v) -> f k (t s) (v u)', t=2, v=2)
r = cayley(parts - transpose(parts, 2, 3))
whole = chain(rearrange(block_diag(r[factors - 1 - i]), '(g h s t) (k l u v) -> (g s h t) (k u l v)', h=2 ** (factors - 1 - i), l=2 ** (factors - 1 - i), s=2, u=2, t=block // 2, v=block // 2) for i in range(factors))
einsum(whole, W, 'o p, p ... -> o ...')
\"\"\"
[[equations.weight]]
when = { rescale = true }
expr = \"\"\"
parts = rearrange(blocks, 'f k (s t) (u v) -> f k (t s) (v u)', t=2, v=2)
r = cayley(parts - transpose(parts, 2, 3))
whole = chain(rearrange(block_diag(r[factors - 1 - i]), '(g h s t) (k l u v) -> (g s h t) (k u l v)', h=2 ** (factors - 1 - i), l=2 ** (factors - 1 - i), s=2, u=2, t=block // 2, v=block // 2) for i in range(factors))
rows(gain) * einsum(whole, W, 'o p, p ... -> o ...')
\"\"\"
""",  # noqa: E501
    "com.github.kohakublueleaf.ia3": """
kind = "com.github.kohakublueleaf.ia3"
version = 1
title = "A factor for every output or input of the weight, kept as its distance from one"
reference = "arXiv:2205.05638"
hosts = ["linear", "conv"]
identity = true

[config.axis]
type = "string"
enum = ["out", "in"]
default = "out"

[tensors.offset]
shape = ["out"]
init = "zeros"
when = { axis = "out" }
[tensors.offset_in]
shape = ["in"]
init = "zeros"
when = { axis = "in" }

[[equations.weight]]
when = { axis = "out" }
expr = "W * rows(1 + offset)"
[[equations.weight]]
when = { axis = "in" }
expr = "W * columns(1 + offset_in)"
""",
}
_DECOMPOSED = ("locon", "loha", "lokr")


@cache
def document(name: str) -> Mapping[str, Any] | None:
    """The document of a kind of this module; ``None`` where the name is a built-in kind's.

    ``loha-dora`` is ``loha`` with magnitudes around it, and so on.
    """
    if name in _OWN:
        return tomllib.loads(_OWN[name])
    inner = name.removeprefix(NAMESPACE).removesuffix("-dora")
    return _decomposed(inner) if name == f"{NAMESPACE}{inner}-dora" and inner in _DECOMPOSED else None


def _decomposed(inner: str) -> Mapping[str, Any]:
    from deltahub import kinds

    found: dict[str, Any] = copy.deepcopy(dict(kinds.get(inner).document.source))
    found |= {
        "kind": f"{NAMESPACE}{inner}-dora",
        "version": 1,
        "title": f"{found['title']}, with the weight's magnitudes apart",
    }
    found.pop("strength", None)
    found.pop("targets", None)
    found["config"]["axis"] = {"type": "string", "enum": ["out", "in"], "default": "out"}
    norms = {"out": "flatten({}, 1)", "in": "flatten(transpose({}, 0, 1), 1)"}
    sizes = {"out": ("magnitude", "rows"), "in": ("magnitude_in", "columns")}
    equations = found["equations"]
    plain = equations["weight"] if isinstance(equations["weight"], list) else [{"expr": equations["weight"]}]
    weights = []
    for axis, (name, spread) in sizes.items():
        init = f"norm({norms[axis].format('W')}, 1)"
        found["tensors"][name] = {"shape": [axis], "init": init, "when": {"axis": axis}}
        for one in plain:
            *lines, last = one["expr"].strip().splitlines()
            lines += [f"V = {last}", f"V * {spread}({name} / stop_gradient(norm({norms[axis].format('V')}, 1)))"]
            weights.append({"when": {**one.get("when", {}), "axis": axis}, "expr": "\n".join(lines)})
    found["equations"] = {"weight": weights}
    return found
