"""Known inputs and the outputs that they must give, measured by the publisher."""

from __future__ import annotations

__all__ = ["FILE_NAME", "INPUTS", "OUTPUTS", "Probe"]

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from deltahub.errors import PackageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from deltahub.tensors import TensorFile

FILE_NAME = "probe.safetensors"
INPUTS = "inputs/"
OUTPUTS = "outputs/"
_TOLERANCE: Mapping[str, float] = MappingProxyType({"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """Inputs of a forward pass by argument, its outputs by name, and the greatest absolute difference per dtype."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    tolerance: Mapping[str, float] = field(default_factory=lambda: _TOLERANCE)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in the probe's file."""
        return {
            **{INPUTS + name: tensor for name, tensor in self.inputs.items()},
            **{OUTPUTS + name: tensor for name, tensor in self.outputs.items()},
        }

    @classmethod
    def read(cls, file: TensorFile, tolerance: Mapping[str, float]) -> Self:
        """Take a probe out of its file.

        Raises:
            PackageError: ``E_PACKAGE_PROBE`` as :func:`check`.
        """
        check(file)
        found = {
            prefix: {name.removeprefix(prefix): file.torch(name) for name in file if name.startswith(prefix)}
            for prefix in (INPUTS, OUTPUTS)
        }
        return cls(inputs=found[INPUTS], outputs=found[OUTPUTS], tolerance=dict(tolerance))


def check(file: TensorFile) -> None:
    """Refuse a probe that has no inputs, no outputs, or something else.

    Raises:
        PackageError: ``E_PACKAGE_PROBE``.
    """
    strays = [name for name in file if not name.startswith((INPUTS, OUTPUTS)) or name.endswith("/")]
    if strays or not all(any(name.startswith(prefix) for name in file) for prefix in (INPUTS, OUTPUTS)):
        raise PackageError(
            "E_PACKAGE_PROBE",
            "a probe holds inputs and outputs, and nothing else",
            where=file.path,
            expected=f"{INPUTS}<argument> and {OUTPUTS}<name>",
            found=strays[:5] or list(file)[:5],
        )
