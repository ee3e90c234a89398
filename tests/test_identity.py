"""Which backbone is this: golden values, what identity depends on, the five levels, and the stamps."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deltahub import identity as I
from deltahub import tensors as T
from deltahub.errors import IdentityError, TensorFileError, UsageError
from deltahub.identity import stamps, tree
from deltahub.identity.modules import module_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
LLAMA = {**SMALL, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**LLAMA)),
    "bert head": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**LLAMA)),
    "bert tied": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**LLAMA)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ),
    "mixtral, renamed and split": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=3)
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAHUB_CACHE", str(tmp_path / "stamps-of-this-test"))
    return tmp_path / "stamps-of-this-test" / "stamps"


def values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    found = {f"layer.{i}.weight": torch.randn(6, 5, generator=make).to(dtype) for i in range(4)}
    return {**found, "step": torch.arange(3), "norm.bias": torch.ones(5).to(dtype)}


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    T.write(folder / "model.safetensors", tensors)
    return folder


def sharded(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    places = {name: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        T.write(folder / file, {name: tensors[name] for name, at in places.items() if at == file})
    index = {"metadata": {"total_size": 1}, "weight_map": {**places, **changes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


TOUCHED = ("layer.0.weight", "layer.2.weight")


def section(folder: Path, touched: tuple[str, ...] = TOUCHED, **more: Any) -> dict[str, Any]:
    found = I.describe(folder, touched=touched, **more)
    return {"source": {"hub": "org/name", "commit": "1" * 40}, **found}


def refused(code: str, *args: Any, **options: Any) -> str:
    with pytest.raises(IdentityError) as caught:
        I.check(*args, **options)
    assert caught.value.code == code
    return str(caught.value)


# The mathematics


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


# What an identity depends on


def test_it_does_not_depend_on_shards_format_or_order(tmp_path: Path) -> None:
    tensors = values()
    whole = I.fingerprint(saved(tmp_path / "one", tensors))
    assert I.fingerprint(sharded(tmp_path / "many", dict(reversed(tensors.items())))) == whole
    assert I.fingerprint(tmp_path / "one" / "model.safetensors") == whole
    assert I.from_files(sorted((tmp_path / "many").glob("*.safetensors"))) == whole
    assert I.from_files(tmp_path / "many" / "model.safetensors.index.json") == whole
    (tmp_path / "bin").mkdir()
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
        I.fingerprint(tmp_path / "bin")
    assert I.fingerprint(tmp_path / "bin", allow_pickle=True) == whole
    linked = tmp_path / "links"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(tmp_path / "one" / "model.safetensors")
    assert I.fingerprint(linked) == whole


def test_it_depends_on_names_dtypes_shapes_and_bits(tmp_path: Path) -> None:
    base = values()
    found = {I.fingerprint(saved(tmp_path / "base", base)).exact}
    first = base["layer.0.weight"]
    bit = first.clone()
    bit.view(torch.int32)[0, 0] ^= 1
    for i, change in enumerate(
        (
            {**base, "layer.0.weight": bit},
            {**base, "layer.0.weight": first.reshape(5, 6)},
            {**base, "layer.0.weight": first.view(torch.int32)},
            {**base, "layer.0.weight": base["layer.1.weight"], "layer.1.weight": first},
            {**base, "extra": torch.zeros(0)},
        )
    ):
        found.add(I.fingerprint(saved(tmp_path / str(i), change)).exact)
    assert len(found) == 6


def test_casts_share_the_bf16_root(tmp_path: Path) -> None:
    wide = values()
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in wide.items()}
    upcast = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    found = [I.fingerprint(saved(tmp_path / str(i), one)) for i, one in enumerate((wide, half, upcast))]
    assert len({one.bf16 for one in found}) == 1
    assert len({one.exact for one in found}) == 3
    assert found[1].bf16 == found[1].exact


def test_ties_and_exclusions(tmp_path: Path) -> None:
    tensors = values()
    alias = {**tensors, "head.weight": tensors["layer.0.weight"].clone(), "mask": torch.zeros(2)}
    plain = I.fingerprint(saved(tmp_path / "plain", tensors))
    folder = saved(tmp_path / "alias", alias)
    ties = {"head.weight": "layer.0.weight"}
    found = I.from_files(folder, tied=ties, excluded=["mask"])
    assert (found.exact, found.bf16, found.structure, found.tensors) == (
        plain.exact,
        plain.bf16,
        plain.structure,
        plain.tensors,
    )
    assert found.to_manifest()["tied"] == ties
    assert found.to_manifest()["excluded"] == ["mask"]
    assert I.fingerprint(folder).exact != plain.exact
    with pytest.raises(IdentityError, match="E_BACKBONE_TIED"):
        I.from_files(folder, tied={"head.weight": "layer.1.weight"})


@pytest.mark.parametrize("name", MODELS)
def test_a_live_model_is_what_its_files_are(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    files = I.from_files(tmp_path)
    assert I.fingerprint(model) == files
    assert I.fingerprint(type(model).from_pretrained(tmp_path)) == files
    specs = I.open_checkpoint(tmp_path).specs
    assert module_checkpoint(model).specs == specs
    names = I.checkpoint_names(model)
    assert set(names.values()) <= specs.keys()
    live = model.state_dict(keep_vars=True)
    for at, other in names.items():
        assert T.value_layout(at, live[at]) == specs[other]
    if "mixtral" not in name:
        assert names.keys() == live.keys()
    else:
        assert names.keys() < live.keys()


@pytest.mark.parametrize("name", ["bert tied", "llama tied", "gpt2", "t5"])
def test_a_bin_with_tied_heads_is_what_safetensors_are(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    found = I.from_files(tmp_path / "bin", allow_pickle=True)
    assert found == I.from_files(tmp_path / "safe")
    assert found.tied
    report = I.check({"identity": found.to_manifest()}, files=tmp_path / "safe")
    assert (report.level, report.root) == (I.Level.L4, "exact")
    I.check({"identity": found.to_manifest()}, files=tmp_path / "bin", allow_pickle=True)
    I.check({"identity": found.to_manifest()}, module=model)


def test_a_plain_module_and_a_wrapped_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.append(model[0])
    T.write(tmp_path / "model.safetensors", {n: v for n, v in model.state_dict().items() if not n.startswith("2.")})
    assert I.fingerprint(model) == I.fingerprint(tmp_path)
    assert I.checkpoint_names(model)["2.weight"] == "0.weight"
    inner = MODELS["bert"]()
    wrapper = nn.Module()
    wrapper.body = nn.Sequential(inner, nn.Identity())
    assert I.fingerprint(wrapper) == I.fingerprint(inner)
    assert I.checkpoint_names(wrapper)["body.0.pooler.dense.bias"] == "pooler.dense.bias"


def test_a_module_without_values() -> None:
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(IdentityError, match="E_IDENTITY_VALUES"):
        I.fingerprint(empty)
    sparse = nn.Module()
    sparse.register_buffer("a", torch.zeros(2, 2).to_sparse())
    with pytest.raises(IdentityError, match="E_IDENTITY_VALUES"):
        I.fingerprint(sparse)
    with pytest.raises(UsageError, match="E_IDENTITY_SOURCE"):
        I.fingerprint("org/name")


# Folders


def test_an_index_names_plain_files_beside_it(tmp_path: Path) -> None:
    tensors = values()
    saved(tmp_path, {"stolen": torch.zeros(1)})
    for i, bad in enumerate(
        (
            "../model.safetensors",
            "/etc/passwd",
            "a/b.safetensors",
            "..",
            ".",
            "",
            "a\\b",
            "C:x",
            "a\0b",
            "a\u202eb",
            7,
            None,
        )
    ):
        folder = sharded(tmp_path / str(i), tensors, step=bad)
        with pytest.raises(IdentityError) as caught:
            I.fingerprint(folder)
        assert caught.value.code == "E_IDENTITY_INDEX", bad
    for i, change in enumerate(({"step": "gone.safetensors"}, {"nothing": "model-00001-of-00003.safetensors"})):
        with pytest.raises(IdentityError, match="E_IDENTITY_INDEX"):
            I.fingerprint(sharded(tmp_path / f"m{i}", tensors, **change))
    folder = sharded(tmp_path / "json", tensors)
    index = folder / "model.safetensors.index.json"
    deep = "[" * 100_000
    for text in ("", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{}}', '{"weight_map":{"a":"b","a":"b"}}', deep):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(IdentityError, match="E_IDENTITY_INDEX"):
            I.fingerprint(folder)
    index.write_bytes(b"\xff")
    with pytest.raises(IdentityError, match="E_IDENTITY_INDEX"):
        I.fingerprint(folder)
    index.unlink()
    os.mkfifo(index)
    with pytest.raises(TensorFileError, match="E_TENSORS_NOT_REGULAR"):
        I.fingerprint(folder)


def test_a_pickle_named_by_an_index_needs_consent(tmp_path: Path) -> None:
    torch.save(values(), tmp_path / "a.bin")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"step":"a.bin"}}', encoding="utf-8")
    with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
        I.fingerprint(tmp_path)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["DELTAHUB_CACHE"] + "-bomb",)


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    for content in (Bomb(), {"a": Bomb()}, [1], {"a": 1}, {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
            I.fingerprint(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02junk")
    with pytest.raises(IdentityError, match="E_IDENTITY_PICKLE"):
        I.fingerprint(tmp_path, allow_pickle=True)
    assert not Path(os.environ["DELTAHUB_CACHE"] + "-bomb").exists()


def test_which_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="E_IDENTITY_NO_WEIGHTS"):
        I.fingerprint(tmp_path)
    T.write(tmp_path / "unusual.safetensors", values())
    one = I.fingerprint(tmp_path)
    T.write(tmp_path / "other.safetensors", values())
    with pytest.raises(IdentityError, match="E_IDENTITY_AMBIGUOUS"):
        I.fingerprint(tmp_path)
    T.write(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    assert I.fingerprint(tmp_path) != one
    with pytest.raises(IdentityError, match="E_IDENTITY_DUPLICATE"):
        I.from_files([tmp_path / "unusual.safetensors", tmp_path / "other.safetensors"])


# The levels


def test_levels_are_reported(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder)
    source = {"hub": "org/name", "commit": "1" * 40}
    seen = {one["path"]: (one["size"], one["sha256"]) for one in declared["files"]}
    L = I.Level
    reports = {level: I.check(declared, files=folder, level=level, source=source, witnesses=seen) for level in I.Level}
    assert {level: report.levels for level, report in reports.items()} == {
        L.L0: (L.L0, L.L1),
        L.L1: (L.L0, L.L1),
        L.L2: (L.L0, L.L1, L.L2),
        L.L3: (L.L0, L.L1, L.L2, L.L3),
        L.L4: (L.L0, L.L1, L.L2, L.L3, L.L4),
    }
    assert [len(report.hashed) for report in reports.values()] == [0, 0, 0, 2, 6]
    assert reports[L.L3].root == "exact"
    assert "L3 touched; 2 of 6 tensors hashed" in str(reports[L.L3])
    assert I.check(declared, files=folder).levels == (L.L2, L.L3)
    assert I.check(declared, files=sharded(tmp_path / "b", values()), level=L.L4).root == "exact"
    assert L.named("touched") is L.L3
    assert L.named("L4") is L.L4
    with pytest.raises(UsageError, match="E_IDENTITY_LEVEL"):
        L.named("some")
    for wrong in ({}, {"files": folder, "module": nn.Linear(1, 1)}):
        with pytest.raises(UsageError, match="E_IDENTITY_SOURCE"):
            I.check(declared, **wrong)


def test_without_the_leaves_that_are_needed_everything_is_compared(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    for declared, touched in (
        (section(folder, ()), None),
        (section(folder), ["layer.1.weight"]),
        (section(folder), []),
    ):
        report = I.check(declared, files=folder, touched=touched)
        assert report.level is I.Level.L4
        assert len(report.hashed) == 6
    assert I.check(section(folder), files=folder, touched=["layer.0.weight"]).level is I.Level.L3


def test_another_commit_and_other_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder)
    other = {"hub": "org/name", "commit": "2" * 40}
    text = refused("E_BACKBONE_COMMIT", declared, level=I.Level.L0, source=other)
    assert "org/name@" + "2" * 40 in text
    seen = {"model.safetensors": (1, "0" * 64)}
    assert "model.safetensors" in refused("E_BACKBONE_WITNESS", declared, level=I.Level.L1, witnesses=seen)
    report = I.check(declared, files=folder, source=other, witnesses=seen)
    assert report.levels == (I.Level.L2, I.Level.L3)
    assert len(report.notes) == 2
    changed = {name: t + 1 for name, t in values().items()}
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "b", changed), source=other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", ["touched", "elsewhere"])
def test_one_flipped_bit(tmp_path: Path, dtype: torch.dtype, place: str) -> None:
    tensors = values(dtype)
    declared = section(saved(tmp_path / "a", tensors))
    name = "layer.2.weight" if place == "touched" else "layer.1.weight"
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8)[0, 0] ^= 1  # the lowest bit of all: nothing that rounding would show
    folder = saved(tmp_path / "b", tensors)
    model = nn.Module()
    for at, value in tensors.items():
        model.register_buffer(at.replace(".", "_"), value)
    if place == "touched":
        assert "differing: layer.2.weight" in refused("E_BACKBONE_MISMATCH", declared, files=folder)
    else:
        assert I.check(declared, files=folder).level is I.Level.L3
    text = refused("E_BACKBONE_MISMATCH", declared, files=folder, level=I.Level.L4)
    assert "org/name@" in text
    if place == "elsewhere":
        assert "none of the touched tensors differs" in text


def test_ten_names_and_a_count(tmp_path: Path) -> None:
    tensors = {f"t{i:02}": torch.full((2,), float(i)) for i in range(30)}
    declared = section(saved(tmp_path / "a", tensors), tuple(tensors))
    folder = saved(tmp_path / "b", {name: t + 1 for name, t in tensors.items()})
    text = refused("E_BACKBONE_MISMATCH", declared, files=folder)
    assert "t00, t01" in text
    assert "t09 and 20 more" in text
    assert "t10" not in text


def test_missing_extra_and_reshaped_tensors(tmp_path: Path) -> None:
    base = values()
    declared = section(saved(tmp_path / "a", base))
    less = {name: t for name, t in base.items() if name != "layer.0.weight"}
    text = refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "less", less))
    assert "missing: layer.0.weight" in text
    assert "5 tensors where 6 were declared" in text
    more = {**base, "extra": torch.zeros(1)}
    assert "7 tensors" in refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "more", more))
    turned = {**base, "layer.0.weight": base["layer.0.weight"].T}
    text = refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "turned", turned))
    assert "differing: layer.0.weight" in text
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "x", turned), level=I.Level.L2)


CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize(("theirs", "mine"), CASTS, ids=str)
@pytest.mark.parametrize("leaves", ["both", "exact only", "none"])
def test_a_cast_copy_is_accepted_through_the_bf16_root(
    tmp_path: Path, theirs: torch.dtype, mine: torch.dtype, leaves: str
) -> None:
    # small integers: what float16 and bfloat16 both hold, so that one rounding is as good as two
    base = {n: (t * 8).round().to(theirs) if t.is_floating_point() else t for n, t in values().items()}
    declared = section(saved(tmp_path / "a", base))
    for field in {"both": (), "exact only": ("leaves_bf16",), "none": ("leaves", "leaves_bf16")}[leaves]:
        declared.pop(field, None)
    cast = {name: t.to(mine) if t.is_floating_point() else t for name, t in base.items()}
    folder = saved(tmp_path / "b", cast)
    for level in (I.Level.L3, I.Level.L4):
        report = I.check(declared, files=folder, level=level)
        assert report.root == "bf16"
        assert I.Level.L2 in report.levels
        assert "BF16" in str(report)
    if leaves == "both":
        assert I.check(declared, files=folder).level is I.Level.L3
    model = nn.Module()
    model.layer = nn.ModuleList([nn.Linear(5, 6, bias=False) for _ in range(4)])
    model.register_buffer("step", cast["step"])
    model.norm = nn.Module()
    model.norm.bias = nn.Parameter(cast["norm.bias"])
    model.to(mine).load_state_dict(cast)
    assert I.check(declared, module=model).root == "bf16"
    wrong = {**cast, "layer.0.weight": cast["layer.0.weight"] + 1}
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "c", wrong))
    model.load_state_dict(wrong)
    refused("E_BACKBONE_MISMATCH", declared, module=model)


def test_a_copy_of_which_only_a_part_was_cast(tmp_path: Path) -> None:
    base = values(torch.bfloat16)
    mixed = {**base, "norm.bias": base["norm.bias"].float()}
    declared = section(saved(tmp_path / "a", mixed))
    report = I.check(declared, files=saved(tmp_path / "b", base))
    assert (report.level, report.root) == (I.Level.L4, "bf16")
    refused("E_BACKBONE_MISMATCH", declared, files=tmp_path / "b", level=I.Level.L2)
    base["norm.bias"][0] += 1
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "c", base))


def test_a_quantised_copy(tmp_path: Path) -> None:
    base = values()
    declared = section(saved(tmp_path / "a", base))
    eight = {n: t.to(torch.int8) if n.endswith("weight") else t for n, t in base.items()}
    for i, copied in enumerate(
        (eight, {**eight, "layer.0.weight_scale": torch.ones(1)}, {**base, "layer.0.SCB": torch.ones(1)})
    ):
        text = refused("E_BACKBONE_QUANTISED", declared, files=saved(tmp_path / str(i), copied))
        assert "quantise" in text
    folder = tmp_path / "0"
    root = I.fingerprint(folder).exact
    declared["compatible"] = [{"root": root, "relation": "quantised", "method": "int8"}]
    report = I.check(declared, files=folder)
    assert (report.root, report.level) == ("compatible", I.Level.L4)
    assert "quantised" in str(report)


def test_a_tied_alias_that_differs(tmp_path: Path) -> None:
    base = values()
    ties = {"head.weight": "layer.0.weight"}
    declared = section(saved(tmp_path / "a", base))
    declared["identity"]["tied"] = ties
    both = {**base, "head.weight": base["layer.0.weight"].clone()}
    assert I.check(declared, files=saved(tmp_path / "b", both)).root == "exact"
    both["head.weight"][0, 0] += 1
    assert "head.weight equal to layer.0.weight" in refused(
        "E_BACKBONE_TIED", declared, files=saved(tmp_path / "c", both)
    )
    lost = {name: t for name, t in both.items() if name != "layer.0.weight"}
    refused("E_BACKBONE_MISMATCH", declared, files=saved(tmp_path / "d", lost))


@pytest.mark.parametrize(
    ("field", "value", "code", "says"),
    [
        ("algorithm", "blake3", "E_IDENTITY_ALGORITHM", "blake3"),
        ("algorithm", None, "E_IDENTITY_ALGORITHM", "sha256-tree-1"),
        ("exact", "0" * 63, "E_IDENTITY_DIGEST", "not 63"),
        ("bf16", "0" * 128, "E_IDENTITY_DIGEST", "not 128"),
        ("structure", "A" * 64, "E_IDENTITY_DIGEST", "lower case"),
        ("exact", "g" * 64, "E_IDENTITY_DIGEST", "hexadecimal"),
        ("exact", "../../../etc/passwd" + "0" * 45, "E_IDENTITY_DIGEST", "hexadecimal"),
        ("exact", 7, "E_IDENTITY_DIGEST", "string"),
        ("tensors", True, "E_IDENTITY_SECTION", "count"),
        ("tensors", -1, "E_IDENTITY_SECTION", "count"),
        ("tied", [], "E_IDENTITY_SECTION", "tied"),
        ("tied", {"a": "b", "b": "c"}, "E_IDENTITY_SECTION", "tied"),
    ],
)
def test_declarations_that_are_wrong(tmp_path: Path, field: str, value: Any, code: str, says: str) -> None:
    declared = section(saved(tmp_path, values()))
    declared["identity"][field] = value
    assert says in refused(code, declared, files=tmp_path)


def test_leaves_that_are_wrong(tmp_path: Path) -> None:
    declared = section(saved(tmp_path, values()))
    for field in ("leaves", "leaves_bf16"):
        other = copy.deepcopy(declared)
        other[field]["layer.0.weight"] = "ABC"
        assert f"backbone.{field}.layer.0.weight" in refused("E_IDENTITY_DIGEST", other, files=tmp_path)
    refused("E_IDENTITY_SECTION", {**declared, "leaves": []}, files=tmp_path)
    refused("E_IDENTITY_SECTION", [], files=tmp_path)
    with pytest.raises(IdentityError, match="E_IDENTITY_UNKNOWN"):
        I.describe(tmp_path, touched=["none"])
    assert I.leaves(tmp_path, TOUCHED) == declared["leaves"]


# Modules


def test_a_live_model_against_its_files(tmp_path: Path) -> None:
    for name in ("bert", "gpt2", "mixtral, renamed and split"):
        folder = tmp_path / name
        model = MODELS[name]()
        model.save_pretrained(folder)
        touched = [n for n in I.open_checkpoint(folder).specs if "attn" in n or "attention" in n]
        declared = section(folder, tuple(touched))
        report = I.check(declared, module=model, level=I.Level.L4)
        assert (report.root, report.levels) == ("exact", (I.Level.L2, I.Level.L3, I.Level.L4))
        assert I.check(declared, module=model.to(torch.bfloat16)).root == "bf16"
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "attn" in n or "attention" in n).flatten()[0] += 1
        refused("E_BACKBONE_MISMATCH", declared, module=model)


def test_an_encoder_inside_a_class_with_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    encoder, headed = MODELS["bert"](), MODELS["bert head"]()
    headed.bert.load_state_dict(encoder.state_dict(), strict=False)
    encoder.pooler.load_state_dict(headed.bert.pooler.state_dict())
    encoder.save_pretrained(tmp_path / "encoder")
    headed.save_pretrained(tmp_path / "headed")
    inner = section(tmp_path / "encoder", ("encoder.layer.0.attention.self.query.weight",))
    report = I.check(inner, module=headed)
    assert report.levels == (I.Level.L2, I.Level.L3)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "encoder")
    assert I.check(inner, module=loaded, level=I.Level.L4).root == "exact"
    outer = section(tmp_path / "headed", ("bert.encoder.layer.0.attention.self.query.weight",))
    report = I.check(outer, module=encoder)
    assert report.levels == (I.Level.L3,)
    assert "not all" in str(report)
    refused("E_BACKBONE_MISMATCH", outer, module=encoder, level=I.Level.L4)
    refused("E_BACKBONE_MISMATCH", outer, module=encoder, level=I.Level.L2)
    with torch.no_grad():
        encoder.encoder.layer[0].attention.self.query.weight[0, 0].view(torch.int32).bitwise_xor_(1)
    assert "differing: bert.encoder" in refused("E_BACKBONE_MISMATCH", outer, module=encoder)


# Stamps


def old(*paths: Path) -> None:
    """Stamps are not kept of files that changed a moment ago; let them be older."""
    time.sleep(0.06)
    for path in paths:
        assert path.exists()


def test_the_second_check_is_free(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(64, 64) for i in range(200)}
    folder = saved(tmp_path / "a", tensors)
    declared = section(folder, tuple(tensors)[:150], cache=False)
    old(folder)
    assert not own_cache.exists()
    first = I.check(declared, files=folder)
    assert len(list(own_cache.iterdir())) == 1

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the file was opened")

    with monkeypatch.context() as patch:
        patch.setattr(T.TensorFile, "open", never)
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            assert I.check(declared, files=folder) == first
            best = min(best, time.process_time() - start)
        assert best < 0.03  # 2 ms on a quiet machine
    assert I.check(declared, files=folder, level=I.Level.L4).level is I.Level.L4
    with monkeypatch.context() as patch:
        patch.setattr(T.TensorFile, "open", never)
        I.check(declared, files=folder, level=I.Level.L4)


def test_a_stamp_does_not_outlive_its_file(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder, cache=False)
    old(folder)
    I.check(declared, files=folder)
    path = folder / "model.safetensors"
    times = path.stat()
    data = bytearray(path.read_bytes())
    view = T.TensorFile.open(path)["layer.0.weight"]
    data[view.begin] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a forged time: the inode's own change time shows it
    refused("E_BACKBONE_MISMATCH", declared, files=folder)


def test_a_broken_stamp_is_no_stamp(tmp_path: Path, own_cache: Path) -> None:
    folder = saved(tmp_path / "a", values())
    declared = section(folder, cache=False)
    old(folder)
    I.check(declared, files=folder)
    (stamp,) = own_cache.iterdir()
    good = stamp.read_text(encoding="utf-8")
    for text in (
        "",
        "{",
        "[]",
        '{"version":1}',
        good[:-9],
        good.replace('"version":1', '"version":0'),
        good.replace("F32", "F3"),
    ):
        stamp.write_text(text, encoding="utf-8")
        if 'F3"' in text:
            with pytest.raises(IdentityError):
                I.check(declared, files=folder)
            continue
        assert I.check(declared, files=folder).root == "exact"


def test_a_fresh_file_is_not_stamped_and_a_full_cache_does_not_matter(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "a", values())
    path = folder / "model.safetensors"
    key = stamps.stat_key(path)
    monkeypatch.setattr(stamps.time, "time", lambda: path.stat().st_ctime_ns / 1e9 + 0.001)
    stamps.store(key, stamps.Stamp({}))
    assert not own_cache.exists()
    monkeypatch.undo()
    monkeypatch.setenv("DELTAHUB_CACHE", str(path))  # a file: nothing can be kept below it
    old(folder)
    assert I.check(section(folder), files=folder).root == "exact"


def test_processes_share_stamps_without_spoiling_them(tmp_path: Path, own_cache: Path) -> None:
    tensors = {f"t{i}": torch.full((8,), float(i)) for i in range(40)}
    folder = saved(tmp_path / "a", tensors)
    old(folder)
    code = (
        "import sys; from deltahub import identity as I\n"
        "for i in range(int(sys.argv[2]), 40, 2): I.leaves(sys.argv[1], [f't{i}'])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), start], cwd=Path(__file__).parents[1])
        for start in ("0", "1")
    ]
    assert [one.wait() for one in running] == [0, 0]
    (stamp,) = own_cache.iterdir()
    found = stamps.load(stamps.stat_key(folder / "model.safetensors"))
    assert found is not None
    assert len(found.leaves) >= 20
    assert I.leaves(folder, tensors) == I.leaves(folder, tensors, cache=False)
    assert stamp.suffix == ".json"


def test_no_torch_is_loaded(tmp_path: Path) -> None:
    saved(tmp_path, values())
    code = (
        "import sys; from deltahub import identity as I; d = I.describe(sys.argv[1], touched=['step']);"
        "I.check(d, files=sys.argv[1], level=I.Level.L4); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[1], check=True)
