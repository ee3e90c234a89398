"""IP-Adapters are told and refused: what they attend to is made from an image, which no kind of delta is given.

Their attention reads keys and values of an image's embeddings beside those of the text. A kind may add keys and values
that it holds itself (``kv``), or look at the module's own input; an image that a caller gives a pipeline is neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    from deltahub.package import Package

__all__ = ["import_", "sniff"]


def sniff(path: Path) -> bool:
    """Whether a file is an IP-Adapter: by the beginnings of its keys."""
    from deltahub.tensors import TensorFile

    try:
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        with TensorFile.open(path) as file:
            return bool(file) and all(key.startswith(("image_proj.", "ip_adapter.")) for key in file)
    except (DeltaHubError, OSError):
        return False


def import_(path: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Package:
    """Refuse it, with the reason.

    Raises:
        ConverterError: ``E_CONVERT_KIND``, always.
    """
    _refuse(path)


def _refuse(path: object) -> NoReturn:
    raise ConverterError(
        "E_CONVERT_KIND",
        "an IP-Adapter attends to the embeddings of an image, which no port of a kind offers",
        where=path,
        hint="load it with diffusers' own load_ip_adapter; a delta of DeltaHub can be on the same pipeline",
    )
