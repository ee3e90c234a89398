"""Live modules against the files they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers

from deltahub import identity as I

if TYPE_CHECKING:
    from pathlib import Path


from tests.identity.cases import MODELS, refused, section


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
