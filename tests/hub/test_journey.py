"""What a user does with a Hub, from beginning to end: in Python, in new processes, and on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import deltahub
from deltahub.cli import app
from deltahub.hub import Lock, lock_of, pull, push, search
from deltahub.testing import LoopbackHub

ROOT = Path(__file__).resolve().parents[2]

FRESH = """
import json, sys, torch, deltahub
model = deltahub.load(sys.argv[1])
x = torch.arange(1, 8).reshape(1, 7)
with torch.no_grad():
    y = model(input_ids=x).logits
assert torch.equal(y, torch.tensor(json.loads(sys.argv[2]))), (y, sys.argv[2])
"""


def process(hub: LoopbackHub, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {**hub.environment(), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, *command]
    return subprocess.run(run, cwd=home.parent, env=env, capture_output=True, text=True, check=False, timeout=300)


def cli(hub: LoopbackHub, *command: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*command, "--endpoint", hub.url, "--token", hub.token, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def backbone(hub: LoopbackHub, tmp_path: Path) -> Path:
    """A small real classifier, on the Hub as ``org/base`` and in a folder."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(**sizes, vocab_size=99, max_position_embeddings=64, num_labels=3)
    folder = tmp_path / "base"
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    hub.create("org/base", {path.name: path.read_bytes() for path in folder.iterdir()})
    return folder


def train(hub: LoopbackHub, cache: Path, *, seed: int) -> tuple[Any, torch.Tensor]:
    """Attach, train for two steps, and give the model and its logits."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    local = Path(download(hub, cache))
    model = BertForSequenceClassification.from_pretrained(local).eval()
    delta = deltahub.attach(model, "lora", ["query", "value"], rank=2, scale=2.0, seed=seed)
    x = torch.arange(1, 8).reshape(1, 7)
    optimiser = torch.optim.SGD(delta.parameters(), lr=1.0)
    for _ in range(2):
        optimiser.zero_grad()
        model(input_ids=x, labels=torch.tensor([seed % 3])).loss.backward()
        optimiser.step()
    with torch.no_grad():
        return model, model(input_ids=x).logits


def download(hub: LoopbackHub, cache: Path) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download("org/base", endpoint=hub.url, token=hub.token, cache_dir=cache)


@pytest.mark.slow
def test_on_the_command_line_alone(hub: LoopbackHub, backbone: Path, tmp_path: Path, cache: Path) -> None:
    """The same as a user would type it; only the training is Python."""
    for seed, name in ((1, "v1"), (2, "v2")):
        deltahub.save(train(hub, cache, seed=seed)[0], tmp_path / name, probe={"input_ids": torch.arange(1, 8)[None]})
    first = cli(hub, "push", str(tmp_path / "v1"), "user/delta", "-m", "first")["commit"]
    (hit,) = cli(hub, "search", "--backbone", str(backbone), "--kind", "lora")
    assert (hit["repo_id"], hit["match"], hit["commit"]) == ("user/delta", "exact", first)

    # A new process fetches it, checks it, loads it on the backbone, and replays its author's forward pass.
    home, base = tmp_path / "home", str(backbone)
    done = process(hub, home, "-m", "deltahub.cli", "verify", "user/delta", "--backbone", base, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["probe"]["logits"] < 1e-5

    assert cli(hub, "push", str(tmp_path / "v2"), "user/delta", "--create-pr")["pr"] == "refs/pr/1"
    held = ("--cache-dir", str(cache))
    assert cli(hub, "pull", "user/delta@refs/pr/1", *held)["commit"] != first
    assert cli(hub, "pull", f"user/delta@{first}", *held)["commit"] == first
    hub.log.clear()
    loaded = cli(hub, "verify", f"user/delta@{first}", "--backbone", base, "--offline", *held)
    assert loaded["load"]["commit"] == first
    assert hub.log == []

    name = "delta.safetensors"
    data = bytearray(hub.read("user/delta", name))
    data[-1] ^= 1
    hub.commit("user/delta", {name: bytes(data)})
    refused = cli(hub, "verify", "user/delta", "--backbone", base, *held, code=1)
    assert refused["error"]["code"] == "E_HUB_DIGEST"


@pytest.mark.slow
def test_the_journey(
    hub: LoopbackHub, backbone: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = {"endpoint": hub.url, "token": hub.token}
    home = tmp_path / "home"
    one, first = train(hub, cache, seed=1)
    deltahub.save(one, tmp_path / "v1")
    published = push(tmp_path / "v1", "user/delta", private=True, **where)

    # Somebody finds it by the backbone, from the command line and from Python, and loads it in a new process.
    for asked in ("org/base", str(backbone)):
        found = cli(hub, "search", "--backbone", asked)
        assert [hit["repo_id"] for hit in found] == ["user/delta"]
    assert [hit.match for hit in search(backbone=backbone, **where)] == ["exact"]
    done = process(hub, home, "-c", FRESH, "user/delta", json.dumps(first.tolist()))
    assert done.returncode == 0, done.stderr[-3000:]

    # Version 2 comes as a pull request; a commit stays what it was.
    two, second = train(hub, cache, seed=2)
    deltahub.save(two, tmp_path / "v2")
    proposal = cli(hub, "push", str(tmp_path / "v2"), "user/delta", "--create-pr", "-m", "version 2")
    assert proposal["pr"] == "refs/pr/1"
    x = torch.arange(1, 8).reshape(1, 7)

    def logits(source: str, **more: Any) -> torch.Tensor:
        model = deltahub.load(source, cache_dir=cache, **where, **more)
        with torch.no_grad():
            return model(input_ids=x).logits

    assert torch.equal(logits("user/delta@refs/pr/1"), second)
    assert torch.equal(logits(f"user/delta@{published.commit}"), first)

    # The lock file, then offline: nothing is asked of anybody.
    lock_of(pull("user/delta", cache_dir=cache, **where)).write(tmp_path / "deltahub.lock")
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits("user/delta", lock=Lock.read(tmp_path / "deltahub.lock")), first)
    assert torch.equal(logits(f"user/delta@{published.commit}"), first)
    asked = f"user/delta@{published.commit}"
    assert cli(hub, "pull", asked, "--cache-dir", str(cache))["commit"] == published.commit
    monkeypatch.undo()
    assert hub.log == []

    # Somebody tampers with the tensors on the server: refused, whoever asks.
    name = "delta.safetensors"
    data = bytearray(hub.read("user/delta", name))
    data[-1] ^= 1
    hub.commit("user/delta", {name: bytes(data)})
    with pytest.raises(deltahub.DeltaHubError, match="E_HUB_DIGEST"):
        logits("user/delta")
    refused = cli(hub, "pull", "user/delta", "--cache-dir", str(cache), code=1)
    assert refused["error"]["code"] == "E_HUB_DIGEST"
