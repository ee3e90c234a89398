"""What goes along with the graphs: the facts about delta and backbone, the configuration, the tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["carry", "describe"]

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "added_tokens.json", "preprocessor_config.json",
    "processor_config.json", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
_LARGEST = 64 << 20


def describe(model: nn.Module) -> dict[str, Any]:
    """Which deltas act on which backbone, by their digests."""
    from deltahub.composition import active_names, registry

    home = registry(model)
    names = [] if home is None else active_names(home)
    assert home is not None or not names
    deltas = [_delta(home[name]) for name in names] if home is not None else []
    kinds = sorted({kind for one in deltas for kind in one["kinds"]})
    section = getattr(home, "backbone", None)
    return {"spec_version": _spec_version(), "kinds": kinds, "deltas": deltas, "backbone": _backbone(model, section)}


def _spec_version() -> str:
    from deltahub.manifest import SPEC_VERSION

    return SPEC_VERSION


def _delta(delta: Any) -> dict[str, Any]:
    """A delta that came from a package is known by its manifest's digest, another by that of its tensors."""
    kinds = [f"{part.kind.name}@{part.kind.version}" for part in delta.parts]
    found = {"name": delta.name, "kinds": sorted(set(kinds)), "scale": delta.scale}
    report = delta.report
    if report is not None:
        return {**found, "manifest_sha256": report.sha256, "source": report.source, "commit": report.commit}
    from deltahub.tensors import dtype_name, value_bytes

    digest = hashlib.sha256()
    for name, value in sorted(delta.tensors().items()):
        digest.update(f"{name}\0{dtype_name(value.dtype)}\0{list(value.shape)}\0".encode())
        digest.update(value_bytes(name, value))
    return {**found, "tensors_sha256": digest.hexdigest()}


def _backbone(model: nn.Module, section: Any) -> dict[str, Any]:
    from deltahub import backbones, identity

    if section is not None:
        plain = section.model_dump(mode="json", by_alias=True, exclude_unset=True)
        roots = {key: plain["identity"][key] for key in ("algorithm", "exact", "bf16", "structure", "tensors")}
        source = {k: v for k, v in (plain.get("source") or {}).items() if k in {"hub", "commit", "class"}}
        return {"source": source, "identity": roots}
    found = identity.from_module(model)
    roots = {"exact": found.exact, "bf16": found.bf16, "structure": found.structure, "tensors": found.tensors}
    source = {k: v for k, v in backbones.describe(model).items() if k in {"hub", "commit", "class"}}
    return {"source": source, "identity": {"algorithm": identity.ALGORITHM, **roots}}


def carry(model: nn.Module, folder: Path) -> None:
    """Write the model's configuration, and copy its tokenizer's files where they are at hand."""
    from deltahub.backbones import origin

    inner: Any = model
    if type(model).__name__ == "SentenceTransformer":
        inner = model[0].auto_model  # type: ignore[index]
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)
    elif hasattr(inner, "save_config"):
        inner.save_config(folder)
    where = origin(inner)
    if not where or not Path(where).is_dir():
        return
    for name in _TOKENIZER:
        source = Path(where) / name
        if source.is_file() and source.stat().st_size <= _LARGEST and not (folder / name).exists():
            with contextlib.suppress(OSError):
                shutil.copyfile(source, folder / name)
