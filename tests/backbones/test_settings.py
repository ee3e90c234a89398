"""Settings: only listed fields, only over the value they replace, all or none, and undone exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, CLIPImageProcessor, LlavaConfig

from deltahub.backbones import apply_settings, build, resolve
from deltahub.backbones.libraries import LIBRARIES
from deltahub.errors import BackboneError


@pytest.fixture
def model() -> BertModel:
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    return BertModel(config)


def refused(target: object, *settings: Any, on: str = "config") -> BackboneError:
    with pytest.raises(BackboneError) as caught:
        apply_settings(target, settings, on=on)
    return caught.value


def test_apply_and_undo(model: BertModel, change: Any) -> None:
    before = model.config.to_dict()
    undo = apply_settings(model, [change("pad_token_id", 0, 5), change("eos_token_id", None, [1, 2])])
    assert (model.config.pad_token_id, model.config.eos_token_id) == (5, [1, 2])
    undo()
    undo()
    assert model.config.to_dict() == before


def test_other_objects_settings_are_left_alone(model: BertModel, change: Any) -> None:
    before = model.config.to_dict()
    apply_settings(model, [change("size", 1, 2, on="processor")])
    assert model.config.to_dict() == before


def test_nested(change: Any) -> None:
    class Model(nn.Module):
        config = LlavaConfig()

    Model.__module__ = "transformers.models.mine"
    target = Model()
    undo = apply_settings(
        target, [change("text_config.pad_token_id", None, 3), change("vision_feature_layer", -2, [8, 16, 24, -2])]
    )
    assert target.config.text_config.pad_token_id == 3
    assert target.config.vision_feature_layer == [8, 16, 24, -2]
    undo()
    assert target.config.text_config.pad_token_id is None
    assert target.config.vision_feature_layer == -2


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hidden_size", 3),
        ("__class__", "x"),
        ("_attn_implementation", "evil/kernel"),
        ("text_config.hidden_size", 3),
        ("__init__.__globals__.pad_token_id", 3),
        ("nowhere.pad_token_id", 3),
        ("pad_token_id.text_config", 3),
        ("", 3),
        ("pad_token_id", True),
        ("pad_token_id", "3"),
        ("pad_token_id", 3.0),
        ("pad_token_id", {}),
        ("eos_token_id", [1, "2"]),
        ("use_cache", 1),
        ("num_labels", 0),
        ("num_labels", 65537),
        ("num_labels", None),
        ("id2label", {"a": "b"}),
        ("id2label", {"1": {"deep": 1}}),
        ("label2id", {"a": [[1]]}),
    ],
)
def test_refused(model: BertModel, change: Any, path: str, value: object) -> None:
    before = model.config.to_dict()
    error = refused(model, change("pad_token_id", 0, 1), change(path, None, value))
    assert error.code == "E_BACKBONE_SETTING"
    assert model.config.to_dict() == before


def test_all_faults_are_listed(model: BertModel, change: Any) -> None:
    error = refused(model, change("a", 1, 2), change("pad_token_id", 0, "x"), change("b", 1, 2))
    assert error.found == "config.a: not on the list of transformers"
    assert error.also == (
        "config.pad_token_id: takes integer, found 'x'",
        "config.b: not on the list of transformers",
    )


def test_was(model: BertModel, change: Any) -> None:
    error = refused(model, change("pad_token_id", 0, 1), change("eos_token_id", 7, 1))
    assert error.code == "E_BACKBONE_SETTING_WAS"
    assert (error.where, error.expected, error.found) == ("config.eos_token_id", "7", "null")
    assert model.config.pad_token_id == 0


def test_a_field_that_shapes_the_model(model: BertModel, change: Any) -> None:
    assert refused(model, change("num_labels", 2, 3)).code == "E_BACKBONE_SETTING_BUILD"
    model.config.num_labels = 3
    undo = apply_settings(model, [change("num_labels", 2, 3)])
    undo()
    assert model.config.num_labels == 3  # the head has three rows, whatever is detached


def test_build_checks_what_was(bert: Path, change: Any) -> None:
    source = {"class": "transformers.BertModel"}
    files = resolve(source, override=bert)
    with pytest.raises(BackboneError) as caught:
        build(source, files, settings=[change("num_labels", 9, 3)])
    assert caught.value.code == "E_BACKBONE_SETTING_WAS"
    with pytest.raises(BackboneError) as caught:
        build(source, files, settings=[change("hidden_size", 8, 3)])
    assert caught.value.code == "E_BACKBONE_SETTING"


def test_processor(change: Any) -> None:
    processor = CLIPImageProcessor()
    old = copy.deepcopy(processor.image_mean)
    undo = apply_settings(processor, [change("image_mean", old, [0.5, 0.5, 0.5], on="processor")], on="processor")
    assert processor.image_mean == [0.5, 0.5, 0.5]
    undo()
    assert processor.image_mean == old


def test_scheduler_is_made_anew(change: Any) -> None:
    """What a scheduler derives from its configuration changes too, and comes back."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler()
    alphas = scheduler.alphas_cumprod.clone()
    settings = [change("beta_schedule", "linear", "scaled_linear", on="scheduler")]
    undo = apply_settings(scheduler, settings, on="scheduler")
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert not torch.equal(scheduler.alphas_cumprod, alphas)
    undo()
    undo()
    assert scheduler.config.beta_schedule == "linear"
    assert torch.equal(scheduler.alphas_cumprod, alphas)
    wrong = change("beta_schedule", "cosine", "scaled_linear", on="scheduler")
    assert refused(scheduler, wrong, on="scheduler").code == "E_BACKBONE_SETTING_WAS"


def test_diffusers_model(change: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=8)
    undo = apply_settings(model, [change("sample_size", 8, 16)])
    assert model.config.sample_size == 16
    model(torch.zeros(1, 3, 8, 8))
    undo()
    assert model.config.sample_size == 8


def test_a_model_of_no_library(change: Any) -> None:
    assert refused(nn.Linear(1, 1), change("pad_token_id", 0, 1)).code == "E_BACKBONE_SETTING"
    apply_settings(nn.Linear(1, 1), [])()


def test_the_list_is_well_formed() -> None:
    kinds = {"boolean", "integer", "number", "string", "integers", "numbers", "object", "labels"}
    for library in LIBRARIES.values():
        assert set(library.settings) <= {"config", "processor", "scheduler"}
        for fields in library.settings.values():
            for field in fields.values():
                assert set(field.types) <= kinds
                assert field.when in {"build", "live"}
