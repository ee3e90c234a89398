"""Bring a PEFT adapter over, and give it back."""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

import deltahub

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
BertModel(BertConfig(vocab_size=500, **sizes)).save_pretrained(folder / "backbone")
model = BertModel.from_pretrained(folder / "backbone")
adapter = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query"], init_lora_weights=False)).eval()
adapter.save_pretrained(folder / "adapter")

deltahub.converters.import_(folder / "adapter", folder / "delta", backbone=folder / "backbone")
loaded = deltahub.load(folder / "delta", backbone=folder / "backbone")
tokens = torch.randint(1, 500, (2, 6))
with torch.no_grad():
    expected = adapter(input_ids=tokens).last_hidden_state
    assert torch.allclose(loaded(input_ids=tokens).last_hidden_state, expected, atol=1e-5)

deltahub.converters.export_(folder / "delta", folder / "again", to="peft")
print(sorted(path.name for path in (folder / "again").iterdir()))
print(deltahub.inspect(folder / "delta"))
