"""Several deltas on one backbone: switched, scaled, and a different one for each row of a batch."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deltahub

torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes)).eval()
for name in ("english", "french"):
    delta = deltahub.attach(model, "lora", ["q_proj", "v_proj"], name=name, rank=4)
    for parameter in delta.parameters():  # stands for training
        torch.nn.init.normal_(parameter, std=0.1)
    delta.disable()

tokens = torch.randint(1, 500, (3, 6))
with torch.no_grad():
    bare = model(input_ids=tokens).logits
    with deltahub.using(model, "english"):
        english = model(input_ids=tokens).logits
    with deltahub.using(model, ["english", "french", None]):  # one entry for each row
        mixed = model(input_ids=tokens).logits

assert torch.allclose(mixed[0], english[0], atol=1e-5)
assert torch.allclose(mixed[2], bare[2], atol=1e-5)

english_delta = deltahub.deltas(model)["english"].enable()
english_delta.scale = 0.5  # half its effect
english_delta.merge()  # into the weights …
english_delta.unmerge()  # … and back, bit for bit
english_delta.disable()
with torch.no_grad():
    assert torch.equal(model(input_ids=tokens).logits, bare)
print(deltahub.deltas(model))
