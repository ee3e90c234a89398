"""Checkpoints of ΔConvFusion: one safetensors file of ``<block>.conv1.{conv_up,conv_out,conv_pool,gates.N…}``.

The file holds tensors alone. Widths, windows, the number of stages and which biases there are follow from their shapes;
by how much each stage shrinks its map, and the gate, do not: they are what the authors released unless told otherwise.
Windows are stored ``[side, side, channels]``, as the authors' kernel reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.package import Package

__all__ = ["import_", "sniff"]

EXTENSION = "org.convfusion"
_KEY = re.compile(
    r"(?P<block>.+)\.conv1\.(?P<part>conv_up|conv_out|conv_pool|gates\.(?P<stage>\d+)\.conv_spatial)\.(?P<what>weight|bias)"
)
_PLACES = {"conv_up": "inner", "conv_out": "mix", "conv_pool": "average"}


def sniff(path: Path) -> bool:
    """Whether a file is such a checkpoint: by the names in its header."""
    from deltahub.errors import DeltaHubError
    from deltahub.tensors import TensorFile

    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with TensorFile.open(path) as file:
            return bool(file) and all(_KEY.fullmatch(name) for name in file)
    except DeltaHubError:
        return False


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | os.PathLike[str],
    divisors: Sequence[int] = (1, 2),
    gate: str | None = None,
    pool: str = "adaptive",
    overwrite: bool = False,
) -> Package:
    """Make a package of a released checkpoint.

    Args:
        path: the file.
        out: the package's folder.
        backbone: the denoiser that it was trained for: a live one, a pipeline's or its own folder, or a repository.
        divisors: by how much each stage shrinks its map.
        gate: of the kind; what was released for the backbone's class by default.
        pool: of the kind.
        overwrite: replace a package that is there.

    Raises:
        ConverterError: ``E_CONVERT_KEY``, ``E_CONVERT_MISSING``, ``E_CONVERT_SURPLUS`` or ``E_CONVERT_SHAPE``.
            Nothing is written then.
        DeltaHubError: the backbone is another.
    """
    from torch import nn as _nn

    from deltahub.backbones import build, denoiser_of, resolve
    from deltahub.converters.entries import read_tensors

    file = Path(path)
    sites = _sites(read_tensors(file)[0], file, len(divisors))
    live = denoiser_of(backbone)
    model: Any = backbone if live is None else live[1]
    if not isinstance(model, _nn.Module):
        source = {"class": None}
        model = build(source, resolve(source, override=Path(model) if Path(model).is_dir() else str(model))).model
    chosen = gate or ("sigmoid" if "PixArt" in type(model).__name__ else "mul_sqrt")
    shared = {"gate": chosen, "pool": pool, "merge": "concat", "stages": len(divisors)}
    shared |= {f"divisor_{i + 1}": d for i, d in enumerate(divisors)}
    return _written(model, sites, shared, Path(out), file, overwrite=overwrite)


def _sites(tensors: Mapping[str, Tensor], file: Path, stages: int) -> dict[str, dict[str, Tensor]]:
    """Tensors of each replaced attention under the kind's names, with what is missing or surplus refused."""
    import torch

    raw: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ConverterError(
                "E_CONVERT_KEY", "this key does not belong to such a checkpoint", where=file, found=name
            )
        raw.setdefault(match["block"], {})[f"{match['part']}.{match['what']}"] = value
    found: dict[str, dict[str, Tensor]] = {}
    for block, given in raw.items():
        made: dict[str, Tensor] = {}
        for theirs, ours in _PLACES.items():
            made[ours] = _take(given, f"{theirs}.weight", file, block)
            if f"{theirs}.bias" in given:
                made[f"{ours}_bias"] = given.pop(f"{theirs}.bias")
        gates = [f"gates.{i}.conv_spatial" for i in range(stages)]
        width = made["inner"].shape[0]
        windows = [_window(_take(given, f"{g}.weight", file, block), width) for g in gates]
        if len({w.shape for w in windows}) != 1:
            raise ConverterError(
                "E_CONVERT_SHAPE", "the stages have windows of different sides", where=f"{file}: {block}"
            )
        made["depthwise"] = torch.stack(windows)
        if f"{gates[0]}.bias" in given:
            made["depthwise_bias"] = torch.stack([_take(given, f"{g}.bias", file, block) for g in gates])
        if given:
            what = "there are more stages than divisors, or keys that are unknown"
            raise ConverterError("E_CONVERT_SURPLUS", what, where=f"{file}: {block}", found=", ".join(sorted(given)))
        found[f"{block}.attn1"] = made
    return found


def _take(given: dict[str, Tensor], key: str, file: Path, block: str) -> Tensor:
    if key not in given:
        raise ConverterError("E_CONVERT_MISSING", "a key is missing", where=str(file), expected=f"{block}.conv1.{key}")
    return given.pop(key)


def _window(stored: Tensor, width: int) -> Tensor:
    """``[side, side, channels]`` as ``[channels, 1, side, side]``; the layout of torch's own convolutions passes."""
    if stored.ndim == 4 and stored.shape[:2] == (width, 1):
        return stored
    if stored.ndim != 3 or stored.shape[0] != stored.shape[1] or stored.shape[2] != width:
        raise ConverterError(
            "E_CONVERT_SHAPE",
            "a window has another shape than it should",
            expected=f"[side, side, {width}]",
            found=list(stored.shape),
        )
    return stored.permute(2, 0, 1).unsqueeze(1).contiguous()


def _written(
    model: Any, sites: dict[str, dict[str, Tensor]], shared: dict[str, Any], out: Path, file: Path, *, overwrite: bool
) -> Package:
    import torch

    from deltahub import kinds
    from deltahub.attaching import attach_parts
    from deltahub.sites import Part

    groups: dict[tuple[tuple[str, object], ...], list[str]] = {}
    for path, tensors in sites.items():
        config = {
            "kernel": tensors["depthwise"].shape[-1],
            "reduction": tensors["inner"].shape[1] // len(tensors["inner"]),
        }
        biases = {"in": "inner", "depthwise": "depthwise", "out": "mix", "average": "average"}
        config |= {f"bias_{ours}": f"{name}_bias" in tensors for ours, name in biases.items()}
        groups.setdefault(tuple({**shared, **config}.items()), []).append(path)
    kind = kinds.get("delta-conv")
    parts = [
        Part(name=f"attention-{i}", kind=kind, config=kind.check_config(dict(config)), paths=paths)
        for i, (config, paths) in enumerate(groups.items())
    ]
    dtype = next(iter(sites.values()))["inner"].dtype
    delta = attach_parts(model, "delta-conv-import", parts, dtype=dtype)
    try:
        with torch.no_grad():
            for site in delta.sites:
                for name, target in zip(site.names, site.tensors(), strict=True):
                    value = sites[site.path][name]
                    if value.shape != target.shape:
                        raise ConverterError(
                            "E_CONVERT_SHAPE",
                            f"{name} has another shape than this backbone gives it",
                            where=f"{file}: {site.path}",
                            expected=list(target.shape),
                            found=list(value.shape),
                        )
                    target.copy_(value)
        return delta.save(out, extensions={EXTENSION: {"file": file.name}}, overwrite=overwrite)
    finally:
        delta.detach()
