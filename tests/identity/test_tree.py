"""Golden values, rounding, the tree and its proofs."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltahub import identity as I
from deltahub import tensors as T
from deltahub.identity import tree

if TYPE_CHECKING:
    from pathlib import Path


def test_golden_values(tmp_path: Path) -> None:
    ones = struct.pack("<2f", 1, 2)
    half = struct.pack("<2H", 0x3F80, 0x4000)
    b_w = "234858adcdb700da79f176022aa11127418b9650dbdcf69c7ecdc8db36ea70b7"
    assert (
        I.leaf("F32", (), struct.pack("<f", 1)).hex()
        == "f53d750ffe0807e77dd18400d7b50136a8c78fcfaad3deac476029ae0b9efefa"
    )
    assert I.leaf("BF16", (2,), half).hex() == I.leaf("F32", (2,), ones, bf16=True).hex() == b_w
    assert I.leaf("BF16", (2,), half, bf16=True).hex() == b_w
    T.write(
        tmp_path / "x.safetensors",
        {
            "a": torch.tensor(1.0),
            "b.w": torch.tensor([1.0, 2.0]).bfloat16(),
            "é": torch.empty(0, 4, dtype=torch.int64),
        },
    )
    found = I.fingerprint(tmp_path)
    assert found.exact == "ab9a3cdd808b2280b6ef2a9a9f94bb67e94ea515796a18f49bbcb74244263c61"
    assert found.structure == "f5a12cf06470f663605058a4596794c8bfc743f69a5c875e99e1da236337de03"
    assert found.tensors == 3
    assert found.to_manifest() == {
        "algorithm": "sha256-tree-1",
        "exact": found.exact,
        "bf16": found.bf16,
        "structure": found.structure,
        "tensors": 3,
    }


def test_the_tree_is_that_of_rfc_6962() -> None:
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
    hashes = [hashlib.sha256(b"\0" + bytes.fromhex(one)).digest() for one in inputs]
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    assert {n: I.merkle_root(hashes[:n]).hex() for n in roots} == roots


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 31])
def test_every_inclusion_is_proved_and_no_other(count: int) -> None:
    leaves = {f"t{i}": hashlib.sha256(bytes([i])).digest() for i in range(count)}
    top = I.root(leaves)
    for name, digest in leaves.items():
        proof = I.prove(leaves, name)
        assert len(proof.path) <= (count - 1).bit_length()
        assert proof.verify(name, digest, top)
        assert not proof.verify(name + "x", digest, top)
        assert not proof.verify(name, bytes(32), top)
        assert not proof.verify(name, digest, bytes(32))
        for path in (proof.path[:-1], (*proof.path, bytes(32))) if count > 1 else ((bytes(32),),):
            assert not I.Inclusion(index=proof.index, size=count, path=path).verify(name, digest, top)
        assert not I.Inclusion(index=count, size=count, path=proof.path).verify(name, digest, top)
    with pytest.raises(KeyError):
        I.prove(leaves, "none")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_is_torchs_but_for_nan(bits: list[int]) -> None:
    wide = np.array(bits, "<u4").view("<f4")
    theirs = torch.from_numpy(wide.copy()).bfloat16().view(torch.int16).numpy().view("<u2").copy()
    theirs[np.isnan(wide)] = 0x7FC0
    shape = (len(bits),)
    assert I.leaf("F32", shape, wide.tobytes(), bf16=True) == I.leaf("BF16", shape, theirs.tobytes())


def test_rounding_of_extremes() -> None:
    hard = np.array([np.nan, -np.nan, np.inf, 3.4e38, 1e300, -1e-300, 1e-45, 65504.0])
    with np.errstate(all="ignore"):
        for dtype, kind in (("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")):
            stored = hard.astype(kind)
            rounded = torch.from_numpy(stored.astype("<f4")).bfloat16().view(torch.int16).numpy().view("<u2").copy()
            rounded[np.isnan(stored)] = 0x7FC0
            assert I.leaf(dtype, (8,), stored.tobytes(), bf16=True) == I.leaf("BF16", (8,), rounded.tobytes())


def test_long_tensors_are_hashed_as_one() -> None:
    data = np.random.default_rng(0).standard_normal(700_001).astype("<f4")
    start = b"deltahub:tensor:1\0F32\0" + struct.pack("<BQ", 1, data.size)
    assert I.leaf("F32", data.shape, data.tobytes()) == hashlib.sha256(start + data.tobytes()).digest()
    rounded = torch.from_numpy(data).bfloat16().view(torch.int16).numpy().tobytes()
    assert I.leaf("F32", data.shape, data.data, bf16=True) == I.leaf("BF16", data.shape, rounded)
    assert tree.leaf_pair("F32", data.shape, data.data)[0] == I.leaf("F32", data.shape, data.data)
