"""Deploy a delta as a plain checkpoint: merged from disk to disk, whatever the size."""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltahub

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes)).save_pretrained(folder / "backbone")
model = LlamaForCausalLM.from_pretrained(folder / "backbone").eval()
delta = deltahub.attach(model, "lora", ["q_proj", "v_proj"], rank=4)
for parameter in delta.parameters():  # stands for training
    torch.nn.init.normal_(parameter, std=0.1)
delta.save(folder / "delta")

report = deltahub.converters.merge(folder / "delta", folder / "merged", backbone=folder / "backbone")
plain = LlamaForCausalLM.from_pretrained(folder / "merged").eval()  # needs no deltahub any more

tokens = torch.randint(1, 500, (2, 6))
with torch.no_grad():
    assert torch.allclose(plain(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-4)
print(report)
