"""LoRA and LyCORIS files of kohya's sd-scripts: ``lora_unet_…``, ``lora_te_…``; ``lycoris_…`` of LyCORIS' wrapper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from deltahub.converters.diffusion import FileNames, find_file, import_file
from deltahub.errors import DeltaHubError

if TYPE_CHECKING:
    from deltahub.package import Package

__all__ = ["export_", "import_", "sniff"]

EXTENSION = "com.github.kohya-ss"


def sniff(path: Path) -> bool:
    """Whether a file is in this spelling: by the names in its header."""
    return _all_keys(path, flat=True)


def _all_keys(path: Path, *, flat: bool) -> bool:
    from deltahub.tensors import TensorFile

    try:
        file = find_file(path)
        if file.suffix != ".safetensors":
            return False
        names = FileNames(flat=flat)
        with TensorFile.open(file) as opened:
            return bool(opened) and all(names.split(key) is not None for key in opened)
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
        path: the file, or a folder that holds it alone.
        out: the package's folder; where the file is about several parts, a folder with one package for each.
        backbone: the pipeline: a folder, a repository or a live one; or the part that the file is about.
        alpha: of modules for which the file has none; without it, a file that has none at all is read with a scale of
            1, which is said in a warning and in the package.
        overwrite: replace what is there.

    Returns:
        The package; the first of several.

    Raises:
        ConverterError: ``E_CONVERT_COLLISION`` where a name means two modules; ``E_CONVERT_TARGET``,
            ``E_CONVERT_MISSING``, ``E_CONVERT_SURPLUS``, ``E_CONVERT_SHAPE``, ``E_CONVERT_UNSUPPORTED``. Nothing is
            written then.
    """
    return import_file(path, out, backbone=backbone, flat=True, extension=EXTENSION, alpha=alpha, overwrite=overwrite)


def export_(package: Package | str | os.PathLike[str], out: str | os.PathLike[str], *, backbone: object = None) -> Path:
    """Write such a file: byte for byte the one that a package came out of, or afresh.

    Args:
        package: a package, or a folder with one for each part of a pipeline.
        out: a name that ends in ``.safetensors``, or a folder; neither may exist.
        backbone: needed to write afresh: modules are named after it, and names that would collide are refused.

    Raises:
        ConverterError: ``E_CONVERT_EXPORT`` with everything that the format cannot say.
    """
    from deltahub.converters.diffusion_writing import export_file

    return export_file(package, out, backbone=backbone, flat=True, extension=EXTENSION)
