"""A method of your own: a document of equations, which travels in the package as data."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import deltahub

KIND = {
    "kind": "com.example.gate",
    "version": 1,
    "title": "A gate for each output, by a low-rank map",
    "hosts": ["linear"],
    "identity": True,
    "config": {"rank": {"type": "integer", "minimum": 1}},
    "tensors": {
        "down": {"shape": ["rank", "in"], "init": "kaiming_uniform"},
        "up": {"shape": ["out", "rank"], "init": "zeros"},
    },
    "equations": {"output": "y * (1 + tanh(linear(linear(x, down), up)))"},
}

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
x = torch.randn(5, 16)
before = model(x)
delta = deltahub.attach(model, KIND, "type:Linear", rank=2)
assert torch.equal(model(x), before)  # `identity`: a fresh one changes nothing

for parameter in delta.parameters():  # stands for training
    nn.init.normal_(parameter, std=0.3)
folder = Path(tempfile.mkdtemp()) / "delta"
delta.save(folder)
expected = model(x)
delta.detach()
again = deltahub.load(folder, backbone=model)  # reads the kind from the package; no code is run
assert torch.allclose(again(x), expected)
print(deltahub.inspect(again))
