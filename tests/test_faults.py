"""The faults that were measured in peft 0.21.2: each ends here in an error, or in the right numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import deltahub
from deltahub.tensors import TensorFile, write
from tests.models import ids, llama
from tests.zoo import randomise


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def deeper(layers: int, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=99,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    model = llama()
    delta = deltahub.attach(model, "lora", ["q_proj", "down_proj"], rank=2, scale=2.0)
    randomise(delta.parameters())
    delta.save(tmp_path / "package")
    return tmp_path / "package"


def edit(package: Path, change: Callable[[dict[str, object], dict[str, torch.Tensor]], None]) -> None:
    """Change a package's manifest and tensors, with sizes and digests made right again."""
    path = package / "delta.safetensors"
    with TensorFile.read(path) as file:
        tensors = {name: file.torch(name).clone() for name in file}
    manifest = json.loads((package / "delta.json").read_text())
    change(manifest, tensors)
    path.unlink()
    digest = write(path, tensors)
    manifest["files"] = [{"path": path.name, "size": digest.size, "sha256": digest.sha256}]
    (package / "delta.json").write_text(json.dumps(manifest))


def refused(package: Path, model: nn.Module, **options: object) -> str:
    """The code with which loading is refused; the model has the bits, classes and flags that it had."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.load(package, backbone=model, **options)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not deltahub.deltas(model)
    return caught.value.code


def test_01_another_backbone_of_the_same_shape_is_refused(package: Path) -> None:
    assert refused(package, llama(seed=1)) == "E_BACKBONE_MISMATCH"


def test_02_a_delta_for_more_layers_is_refused(tmp_path: Path) -> None:
    model = deeper(4)
    deltahub.attach(model, "lora", "q_proj", rank=2).save(tmp_path / "package")
    assert refused(tmp_path / "package", deeper(2)) == "E_BACKBONE_MISMATCH"
    assert refused(tmp_path / "package", deeper(2), verify=None) == "E_TARGET_MISSING"


def test_03_tensors_under_another_prefix_are_refused(package: Path) -> None:
    def change(_: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("lora/model.", "lora/base_model.model.model.")] = tensors.pop(name)

    edit(package, change)
    assert refused(package, llama()) == "E_PACKAGE_TENSORS"


def test_04_a_delta_for_fewer_layers_is_refused(package: Path) -> None:
    assert refused(package, deeper(4)) == "E_BACKBONE_MISMATCH"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_05_values_that_are_no_numbers_are_refused(package: Path, value: float) -> None:
    def change(_: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = value

    edit(package, change)
    assert refused(package, llama()) == "E_PACKAGE_VALUES"
    assert not torch.isfinite(logits(deltahub.load(package, backbone=llama(), allow_nonfinite=True))).all()


def test_06_a_failed_load_leaves_the_model_as_it_was(package: Path) -> None:
    def change(_: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        name = max(tensors)  # an `up`: consistent with its config, and too long for its host
        tensors[name] = torch.zeros(tensors[name].shape[0] + 1, tensors[name].shape[1])

    edit(package, change)
    assert refused(package, llama()) == "E_KIND_SHAPE"


@pytest.mark.filterwarnings("ignore")
def test_07_layers_that_are_used_several_times_merge_right() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    torch.manual_seed(0)
    config = AlbertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=99,
        embedding_size=16,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval()
    delta = deltahub.attach(model, "lora", "attention.query", rank=2, scale=2.0)
    randomise(delta.parameters())
    live = logits(model)
    delta.merge()
    assert (logits(model) - live).abs().max() < 1e-5


def test_08_a_tied_head_is_right_live_and_refused_merged() -> None:
    model = llama(tied=True)
    delta = deltahub.attach(model, "lora", "lm_head", rank=2)
    randomise(delta.parameters())
    hidden = model.model(input_ids=ids()).last_hidden_state
    tensors = delta.tensors()
    update = tensors["lora/lm_head/up"] @ tensors["lora/lm_head/down"]
    expected = hidden @ (model.lm_head.weight + update).T
    assert (model(input_ids=ids()).logits - expected).abs().max() < 1e-5
    with pytest.raises(deltahub.DeltaHubError) as caught:
        delta.merge()
    assert caught.value.code == "E_INJECTION_TIED"
    assert "embed_tokens" in str(caught.value)


def test_10_an_error_in_the_middle_leaves_no_trace() -> None:
    model = llama()
    for name in ("a", "b"):
        randomise(deltahub.attach(model, "lora", "q_proj", name=name, rank=2).parameters(), seed=ord(name))
    before = logits(model)
    with pytest.raises(IndexError), deltahub.using(model, "a"):
        model(input_ids=torch.full((1, 3), 10**6))  # no such token
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["mlp", "q_proj", "default", "weight", "model"])
def test_11_a_delta_called_like_a_part_of_a_path_is_saved_whole(tmp_path: Path, name: str) -> None:
    model = llama()
    delta = deltahub.attach(model, "lora", ["q_proj", "down_proj"], name=name, rank=2)
    other = deltahub.attach(model, "lora", "q_proj", name="other", rank=2)
    randomise([*delta.parameters(), *other.parameters()])
    package = delta.save(tmp_path / "package")
    assert len(package.names) == 8
    with deltahub.using(model, name):
        expected = logits(model)
    assert torch.equal(logits(deltahub.load(tmp_path / "package", backbone=llama())), expected)


@pytest.mark.parametrize("name", ["0", "a.b", "a/b", "", "é", "a" * 65])
def test_11_a_name_that_a_package_cannot_hold_is_refused_at_once(name: str) -> None:
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.attach(llama(), "lora", "q_proj", name=name, rank=2)
    assert caught.value.code == "E_USAGE_NAME"


def test_12_ranks_and_scales_per_module_survive_a_swap(tmp_path: Path) -> None:
    model = llama()
    deltahub.attach(model, "lora", "q_proj", name="small", rank=2, scale=2.0)
    deltahub.attach(model, "lora", "down_proj", name="large", rank=8, scale=0.5)
    for d in deltahub.deltas(model).values():
        randomise(d.parameters())
    expected = logits(model)
    deltahub.save(model, tmp_path / "package")
    again = llama()
    deltahub.attach(again, "lora", "q_proj", name="first", rank=4)
    deltahub.deltas(again)["first"].detach()
    assert torch.equal(logits(deltahub.load(tmp_path / "package", backbone=again)), expected)


@pytest.mark.parametrize("target", ["(([a-z_0-9.])+)+!", "^model\\..*", "model.*.q_proj", "{0..999999999}.x"])
def test_13_a_pattern_in_a_package_is_refused_at_once(package: Path, target: str) -> None:
    manifest = json.loads((package / "delta.json").read_text())
    manifest["modules"][0]["targets"] = [target]
    (package / "delta.json").write_text(json.dumps(manifest))
    start = time.process_time()
    assert refused(package, llama()).startswith("E_TARGET")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("rank", [1_000_000, 65536, 0, -1, 2**40])
def test_14_a_rank_that_the_file_does_not_hold_costs_nothing(package: Path, rank: int) -> None:
    import resource

    manifest = json.loads((package / "delta.json").read_text())
    manifest["modules"][0]["config"]["rank"] = rank
    (package / "delta.json").write_text(json.dumps(manifest))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert refused(package, llama()) in {"E_KIND_SHAPE", "E_KIND_CONFIG"}
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_15_merging_and_unmerging_in_bfloat16_changes_no_bit() -> None:
    model = llama().to(torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    delta = deltahub.attach(model, "lora", ["q_proj", "down_proj"], rank=4, scale=2.0)
    randomise(delta.parameters())
    for _ in range(10):
        delta.merge()
        delta.unmerge()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_16_two_active_deltas_both_act() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 8, 8)
    bare = model(x)
    effects = []
    for name in ("a", "b"):
        randomise(deltahub.attach(model, "lora", "0", name=name, rank=2).parameters(), seed=ord(name))
        with deltahub.using(model, name):
            effects.append(model(x) - bare)
    assert (model(x) - bare - effects[0] - effects[1]).abs().max() < 1e-5


def test_17_loading_runs_no_initialiser_and_leaves_the_weights_alone(package: Path) -> None:
    model = llama()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    deltahub.load(package, backbone=model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
