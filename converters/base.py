"""The backbone that a foreign checkpoint belongs to: its modules, its values, and what a manifest says of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.architecture import Architecture, architecture
from deltahub.converters.checkpoint import Checkpoint, Stored
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltahub.backbones import BackboneFiles

__all__ = ["Base"]


class Base:
    """A backbone as converters use it, from a folder, the Hub, or a live module.

    Attributes:
        arch: its modules.
        source: a manifest's ``backbone.source``.
        settings: fields of its configuration that the foreign checkpoint changes.
    """

    def __init__(
        self,
        arch: Architecture,
        source: dict[str, Any],
        *,
        files: BackboneFiles | None,
        checkpoint: Checkpoint | None,
        settings: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.arch, self.source, self.files = arch, source, files
        self.settings = [dict(setting) for setting in settings]
        self._checkpoint = checkpoint

    @classmethod
    def of_module(cls, model: nn.Module) -> Base:
        """A live module: its values are the backbone's."""
        from deltahub.backbones import describe

        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        return cls(
            architecture(names, model=model), dict(describe(model)), files=None, checkpoint=None
        )  # names in files are asked of the module itself

    @classmethod
    def of_folder(
        cls,
        backbone: str | os.PathLike[str],
        *,
        class_name: str | None = None,
        settings: Sequence[Mapping[str, Any]] = (),
        subfolder: str | None = None,
    ) -> Base:
        """A folder or Hub name; the module tree is laid out without weights.

        Args:
            backbone: where it is.
            class_name: such as ``transformers.BertForSequenceClassification``; that of its configuration by default.
            subfolder: of a repository, where the backbone is one of several components.
            settings: fields of the configuration that shape the model: ``on``, ``path``, ``was``, ``value``.
        """
        from deltahub.backbones import resolve
        from deltahub.backbones.files import architecture as declared_class
        from deltahub.manifest import Setting

        wanted = {} if class_name is None else {"class": class_name}
        wanted |= {} if subfolder is None else {"subfolder": subfolder}
        files = resolve(wanted, override=Path(backbone) if Path(backbone).is_dir() else os.fspath(backbone))
        source: dict[str, Any] = {} if files.hub is None else {"hub": files.hub, "commit": files.commit}
        source["class"] = class_name or declared_class(files.folder)
        checkpoint = Checkpoint(files.files)
        arch = architecture(
            checkpoint, files=files, source=source, settings=[Setting.model_validate(dict(one)) for one in settings]
        )
        return cls(arch, source, files=files, checkpoint=checkpoint, settings=settings)

    @classmethod
    def of(
        cls,
        backbone: nn.Module | str | os.PathLike[str],
        *,
        class_name: str | None = None,
        settings: Sequence[Mapping[str, Any]] = (),
    ) -> Base:
        """Whichever of the two it is."""
        if isinstance(backbone, (str, os.PathLike)):
            return cls.of_folder(backbone, class_name=class_name, settings=settings)
        return cls.of_module(backbone)

    def stored(self, live: str) -> tuple[Checkpoint, Stored] | None:
        """The checkpoint that a parameter lies in, and where; only for a backbone that has files."""
        name = self.arch.stored.get(live)
        return None if name is None or self._checkpoint is None else (self._checkpoint, self._checkpoint[name])

    def value(self, live: str) -> Tensor | None:
        """A parameter as stored, by its live name; ``None`` where the backbone does not have it."""
        if self._checkpoint is not None:
            stored = self.arch.stored.get(live)
            return None if stored is None else self._checkpoint.rows(stored)
        found = dict(self.arch.model.named_parameters(remove_duplicate=False)).get(live)
        return None if found is None else found.detach()

    def weight(self, path: str) -> Tensor | None:
        """A module's weight in canonical orientation."""
        found = self.value(f"{path}.weight")
        return None if found is None else self.arch.host(path).view.canonical(found)

    def section(self, touched: Iterable[str]) -> dict[str, Any]:
        """What a manifest says of this backbone.

        Args:
            touched: live names of the parameters that the delta sits on.
        """
        from deltahub import identity

        if self.files is not None:
            stored = [self.arch.stored[name] for name in touched if name in self.arch.stored]
            described = identity.describe(list(self.files.files), touched=list(dict.fromkeys(stored)))
        else:
            names = identity.checkpoint_names(self.arch.model)
            stored = [names[name] for name in touched if name in names]
            described = identity.describe(self.arch.model, touched=list(dict.fromkeys(stored)))
        return {"source": self.source, **described}

    def touched(self, paths: Iterable[str]) -> list[str]:
        """Live names of all parameters of some modules."""
        found: list[str] = []
        for path in dict.fromkeys(paths):
            try:
                module = self.arch.model.get_submodule(path)
            except AttributeError:
                raise ConverterError("E_CONVERT_TARGET", "the backbone has no such module", where=path) from None
            found += [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        return found

    def close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()
