"""A file's own header, kept beside a package, so that the file can be written again byte for byte."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltahub.converters.entries import Entry
from deltahub.converters.naming import Place
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Verbatim"]

_KEPT = 512 << 10
_HEADER = 32 << 20
_OPTIONAL = frozenset({"diff_b", "b_norm"})

_Write = Callable[[Entry], "dict[str, Tensor] | None"]


class Verbatim:
    """What a package has to remember of a file beside its tensors: the header, which key is what, odd alphas.

    Args:
        header: the header's bytes, without their length.
        parts: of each module of the file: the key of each of its tensors, the paths of ours, whether halves swap.
        odd: small tensors that do not follow from the package, as lists, by key.
    """

    def __init__(self, header: bytes, parts: list[dict[str, Any]], odd: dict[str, list[float]]) -> None:
        self.header, self.parts, self.odd = header, parts, odd

    @classmethod
    def of_file(cls, file: Path, *, flat: bool) -> Verbatim:
        """The header of a file that has been read, and is strict therefore."""
        from deltahub.tensors import open_regular

        with open_regular(file) as opened:
            length = int.from_bytes(opened.read(8) or b"", "little")
            return cls((opened.read(length) or b"") if length <= _HEADER else b"", [], {})

    def add(
        self,
        keys: Mapping[str, str],
        sites: Sequence[Entry],
        place: Place,
        tensors: Mapping[str, Tensor],
        write: _Write,
    ) -> None:
        """Remember a module, and what writing its sites would not give back.

        Raises:
            ConverterError: ``E_CONVERT_SURPLUS`` where a tensor of any size would be lost.
        """
        import torch

        before = set(self.odd)
        made = _joined([write(site) for site in sites], swap=place.swap)
        for name, key in keys.items():
            value = tensors[name]
            back = None if made is None or name not in made else _as(made[name], value.dtype, value.shape)
            if back is not None and _same(back, value):
                continue
            if value.numel() != 1:
                raise ConverterError("E_CONVERT_SURPLUS", "a tensor has no place in a package", found=key)
            self.odd[key] = [float(value.to(torch.float64))]
        told = "alpha" in keys and keys["alpha"] not in self.odd.keys() - before
        scale = None if told else sites[0].config.get("scale")
        self.parts.append({"keys": dict(keys), "paths": list(place.paths), "swap": place.swap, "scale": scale})

    def kept(self) -> dict[str, Any]:
        """For a package's extensions; empty where it would be too large, so that the file comes back in our order."""
        document = {"header": self.header.decode("utf-8"), "parts": self.parts, "odd": self.odd}
        packed = zlib.compress(json.dumps(document, separators=(",", ":")).encode("utf-8"), 9)
        return {"file": base64.b64encode(packed).decode("ascii")} if self.header and len(packed) <= _KEPT else {}

    @classmethod
    def of_kept(cls, section: Mapping[str, Any]) -> Verbatim | None:
        """Out of a package's extensions; ``None`` where it is not there or makes no sense."""
        text = section.get("file")
        if not isinstance(text, str):
            return None
        try:
            unpacker = zlib.decompressobj()
            document = json.loads(unpacker.decompress(base64.b64decode(text, validate=True), _HEADER))
            parts = [
                {
                    "keys": dict(p["keys"]),
                    "paths": [str(x) for x in p["paths"]],
                    "swap": bool(p["swap"]),
                    "scale": p["scale"],
                }
                for p in document["parts"]
            ]
            odd = {str(key): [float(x) for x in value] for key, value in document["odd"].items()}
            return cls(str(document["header"]).encode("utf-8"), parts, odd)
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, RecursionError):
            return None

    def values(self, entries: Mapping[str, Entry], write: _Write) -> dict[str, Tensor] | None:
        """All tensors by the file's keys; ``None`` where the package is not the one that the file gave."""
        found: dict[str, Tensor] = {}
        left = set(entries)
        for part in self.parts:
            if not left.issuperset(part["paths"]):
                return None
            left -= set(part["paths"])
            if part["scale"] is not None and any(
                entries[p].config.get("scale") != part["scale"] for p in part["paths"]
            ):
                return None  # the file has no number to say this with
            made = _joined([write(entries[path]) for path in part["paths"]], swap=part["swap"])
            if made is None or any(bool(v.any()) for k, v in made.items() if k in _OPTIONAL and k not in part["keys"]):
                return None
            found |= {key: made[name] for name, key in part["keys"].items() if name in made}
        return None if left else found

    def bytes_of(self, values: Mapping[str, Tensor]) -> bytes | None:
        """The whole file; ``None`` where the values do not fit the header."""
        import torch

        from deltahub.tensors import value_bytes
        from deltahub.tensors.dtypes import torch_dtype

        try:
            header = json.loads(self.header)
            infos = {name: info for name, info in header.items() if name != "__metadata__"}
            places = sorted(infos, key=lambda name: tuple(infos[name]["data_offsets"]))
            pieces, at = [len(self.header).to_bytes(8, "little"), self.header], 0
            for name in places:
                begin, end = infos[name]["data_offsets"]
                dtype, shape = torch_dtype(infos[name]["dtype"]), infos[name]["shape"]
                odd = self.odd.get(name)
                value = torch.tensor(odd[0], dtype=torch.float64) if odd is not None else values[name]
                back = _as(value, dtype, shape)
                if back is None or begin != at or end - begin != back.numel() * back.element_size():
                    return None
                pieces.append(bytes(value_bytes(name, back)))
                at = end
        except (ValueError, KeyError, TypeError):
            return None
        return b"".join(pieces)


def _joined(parts: list[dict[str, Tensor] | None], *, swap: bool) -> dict[str, Tensor] | None:
    from deltahub.converters.lycoris import join

    whole = [part for part in parts if part is not None]
    if len(whole) != len(parts):
        return None
    return whole[0] if len(whole) == 1 and not swap else join(whole, swap=swap)


def _as(value: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
    """A tensor in the dtype and shape that a file has it in; only single numbers may change their dtype."""
    import math

    if value.numel() != math.prod(shape) or (value.dtype != dtype and value.numel() != 1):
        return None
    return value.to(dtype).reshape(tuple(shape)).contiguous()


def _same(one: Tensor, other: Tensor) -> bool:
    import torch

    return bool(torch.equal(one.reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)))
