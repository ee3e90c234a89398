"""Textual inversions: embeddings of new words for the text encoders of a diffusion pipeline.

A package changes no vocabulary, so a new word needs rows that the tokenizer already has: those of a word that is never
used, or of tokens that the caller's tokenizer was given within the encoder's vocabulary. Their numbers have to be said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltahub.converters.components import Components
from deltahub.converters.diffusion import find_file
from deltahub.converters.entries import Entry, read_tensors, write_entries
from deltahub.converters.shards import new_folder
from deltahub.errors import ConverterError, DeltaHubError

if TYPE_CHECKING:
    from torch import Tensor

    from deltahub.converters.base import Base
    from deltahub.package import Package

__all__ = ["import_", "sniff"]

EXTENSION = "org.textual-inversion"
_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def sniff(path: Path) -> bool:
    """Whether a file holds embeddings alone: ``clip_l`` and ``clip_g``, ``emb_params``, or one word in brackets."""
    from deltahub.tensors import TensorFile

    try:
        if path.suffix != ".safetensors" or not path.is_file():
            return False
        with TensorFile.open(path) as file:
            keys = set(file)
    except (DeltaHubError, OSError):
        return False
    word = len(keys) == 1 and all(key.startswith("<") and key.endswith(">") for key in keys)
    return bool(keys) and (keys <= _PARTS.keys() or keys == {"emb_params"} or word)


def import_(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backbone: object,
    places: Sequence[int] = (),
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Package:
    """Make a package of rows for each text encoder that such a file is about.

    Args:
        path: the file.
        out: the package's folder; where the file is about two encoders, a folder with one package for each.
        backbone: the pipeline, or the text encoder.
        places: numbers of the tokens whose rows are replaced, as many as the file has vectors.
        allow_pickle: read a ``learned_embeds.bin``; no code of it is run.
        overwrite: replace what is there.

    Raises:
        ConverterError: ``E_CONVERT_PLACES`` where the places are not said or not as many; ``E_CONVERT_TARGET`` where a
            text encoder has no embedding of words; ``E_CONVERT_SHAPE``.
    """
    from deltahub.package import Package

    file = find_file(path)
    tensors, _ = read_tensors(file, allow_pickle=allow_pickle)
    rows = {_PARTS.get(key, "text_encoder"): value for key, value in tensors.items()}
    if len(rows) != len(tensors) or not rows:
        raise ConverterError(
            "E_CONVERT_KEY", "the file holds several words", where=file, found=", ".join(sorted(tensors)),
            hint="convert each by itself",
        )  # fmt: skip
    with Components(backbone, rows) as components:
        made = {
            name: [_entry(value, components.base(components.of(name)), places, file)] for name, value in rows.items()
        }
        kept = {EXTENSION: {"keys": sorted(tensors)}}
        if len(made) == 1:
            ((name, entries),) = made.items()
            base = components.base(components.of(name))
            return write_entries(out, entries, base, extensions=kept, overwrite=overwrite)
        with new_folder(out, overwrite=overwrite) as folder:
            for name, entries in made.items():
                write_entries(folder / name, entries, components.base(components.of(name)), extensions=kept)
        return Package.open(Path(out) / next(iter(made)))


def _entry(value: Tensor, base: Base, places: Sequence[int], file: Path) -> Entry:
    import torch

    vectors = value.reshape(-1, value.shape[-1]) if value.ndim else value.reshape(0, 0)
    if len(places) != len(vectors) or len(set(places)) != len(places):
        raise ConverterError(
            "E_CONVERT_PLACES",
            "a package changes no vocabulary: say which tokens' rows these vectors take the place of",
            where=file,
            expected=f"{len(vectors)} different numbers",
            found=", ".join(map(str, places)) or "none",
            hint="places=[…]: the numbers of a word that is never used, or of tokens your tokenizer was given",
        )
    path = _embedding(base)
    size, width = base.arch.host(path).shape.d_in or 0, base.arch.host(path).shape.d_out
    wrong = [one for one in places if not 0 <= one < size]
    if wrong or vectors.shape[1] != width:
        raise ConverterError(
            "E_CONVERT_SHAPE", "this does not fit the text encoder's embedding", where=f"{file}: {path}",
            expected=f"rows 0 to {size - 1} of {width}",
            found=f"row {wrong[0]}" if wrong else f"rows of {vectors.shape[1]}",
        )  # fmt: skip
    tensors = {"places": torch.tensor(list(places), dtype=torch.int32), "rows": vectors.contiguous()}
    return Entry(path=path, kind="tokens", config={"count": len(places)}, tensors=tensors)


def _embedding(base: Base) -> str:
    """The embedding of words in a text encoder."""
    for path, _ in base.arch.model.named_modules():
        if path.rpartition(".")[2] in {"token_embedding", "shared", "embed_tokens", "word_embeddings"}:
            return str(path)
    raise ConverterError("E_CONVERT_TARGET", "the text encoder has no embedding of words")
