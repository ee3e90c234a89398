"""The error about a wrong backbone: which tensors differ, and what it probably is instead."""

from __future__ import annotations

__all__ = ["mismatch"]

from typing import TYPE_CHECKING

from deltahub.errors import IdentityError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from deltahub.identity.checkpoints import Checkpoint
    from deltahub.identity.declared import Declared
    from deltahub.identity.stamps import Spec

_SHOWN = 10
_QUANTISED = (
    ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_scale", ".weight_packed",
    ".weight_scale_inv", ".scales", ".weight_format",
)  # fmt: skip


def _few(names: Iterable[str]) -> str:
    listed = sorted(names)
    shown = ", ".join(printable(name) for name in listed[:_SHOWN])
    return shown if len(listed) <= _SHOWN else f"{shown} and {len(listed) - _SHOWN} more"


def _is_quantised(specs: Mapping[str, Spec]) -> bool:
    matrices = [spec for name, spec in specs.items() if name.endswith("weight") and len(spec.shape) >= 2]
    whole = [spec for spec in matrices if spec.dtype in {"U8", "I8", "I32", "F4"} or spec.dtype.startswith("F8")]
    return bool(whole) or any(name.endswith(_QUANTISED) for name in specs)


def mismatch(
    declared: Declared,
    found: Checkpoint,
    specs: Mapping[str, Spec],
    what: str,
    *,
    missing: list[str] | None,
    differing: list[str] | None,
) -> IdentityError:
    """Say what differs; leaves that are declared are compared for it even where the structure already failed."""
    if missing is None and differing is None:
        missing = [name for name in declared.leaves if name not in specs]
        there = [name for name in declared.leaves if name in specs]
        pairs = found.leaves(there, bf16=True)
        roundings = {name: {declared.leaves[name], declared.leaves_bf16.get(name)} for name in there}
        differing = [name for name in there if not roundings[name].intersection(pairs[name])]
    parts = []
    if differing:
        parts.append(f"differing: {_few(differing)}")
    if missing:
        parts.append(f"missing: {_few(missing)}")
    if len(specs) != declared.tensors:
        parts.append(f"{len(specs)} tensors where {declared.tensors} were declared")
    elif not parts:
        parts.append("none of the touched tensors differs, others do" if declared.leaves else "the roots differ")
    wanted = f"{declared.hub}@{declared.commit}" if declared.hub else declared.exact.hex()
    if _is_quantised(specs):
        return IdentityError(
            "E_BACKBONE_QUANTISED",
            "this is a quantised copy, and not the declared backbone",
            where=found.where,
            expected=wanted,
            found="; ".join(parts),
            hint="load the declared backbone and quantise it then, or use a delta made for this copy",
        )
    return IdentityError(
        "E_BACKBONE_MISMATCH",
        f"this is not the declared backbone: {what}",
        where=found.where,
        expected=wanted,
        found="; ".join(parts),
        hint="load the declared backbone; a delta on another one computes nonsense without saying so",
    )
