"""What other tools call a backbone's modules: one engine over the tables of ``spec/renames.toml``.

Nothing is parsed out of a foreign name. All names that the modules at hand could have are written down first, and a
foreign name is looked up among them: an underscore that was a dot is no riddle then, and a name that two modules
share is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Names", "Place", "tables"]


@cache
def tables() -> Mapping[str, Any]:
    """The document itself."""
    import tomllib
    from importlib.resources import files

    return tomllib.loads(files("deltahub.spec").joinpath("renames.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a foreign name means.

    Attributes:
        paths: of our modules; several where the other tool has fused them, in the order of their outputs.
        swap: whether the two halves of the outputs change places.
    """

    paths: tuple[str, ...]
    swap: bool = False


class Names:
    """All names that a model's modules may have in foreign files.

    Args:
        model: its modules; values are not looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths = [name for name, _ in model.named_modules() if name]
        self._known = set(self._paths)
        self._layers = int(getattr(getattr(model, "config", None), "layers_per_block", 0) or 0)
        # Exact names win over renamed ones, so they come first; flattened ones of both may collide.
        self._dotted: dict[str, Place] = {path: Place(paths=(path,)) for path in self._paths}
        self._theirs: dict[tuple[str, ...], str] = {}
        for place, theirs in self._renamed(type(model).__name__):
            self._dotted.setdefault(theirs, place)
            self._theirs.setdefault(place.paths, theirs)
        self._flat: dict[str, list[Place]] = {}
        for name, place in self._dotted.items():
            found = self._flat.setdefault(name.replace(".", "_"), [])
            if place not in found:
                found.append(place)

    def find(self, name: str, *, flat: bool, where: object) -> Place:
        """The module that a foreign name means.

        Args:
            name: dotted, or with underscores for dots.
            flat: which of the two.
            where: for the message.

        Raises:
            ConverterError: ``E_CONVERT_TARGET`` for none, ``E_CONVERT_COLLISION`` for several.
        """
        found = self._flat.get(name, []) if flat else [self._dotted[name]] if name in self._dotted else []
        if len(found) > 1:
            raise ConverterError(
                "E_CONVERT_COLLISION",
                "two modules of the backbone have this name once dots are underscores",
                where=where,
                found=name,
                expected=" or ".join(", ".join(place.paths) for place in found),
            )
        if not found:
            import difflib

            near = difflib.get_close_matches(name, list(self._flat if flat else self._dotted), 3, cutoff=0.5)
            raise ConverterError(
                "E_CONVERT_TARGET",
                "the backbone has no module of this name",
                where=where,
                found=name,
                expected=", ".join(near) or None,
            )
        return found[0]

    def theirs(self, paths: Sequence[str]) -> str | None:
        """The renamed form of a module, or of modules that are one elsewhere; ``None`` where the tables have none."""
        return self._theirs.get(tuple(paths))

    def fused(self) -> Iterator[tuple[str, ...]]:
        """All groups of modules that are one elsewhere."""
        return (paths for paths in self._theirs if len(paths) > 1)

    def flatten(self, name: str) -> str:
        """A dotted name with underscores, where no other module would have the same.

        Raises:
            ConverterError: ``E_CONVERT_COLLISION``.
        """
        flat = name.replace(".", "_")
        self.find(flat, flat=True, where="export")
        return flat

    def _renamed(self, class_name: str) -> Iterator[tuple[Place, str]]:
        for table in tables().values():
            if class_name not in table.get("classes", ()):
                continue
            for row in table["rows"]:
                yield from self._row(row, table.get("rest", {}))

    def _row(self, row: Mapping[str, Any], rest: Mapping[str, str]) -> Iterator[tuple[Place, str]]:
        ours = row["ours"] if isinstance(row["ours"], list) else [row["ours"]]
        pattern = re.compile(_pattern(ours[0]))
        for path in self._paths:
            match = pattern.fullmatch(path)
            if match is None:
                continue
            values = match.groupdict()
            paths = tuple(one.format(**values) for one in ours)
            if not self._known.issuperset(paths):
                continue
            if "i" in values:
                j = self._layers if row.get("last") else int(values.get("j") or 0)
                values["n"] = str((self._layers + 1) * int(values["i"]) + j + int(row.get("plus", 0)))
                values["u"] = "2" if f"up_blocks.{values['i']}.attentions" in self._known else "1"
            if "rest" in values:
                values["rest"] = rest.get(values["rest"], values["rest"])
            yield Place(paths=paths, swap=bool(row.get("swap"))), str(row["theirs"]).format(**values)


def _pattern(text: str) -> str:
    parts: Iterable[str] = re.split(r"(\{\w+\})", text)
    made = []
    for part in parts:
        if part == "{rest}":
            made.append("(?P<rest>.+)")
        elif part.startswith("{"):
            made.append(rf"(?P<{part[1:-1]}>\d+)")
        else:
            made.append(re.escape(part))
    return "".join(made)
