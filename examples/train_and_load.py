"""Train a delta, save it as a package, and load it onto its backbone again."""

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import deltahub

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500)
BertForSequenceClassification(config).save_pretrained(folder / "backbone")  # stands for a model of the Hub

model = BertForSequenceClassification.from_pretrained(folder / "backbone")
deltahub.attach(model, "lora", ["query", "value"], rank=4, scale=2.0)
deltahub.attach(model, "assign", "classifier", name="head")

trained = [p for p in model.parameters() if p.requires_grad]  # the deltas', and nothing else
optimizer = torch.optim.AdamW(trained, lr=1e-2)
tokens, labels = torch.randint(1, 500, (16, 8)), torch.randint(0, 2, (16,))
for _ in range(10):
    loss = model(input_ids=tokens, labels=labels).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
deltahub.save(model, folder / "delta", probe={"input_ids": tokens[:2]})
loaded = deltahub.load(folder / "delta", backbone=folder / "backbone")
with torch.no_grad():
    assert torch.allclose(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-6)
print(deltahub.deltas(loaded)["delta"].report)
print(deltahub.verify(folder / "delta", backbone=folder / "backbone"))
