"""The parts of a diffusion pipeline as backbones: its denoiser and its text encoders, each of them one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from deltahub.converters.base import Base
from deltahub.converters.naming import tables
from deltahub.errors import ConverterError

__all__ = ["Components"]


class Components:
    """The backbones that a file's prefixes stand for; close it, or use it in a ``with`` block.

    Args:
        backbone: a pipeline's folder, repository (``org/name@revision``) or live object; or, for a file about one part
            of it, that part's own folder or module.
        prefixes: of the file; an empty one and ``lycoris`` stand for whatever there is.

    Raises:
        ConverterError: ``E_CONVERT_BACKBONE`` where the backbone does not have the part.
    """

    def __init__(self, backbone: object, prefixes: Iterable[str]) -> None:
        self._bases: dict[str, Base] = {}
        self._names: dict[str, str] = {}
        self._index = _Pipeline(backbone)
        try:
            for prefix in sorted(prefixes):
                name = self._index.component(prefix)
                self._names[prefix] = name
                if name not in self._bases:
                    self._bases[name] = self._index.base(name)
        except BaseException:
            self.close()
            raise
        if not self._index.parts and len(set(self._names.values())) > 1:
            self.close()
            raise ConverterError(
                "E_CONVERT_BACKBONE",
                "the file is about several parts of a pipeline, and this is one of them",
                found=", ".join(sorted(prefixes)),
                hint="pass the pipeline",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, prefix: str) -> str:
        """The name of the part that a prefix stands for."""
        return self._names[prefix]

    def base(self, name: str) -> Base:
        """A part by its name."""
        return self._bases[name]

    def close(self) -> None:
        """Close all files."""
        for base in self._bases.values():
            base.close()


class _Pipeline:
    """What a pipeline has; ``parts`` is empty where the backbone is no pipeline but a part of one."""

    def __init__(self, backbone: object) -> None:
        self.live: Any = None
        self.folder: Path | None = None
        self.hub: str | None = None
        self.name: str | None = None
        self.parts: tuple[str, ...] = ()
        known = list(dict.fromkeys(one for names in tables()["components"].values() for one in names))
        if not isinstance(backbone, (str, os.PathLike)):
            self.live = backbone
            if any(cls.__name__ == "DiffusionPipeline" for cls in type(backbone).__mro__):
                self.name = type(backbone).__name__
                self.parts = tuple(one for one in known if getattr(backbone, one, None) is not None)
            return
        text = os.fspath(backbone)
        if Path(text).is_dir():
            self.folder = Path(text)
            index = self.folder / "model_index.json"
        else:
            from deltahub.backbones.files import fetch_some

            hub, _, revision = text.partition("@")
            found = fetch_some(hub, revision or "main", ["model_index.json"])
            self.hub, index = f"{hub}@{found.name}", found / "model_index.json"
        if index.is_file():
            from deltahub.backbones.files import read_json

            document = read_json(index)
            self.name = document.get("_class_name") if isinstance(document, dict) else None
            self.parts = tuple(one for one in known if (document.get(one) or [None])[0] is not None)

    def component(self, prefix: str) -> str:
        table = tables()["components"]
        wanted = table.get(prefix) or [*table["lora_unet"], *table["lora_te"]]
        if not self.parts:
            return str(wanted[0])
        found = next((name for name in wanted if name in self.parts), None)
        if found is None:
            raise ConverterError(
                "E_CONVERT_BACKBONE",
                "the pipeline does not have the part that the file is about",
                expected=" or ".join(wanted),
                found=", ".join(self.parts),
            )
        return str(found)

    def base(self, name: str) -> Base:
        if self.live is not None:
            found = Base.of_module(getattr(self.live, name) if self.parts else self.live)
        elif self.folder is not None:
            found = Base.of_folder(self.folder / name if self.parts else self.folder)
        else:
            assert self.hub is not None
            found = Base.of_folder(self.hub, subfolder=name if self.parts else None)
        if self.parts:
            found.source |= {"subfolder": name}
            if isinstance(self.name, str) and self.name.isidentifier():
                found.source |= {"pipeline": self.name}
        return found
