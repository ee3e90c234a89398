"""LoRA files of diffusers: PEFT's keys behind a part of the pipeline, or the older ones of attention processors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from deltahub.converters.diffusion import FileNames, find_file, import_file
from deltahub.errors import DeltaHubError

if TYPE_CHECKING:
    from deltahub.package import Package

__all__ = ["export_", "import_", "sniff"]

EXTENSION = "co.huggingface.diffusers"


def sniff(path: Path) -> bool:
    """Whether a file is in one of these spellings: every key has a known ending, behind a part of a pipeline.

    A file of old attention processors may name no part; it is told by ``.processor.`` then.
    """
    from deltahub.tensors import TensorFile

    try:
        if path.is_dir() and (path / "adapter_config.json").exists():
            return False
        file = find_file(path)
        if file.suffix != ".safetensors":
            return False
        names = FileNames(flat=False)
        with TensorFile.open(file) as opened:
            found = [names.split(key) for key in opened]
            return bool(found) and all(
                one is not None and (one[0] != "" or ".processor." in key)
                for one, key in zip(found, opened, strict=True)
            )
    except (DeltaHubError, OSError):
        return False


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: object,
    alpha: float | None = None,
    overwrite: bool = False,
) -> Package:
    """Make a package of each part of a pipeline that such a file is about.

    Args:
        path: the file, or a folder that holds ``pytorch_lora_weights.safetensors``.
        out: the package's folder; where the file is about several parts, a folder with one package for each.
        backbone: the pipeline: a folder, a repository or a live one; or the part that the file is about.
        alpha: of modules for which neither the file nor its metadata has one; without it the scale is 1, as diffusers
            itself takes it to be, which is said in a warning and in the package.
        overwrite: replace what is there.

    Returns:
        The package; the first of several.

    Raises:
        ConverterError: as :func:`deltahub.converters.kohya.import_`. Nothing is written then.
    """
    return import_file(path, out, backbone=backbone, flat=False, extension=EXTENSION, alpha=alpha, overwrite=overwrite)


def export_(package: Package | str | os.PathLike[str], out: str | os.PathLike[str], *, backbone: object = None) -> Path:
    """Write a file that ``load_lora_weights`` of diffusers reads.

    Args:
        package: a package of low-rank updates, or a folder with one for each part of a pipeline.
        out: a name that ends in ``.safetensors``, or a folder; neither may exist.
        backbone: needed unless the package came out of such a file and holds the same.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with everything that the format cannot say.
    """
    from deltahub.converters.diffusion_writing import export_file

    return export_file(package, out, backbone=backbone, flat=False, extension=EXTENSION)
