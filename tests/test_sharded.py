"""A model whose weights two processes share (tensor parallel): live, gradients, merge and package as on one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import deltahub

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}

WORKER = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from deltahub.hosts import whole
from tests.test_sharded import KINDS, attached, data, model_of

rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
found = {}
for kind in KINDS:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(model_of(), mesh, plan)
    before = [whole(p.detach()) for p in model.parameters()]
    delta = attached(model, kind)
    y = model(data())
    y.square().sum().backward()
    found[kind] = {"y": y.detach() + 0, "grads": [whole(p.grad) for p in delta.parameters()]}
    if all(site.bound.mergeable for site in delta.sites):
        delta.merge()
        found[kind]["merged"] = model(data()).detach() + 0
        delta.unmerge()
        after = [whole(p.detach()) for n, p in model.named_parameters() if "deltahub:" not in n]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    delta.save(f"{out}/{kind}")
if rank == 0:
    torch.save(found, f"{out}/found.pt")
dist.barrier()
dist.destroy_process_group()
"""

KINDS = {
    "lora": {"rank": 2},
    "adapter": {"bottleneck": 3},
    "dora": {"rank": 2},
    "oft": {"block": 4},
    "ia3": {},
    "bias": {"scale": 1.0},
    "assign": {},
}


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6))


def data() -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def attached(model: nn.Module, kind: str) -> deltahub.Delta:
    delta = deltahub.attach(model, kind, ["0", "2"], name="it", seed=1, **KINDS[kind])
    generator = torch.Generator().manual_seed(4)
    for parameter in delta.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return delta


def test_two_processes_with_tensor_parallel_weights(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-c", WORKER]
    running = [
        subprocess.Popen([*arguments, str(rank), str(port), str(tmp_path)], cwd=ROOT, env=ENVIRONMENT,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        output = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(output)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for kind in KINDS:
        model = model_of()
        delta = attached(model, kind)
        y = model(data())
        y.square().sum().backward()
        assert torch.allclose(found[kind]["y"], y, atol=1e-5), kind
        for ours, theirs in zip(delta.parameters(), found[kind]["grads"], strict=True):
            assert torch.allclose(theirs, ours.grad, atol=1e-4), kind
        if "merged" in found[kind]:
            assert torch.allclose(found[kind]["merged"], y, atol=1e-5), kind
        again = deltahub.load(tmp_path / kind, backbone=model_of())
        assert torch.equal(again(data()), y), kind
