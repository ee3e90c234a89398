"""The mathematics of a backbone's identity: leaves, entries, the tree over them, and proofs of inclusion.

A leaf binds a tensor's dtype, shape and bytes; an entry binds a leaf to a name; the root
is the Merkle tree hash of RFC 6962 over the entries sorted by name. Nothing here knows of
files or modules.
"""

from __future__ import annotations

__all__ = [
    "FLOATS",
    "Inclusion",
    "entry",
    "leaf",
    "leaf_pair",
    "merkle_root",
    "prove",
    "root",
    "structure",
]

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_TAG = b"deltahub:tensor:1\0"
_CHUNK = 1 << 20  # a multiple of every element size, small enough to stay in the cache between two hashes
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
"""The dtypes that round to BF16, and what NumPy calls them."""


def _round(dtype: str, data: memoryview) -> memoryview:
    """Round floats to the nearest BF16, ties to even; every NaN becomes 0x7FC0, for libraries disagree on it."""
    with np.errstate(all="ignore"):
        wide = np.frombuffer(data, FLOATS[dtype]).astype("<f4", copy=False)
    bits = wide.view("<u4")
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
    rounded[np.isnan(wide)] = 0x7FC0
    return memoryview(rounded.data).cast("B")


def _start(dtype: str, shape: Sequence[int]) -> hashlib._Hash:
    return hashlib.sha256(_TAG + dtype.encode() + b"\0" + struct.pack(f"<B{len(shape)}Q", len(shape), *shape))


def leaf(dtype: str, shape: Sequence[int], data: bytes | memoryview, *, bf16: bool = False) -> bytes:
    """The 32 bytes that stand for a tensor.

    Args:
        dtype: its safetensors name.
        shape: its dimensions.
        data: its elements, little-endian, in C order.
        bf16: round F64, F32 and F16 to BF16 first; everything else is hashed as it is.
    """
    exact, rounded = leaf_pair(dtype, shape, data, exact=not bf16, bf16=bf16)
    return rounded if bf16 else exact


def leaf_pair(
    dtype: str, shape: Sequence[int], data: bytes | memoryview, *, exact: bool = True, bf16: bool = True
) -> tuple[bytes, bytes]:
    """The exact leaf and the BF16 one, in one pass; one that is not asked for is empty, if it is not the other."""
    view = memoryview(data)
    view = view if view.nbytes == len(view) and view.format == "B" else view.cast("B")
    if dtype not in FLOATS:
        digest = _start(dtype, shape)
        digest.update(view)
        return digest.digest(), digest.digest()
    stored, cast = _start(dtype, shape), _start("BF16", shape)
    for at in range(0, view.nbytes, _CHUNK):
        piece = view[at : at + _CHUNK]
        if exact:
            stored.update(piece)
        if bf16:
            cast.update(_round(dtype, piece))
    return stored.digest() if exact else b"", cast.digest() if bf16 else b""


def entry(name: str, leaf_digest: bytes) -> bytes:
    """A leaf bound to its name; already the leaf hash of the tree (prefix 0x00)."""
    raw = name.encode("utf-8")
    return hashlib.sha256(b"\0" + struct.pack("<I", len(raw)) + raw + leaf_digest).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _split(count: int) -> int:
    """The largest power of two below ``count``."""
    return 1 << ((count - 1).bit_length() - 1)


def merkle_root(hashes: Sequence[bytes]) -> bytes:
    """The Merkle tree hash over leaf hashes (RFC 6962, section 2.1, from the leaf hashes on)."""
    if not hashes:
        return hashlib.sha256().digest()
    # Equal to the recursive definition: a complete tree to the left of every split is what pairing up gives.
    level = list(hashes)
    while len(level) > 1:
        paired = [_node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired if len(level) % 2 == 0 else [*paired, level[-1]]
    return level[0]


def by_name(names: Iterable[str]) -> list[str]:
    """The order of the tree: by the UTF-8 bytes of the names."""
    return sorted(names, key=lambda name: name.encode("utf-8"))


def root(leaves: Mapping[str, bytes]) -> bytes:
    """The root over named leaves."""
    return merkle_root([entry(name, leaves[name]) for name in by_name(leaves)])


def structure(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """SHA-256, in hex, over names, dtypes and shapes, which headers alone give."""
    lines = (f"{name}\0{tensors[name][0]}\0{','.join(map(str, tensors[name][1]))}\n" for name in by_name(tensors))
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Inclusion:
    """Proof that one named tensor belongs to a backbone, without the others.

    Attributes:
        index: position of the entry among the sorted names.
        size: number of entries.
        path: the sibling hashes, from the entry upwards.
    """

    index: int
    size: int
    path: tuple[bytes, ...]

    def verify(self, name: str, leaf_digest: bytes, root_digest: bytes) -> bool:
        """Whether a tensor of this name and leaf is under this root, by the algorithm of RFC 9162, section 2.1.3.2."""
        if not 0 <= self.index < self.size:
            return False
        position, last, found = self.index, self.size - 1, entry(name, leaf_digest)
        for sibling in self.path:
            if last == 0:
                return False
            if position & 1 or position == last:
                found = _node(sibling, found)
                while position and not position & 1:
                    position, last = position >> 1, last >> 1
            else:
                found = _node(found, sibling)
            position, last = position >> 1, last >> 1
        return last == 0 and found == root_digest


def prove(leaves: Mapping[str, bytes], name: str) -> Inclusion:
    """The inclusion proof of one tensor among named leaves; ``KeyError`` if it is not one of them."""
    names = by_name(leaves)
    index = names.index(name) if name in leaves else -1
    if index < 0:
        raise KeyError(name)
    hashes = [entry(other, leaves[other]) for other in names]
    path: list[bytes] = []
    low, high, position = 0, len(hashes), index
    while high - low > 1:
        split = low + _split(high - low)
        if position < split:
            path.append(merkle_root(hashes[split:high]))
            high = split
        else:
            path.append(merkle_root(hashes[low:split]))
            low = split
    return Inclusion(index=index, size=len(names), path=tuple(reversed(path)))
