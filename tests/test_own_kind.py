"""A kind that nobody has seen before travels inside a package, as data, and runs in a process that never knew it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import deltahub

ROOT = Path(__file__).resolve().parents[1]

DOCUMENT = {
    "kind": "org.example.gated-depthwise",
    "version": 1,
    "title": "Gated depthwise convolution beside a convolution's own",
    "hosts": ["conv"],
    "identity": True,
    "config": {"size": {"type": "integer", "minimum": 1, "maximum": 15}},
    "tensors": {
        "filters": {"shape": ["out", "size", "size"], "init": "normal(0.1)"},
        "gate": {"shape": ["out"], "init": "zeros"},
    },
    "equations": {
        "output": (
            "k = rearrange(filters, 'c h w -> c 1 h w')\n"
            "h = conv2d(y, k, padding=size // 2, groups=d_out)\n"
            "y + channel(tanh(gate)) * h"
        )
    },
}

WEIGHTED = {
    "kind": "org.example.row-mix",
    "version": 1,
    "title": "Every row of the weight is mixed with the others",
    "hosts": ["linear"],
    "identity": True,
    "config": {"strength": {"type": "number", "default": 1.0}},
    "tensors": {"mix": {"shape": ["out", "out"], "init": "zeros"}},
    "equations": {
        "weight": "W + strength * mix @ W",
        "bias": {"when": {"bias": True}, "expr": "b + strength * mix @ b"},
    },
}

FRESH = """
import sys, torch, deltahub
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 5))
before = set(sys.modules)
model = deltahub.load(sys.argv[1], backbone=model)
delta, = deltahub.deltas(model).values()
assert delta.report.kinds == ("org.example.gated-depthwise@1", "org.example.row-mix@1"), delta.report.kinds
x = torch.load(sys.argv[2])
y = torch.load(sys.argv[3])
assert torch.equal(model(x), y)
assert not [name for name in set(sys.modules) - before if "example" in name]
program = torch.export.export(model, (x,))
assert torch.allclose(program.module()(x), y, atol=1e-6)
optimiser = torch.optim.SGD(delta.parameters(), lr=0.1)
losses = []
for _ in range(5):
    loss = model(x).square().mean()
    optimiser.zero_grad(); loss.backward(); optimiser.step(); losses.append(loss.item())
assert losses[-1] < losses[0], losses
try:
    delta.merge()
except deltahub.DeltaHubError as error:
    assert error.code == "E_INJECTION_NOT_MERGEABLE" and "org.example.gated-depthwise" in str(error)
else:
    raise AssertionError("a kind without a merged form was merged")
print("done")
"""


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_an_invented_kind_is_published_loaded_trained_and_exported(tmp_path: Path) -> None:
    model = backbone()
    deltahub.attach(model, DOCUMENT, "0", size=3, name="conv")
    deltahub.attach(model, WEIGHTED, "2", name="mix")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for delta in deltahub.deltas(model).values():
            for p in delta.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    x = torch.randn(2, 3, 6, 6, generator=generator)
    y = model(x)
    assert not torch.equal(y, backbone()(x))
    package = deltahub.save(model, tmp_path / "package")
    assert [k["kind"] for k in package.manifest.kinds] == ["org.example.gated-depthwise", "org.example.row-mix"]
    assert not [p for p in (tmp_path / "package").iterdir() if p.suffix not in {".json", ".safetensors"}]
    torch.save(x, tmp_path / "x")
    torch.save(y.detach(), tmp_path / "y")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "package", tmp_path / "x", tmp_path / "y"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
    assert "brings its own kinds" in done.stderr


def test_a_part_with_a_weight_equation_merges(tmp_path: Path) -> None:
    model = backbone()
    delta = deltahub.attach(model, WEIGHTED, "2")
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    x = torch.randn(2, 3, 6, 6)
    live = model(x)
    delta.merge(permanently=True)
    assert type(model[2]) is nn.Linear
    assert torch.allclose(model(x), live, atol=1e-5)


def test_a_package_cannot_redefine_a_built_in_kind(tmp_path: Path) -> None:
    model = backbone()
    deltahub.attach(model, WEIGHTED, "2")
    deltahub.save(model, tmp_path / "package")
    path = tmp_path / "package" / "delta.json"
    manifest = json.loads(path.read_text())
    manifest["kinds"][0]["kind"] = "lora"
    path.write_text(json.dumps(manifest))
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.load(tmp_path / "package", backbone=backbone())
    assert caught.value.code == "E_KIND_NAME"
