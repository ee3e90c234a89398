"""Tensors of every dtype."""

from __future__ import annotations

import torch

from deltahub import tensors as T


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(1, 49, dtype=torch.uint8)
    found = {name: raw.view(T.torch_dtype(name)) for name in T.DTYPES if not name.startswith("F6") and name != "BOOL"}
    return {
        **found,
        "BOOL": torch.tensor([True, False, True]),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "é/ü": torch.tensor([2.0]).bfloat16(),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return not a.numel() or bool(
        torch.equal(
            a.resolve_conj().contiguous().view(-1).view(torch.uint8),
            b.resolve_conj().contiguous().view(-1).view(torch.uint8),
        )
    )
