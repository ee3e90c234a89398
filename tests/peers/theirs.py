"""The real ``adapters`` library's side: runs in an environment of its own, which has no DeltaHub.

``python theirs.py make FOLDER``: one folder per method and model: ``backbone/``, ``adapter/``, ``reference.npz``.
``python theirs.py load FOLDER``: loads each ``export/`` and compares it with the reference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
import transformers
from adapters import (
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
    VeraConfig,
)

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}
SMALL |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 64}
PREFIX = PrefixTuningConfig(prefix_length=4, bottleneck_size=6)

METHODS: dict[str, Any] = {
    "lora": LoRAConfig(r=4, alpha=12),
    "lora-everywhere": LoRAConfig(
        r=2, alpha=2, intermediate_lora=True, output_lora=True, attn_matrices=["q", "k", "v"]
    ),
    "lora-gated": LoRAConfig(r=4, alpha=8, use_gating=True),
    "dora": DoRAConfig(r=4, alpha=8),
    "vera": VeraConfig(r=4, alpha=8),
    "ia3": IA3Config(),
    "pfeiffer": SeqBnConfig(reduction_factor=4),
    "pfeiffer-learned": SeqBnConfig(reduction_factor=4, scaling="learned", ln_before=True, non_linearity="gelu"),
    "pfeiffer-channel": SeqBnConfig(reduction_factor=4, scaling="channel"),
    "pfeiffer-postnorm": SeqBnConfig(reduction_factor=4, ln_after=True),
    "pfeiffer-gated": SeqBnConfig(reduction_factor=4, use_gating=True),
    "pfeiffer-inv": SeqBnInvConfig(reduction_factor=4),
    "adapter-plus": SeqBnConfig(reduction_factor=4, original_ln_after=False, residual_before_ln=False),
    "houlsby": DoubleSeqBnConfig(reduction_factor=4),
    "houlsby-postnorm": DoubleSeqBnConfig(reduction_factor=4, ln_after=True, adapter_residual_before_ln=True),
    "parallel": ParBnConfig(reduction_factor=4),
    "parallel-both": BnConfig(
        mh_adapter=True,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="relu",
        is_parallel=True,
        scaling="learned",
    ),
    "compacter": CompacterConfig(reduction_factor=2, phm_dim=4),
    "compacter++": CompacterPlusPlusConfig(reduction_factor=2, phm_dim=4),
    "prefix": PREFIX,
    "prefix-flat": PrefixTuningConfig(prefix_length=4, flat=True),
    "prefix-some": PrefixTuningConfig(prefix_length=4, bottleneck_size=6, leave_out=[0]),
    "mam": MAMConfig(PREFIX, ParBnConfig(reduction_factor=4)),
    "union": ConfigUnion(LoRAConfig(r=4, alpha=8), SeqBnConfig(reduction_factor=4), PREFIX),
    "unipelt": UniPELTConfig(
        PrefixTuningConfig(prefix_length=4, bottleneck_size=6, use_gating=True),
        SeqBnConfig(reduction_factor=4, use_gating=True),
        LoRAConfig(r=4, use_gating=True),
    ),
    "loreft": LoReftConfig(r=2),
}
"""Methods that are read and compared."""


def bert() -> Any:
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def bare() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def roberta() -> Any:
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, num_labels=3))


def distilbert() -> Any:
    config = transformers.DistilBertConfig(
        dim=32,
        n_heads=4,
        hidden_dim=48,
        n_layers=2,
        vocab_size=99,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return transformers.DistilBertForSequenceClassification(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart() -> Any:
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


MODELS = {
    "bert": bert,
    "bare": bare,
    "roberta": roberta,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "t5": t5,
    "bart": bart,
    "llama": llama,
}


def fresh(name: str) -> Any:
    """With weights that make attention listen: it is almost uniform in a model as it is initialised.

    Attention is eager: by scaled_dot_product_attention this library's decoders do not see their own prefixes.
    """
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
            elif name != "t5" and not any(word in path for word in ("embed", "shared", "wte", "wpe", "lm_head")):
                p.mul_(6)
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    found = {"input_ids": torch.randint(3, 99, (3, 6), generator=generator)}
    found["attention_mask"] = torch.ones(3, 6, dtype=torch.long)
    found["attention_mask"][0, 4:] = 0
    if name in {"t5", "bart"}:
        found["decoder_input_ids"] = torch.randint(3, 99, (3, 4), generator=generator)
    return found


def make(folder: Path) -> None:
    for name in MODELS:
        for method, config in METHODS.items():
            one = folder / f"{method}@{name}"
            try:
                _make(one, name, config)
            except Exception as error:  # the library's own limits differ from model to model
                one.mkdir(parents=True, exist_ok=True)
                (one / "refused.txt").write_text(f"{type(error).__name__}: {error}")


def _make(one: Path, name: str, config: Any) -> None:
    model = fresh(name)
    given = inputs(name)
    model.save_pretrained(one / "backbone")
    with torch.no_grad():
        before = model(**given)[0]
    adapters.init(model)
    model.add_adapter("it", config=config)
    model.set_active_adapters("it")
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if ".it." in path and (".loras." not in path or "lora_" in path or "vera" in path or "gate" in path):
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        output = model(**given)[0]
    model.save_adapter(str(one / "adapter"), "it", with_head=False)
    np.savez(
        one / "reference.npz",
        before=before.numpy(),
        output=output.numpy(),
        **{f"input__{key}": value.numpy() for key, value in given.items()},
    )


def load(folder: Path) -> None:
    found: dict[str, float | str] = {}
    for one in sorted(path for path in folder.iterdir() if (path / "export").is_dir()):
        name = one.name.partition("@")[2]
        try:
            model = fresh(name)
            adapters.init(model)
            model.load_adapter(str(one / "export"), load_as="it", set_active=True, use_safetensors=True)
            model.eval()
            reference = np.load(one / "reference.npz")
            with torch.no_grad():
                output = model(**inputs(name))[0].numpy()
            found[one.name] = float(np.abs(output - reference["output"]).max())
        except Exception as error:
            found[one.name] = f"{type(error).__name__}: {error}"
    (folder / "loaded.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
