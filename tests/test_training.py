"""Training with transformers.Trainer and accelerate as they are."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import deltahub
from deltahub.errors import InjectionError
from deltahub.training import DeltaCallback, delta_state, load_delta_state
from tests.models import bert_classifier, ids

pytestmark = pytest.mark.filterwarnings("ignore")


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = ids(16)[i]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 3}


def model() -> nn.Module:
    made = bert_classifier()
    deltahub.attach(made, "lora", rank=2, seed=1)
    deltahub.attach(made, "assign", "classifier", name="head", seed=2)
    return made


def trainer(made: nn.Module, folder: Path, steps: int) -> Any:
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, logging_steps=100, use_cpu=True, seed=3, lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(made, args, train_dataset=Data(), callbacks=[DeltaCallback()])


def test_the_trainer_trains_the_delta_alone_and_resumes(tmp_path: Path) -> None:
    made = model()
    before = {n: t.clone() for n, t in made.state_dict().items()}
    fresh = {n: t.clone() for n, t in delta_state(made).items()}
    whole = trainer(made, tmp_path / "a", 4)
    whole.train()
    own = {id(p) for d in deltahub.deltas(made).values() for p in d.parameters()}
    assert {id(p) for group in whole.optimizer.param_groups for p in group["params"]} == own
    assert all(torch.equal(t, before[n]) for n, t in made.state_dict().items())
    assert all(not torch.equal(t, fresh[n]) for n, t in delta_state(made).items())
    with safe_open(tmp_path / "a" / "checkpoint-2" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(fresh)
    assert "save_pretrained" not in made.__dict__  # the model is what it was
    again = model()
    resumed = trainer(again, tmp_path / "a", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, tensor in delta_state(again).items():
        assert torch.allclose(tensor, delta_state(made)[name], atol=1e-6), name


def test_a_checkpoint_of_another_delta_is_refused() -> None:
    made = model()
    state = {n: t + 1 for n, t in delta_state(made).items()}
    load_delta_state(made, state)
    assert all(torch.equal(t, state[n]) for n, t in delta_state(made).items())
    for wrong in (dict(list(state.items())[1:]), {**state, next(iter(state)): torch.zeros(1)}):
        with pytest.raises(InjectionError) as caught:
            load_delta_state(made, wrong)
        assert caught.value.code == "E_INJECTION_STATE"
    with pytest.raises(InjectionError) as caught:
        trainer(bert_classifier(), Path("unused"), 1)
    assert caught.value.code == "E_INJECTION_NONE"


def test_accelerate_needs_nothing_of_ours() -> None:
    from accelerate import Accelerator

    made = model()
    before = copy.deepcopy(made.state_dict())
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(Data(), batch_size=4)
    prepared, optimizer, loader = accelerator.prepare(made, optimizer, loader)
    losses = []
    for _ in range(3):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    assert min(losses[-4:]) < max(losses[:4])
    unwrapped = accelerator.unwrap_model(prepared)
    assert all(torch.equal(t, before[n]) for n, t in unwrapped.state_dict().items())


WORKER = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import deltahub
from deltahub.training import delta_state
from tests.models import bert_classifier, ids

rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = bert_classifier()
deltahub.attach(model, "lora", rank=2, seed=1)
deltahub.attach(model, "adapter", bottleneck=3, seed=2)
for layer in model.bert.encoder.layer:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
for step in range(3):
    batch = ids(4, seed=step)[2 * rank : 2 * rank + 2]
    model(input_ids=batch, labels=batch[:, 0] % 3).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
state = {n: t.full_tensor() for n, t in delta_state(model).items()}
deltahub.save(model, out + "-package")  # by all of them; the first one writes
if rank == 0:
    torch.save(state, out)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_with_sharded_parameters(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", WORKER]
    running = [
        subprocess.Popen([*arguments, str(rank), str(port), str(tmp_path / "state.pt")], cwd=ROOT, env=ENVIRONMENT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-2000:]
    sharded = torch.load(tmp_path / "state.pt", weights_only=True)
    alone = bert_classifier()
    deltahub.attach(alone, "lora", rank=2, seed=1)
    deltahub.attach(alone, "adapter", bottleneck=3, seed=2)
    optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        batch = ids(4, seed=step)
        alone(input_ids=batch, labels=batch[:, 0] % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in delta_state(alone).items():
        assert torch.allclose(sharded[name], tensor, atol=1e-5), name
    loaded = deltahub.load(tmp_path / "state.pt-package", backbone=bert_classifier())
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=batch).logits, alone(input_ids=batch).logits, atol=1e-5)
