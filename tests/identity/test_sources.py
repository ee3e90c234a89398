"""What an identity depends on and what it does not: names and bits, not shards, formats or how a model is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from deltahub import identity as I
from deltahub import tensors as T
from deltahub.errors import IdentityError, UsageError
from deltahub.identity.modules import module_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


from tests.identity.cases import MODELS, saved, sharded, values


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
