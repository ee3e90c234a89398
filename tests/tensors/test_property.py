"""What the strict reader accepts, safetensors accepts, with the same bytes."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import safetensors.torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltahub import tensors as T
from deltahub.errors import TensorFileError
from tests.tensors.cases import BIDI, file_bytes

if TYPE_CHECKING:
    import pytest

names = st.text(st.characters(codec="utf-8"), min_size=0, max_size=6) | st.sampled_from(
    ["a", "b", "__metadata__", BIDI]
)
dims = st.integers(0, 4) | st.sampled_from([2**31, 2**62, 2**63, 2**64, -1, True, 1.0, None])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*T.DTYPES, "f32", "X"]),
        "shape": st.lists(dims, max_size=4),
        "data_offsets": st.lists(st.integers(0, 40) | dims, min_size=1, max_size=3),
    },
    optional={"extra": st.none()},
)


@st.composite
def laid_out(draw: st.DrawFn) -> bytes:
    """Files that are right, in any order of tensors and with any padding."""
    header: dict[str, object] = {}
    at = 0
    chosen = draw(
        st.lists(st.tuples(names, st.sampled_from(list(T.DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=5)
    )
    for name, dtype, shape in chosen:
        bits = int(np.prod(shape, dtype=np.int64)) * T.DTYPES[dtype]
        if name in {*header, "__metadata__"} or bits % 8:
            continue
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(names, names, max_size=3))
    items = draw(st.permutations(list(header.items())))
    ascii_only = draw(st.booleans())
    raw = json.dumps(dict(items), ensure_ascii=ascii_only).encode() + b" " * draw(st.integers(0, 9))
    return struct.pack("<Q", len(raw)) + raw + draw(st.binary(min_size=at, max_size=at))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A right file with a few bytes exchanged, inserted or cut."""
    data = bytearray(draw(laid_out()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        data[at : at + draw(st.integers(0, 2))] = draw(
            st.binary(max_size=2)
            | st.sampled_from([b'"', b"-", b"0", b"[", b"{", b",", b" ", b"\t", b"9" * 20, b".0", b"e1"])
        )
    return bytes(data)


wild = st.builds(
    lambda header, body, pad: file_bytes(json.dumps(header) + pad, body),
    st.dictionaries(names, entries | st.none() | st.dictionaries(names, names, max_size=2), max_size=3),
    st.binary(max_size=40),
    st.sampled_from(["", " ", "\n", "\0"]),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=laid_out() | mutated() | wild | st.binary(max_size=60))
def test_what_is_accepted_is_accepted_by_the_library_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.safetensors"
    path.write_bytes(data)
    try:
        found = T.TensorFile.read(path)
        mine = {name: found.data(name).tobytes() for name in found}
    except TensorFileError:
        return
    theirs = dict(safetensors.deserialize(data))
    assert theirs.keys() == mine.keys()
    for name, info in theirs.items():
        assert bytes(info["data"]) == mine[name]
        assert (info["dtype"], tuple(info["shape"])) == (found[name].dtype, found[name].shape)
    with T.TensorFile.open(path) as mapped:
        assert {name: mapped.data(name).tobytes() for name in mapped} == mine
        assert mapped.metadata == found.metadata
        assert dict(mapped) == dict(found)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=laid_out())
def test_right_files_are_accepted_unless_a_name_is_odd(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "right.safetensors"
    path.write_bytes(data)
    try:
        found = T.TensorFile.read(path)
        for name in found:
            found.data(name)
    except TensorFileError as error:
        refusal = error.code
    else:
        refusal = "E_TENSORS_NAME"
    assert refusal in {"E_TENSORS_NAME", "E_TENSORS_BOOL"}
