"""Several threads and processes at once: requests of a server on one model, a cold cache, models apart."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import deltahub
from deltahub.testing import LoopbackHub
from tests.zoo import randomise

NAMES = ("a", "b", "c")


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()


@pytest.fixture
def model() -> nn.Module:
    made = build()
    for name in NAMES:
        delta = deltahub.attach(made, "lora", ["0", "2"], name=name, rank=2)
        randomise(delta.parameters(), seed=ord(name))
    return made


def expected(model: nn.Module, x: torch.Tensor) -> dict[tuple[str, ...], torch.Tensor]:
    found = {}
    for names in [(), *((n,) for n in NAMES), ("a", "c")]:
        with deltahub.using(model, *names):
            found[names] = model(x).detach()
    return found


def in_thread(call: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(60)


def test_every_thread_of_a_server_has_its_own_deltas(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    wanted = expected(model, x)
    base = model(x)
    start = threading.Barrier(8)

    def serve(i: int) -> None:
        start.wait(60)
        sets = list(wanted)
        for n in range(150):
            names = sets[(i + n) % len(sets)]
            with torch.no_grad(), deltahub.using(model, *names):
                assert torch.equal(model(x), wanted[names])
                with deltahub.using(model, "b"):
                    assert torch.equal(model(x), wanted["b",])
                assert torch.equal(model(x), wanted[names])

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(serve, i) for i in range(8)]:
            done.result(60)
    assert torch.equal(model(x), base)


@pytest.mark.slow
def test_a_compiled_model_follows_each_thread(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    wanted = expected(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), deltahub.using(model, "a"):
        assert torch.equal(compiled(x), wanted["a",])

        def other() -> None:
            with torch.no_grad(), deltahub.using(model, "b"):
                assert torch.equal(compiled(x), wanted["b",])

        in_thread(other)
        assert torch.equal(compiled(x), wanted["a",])
    with torch.no_grad(), deltahub.using(model):
        exported = torch.export.export(model, (x,)).module()
        assert torch.equal(exported(x), wanted[()])


def test_a_thread_without_a_block_follows_the_only_one(model: nn.Module) -> None:
    """As the workers do that compute checkpointed layers again, on behalf of the one who is in the block."""
    x = torch.randn(3, 8)
    wanted = expected(model, x)
    base = model(x)
    with deltahub.using(model, "a"):
        assert torch.equal(in_thread(lambda: model(x)), wanted["a",])
        entered, go = threading.Event(), threading.Event()

        def second() -> None:
            with deltahub.using(model, "b"):
                entered.set()
                go.wait(60)

        worker = threading.Thread(target=second)
        worker.start()
        entered.wait(60)
        assert torch.equal(in_thread(lambda: model(x)), base)  # whose block should it be?
        assert torch.equal(model(x), wanted["a",])
        go.set()
        worker.join(60)
    assert torch.equal(in_thread(lambda: model(x)), base)


def test_what_changes_inside_a_block_ends_with_it(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    wanted = expected(model, x)
    deltas = deltahub.deltas(model)
    base = model(x)
    with deltahub.using(model, "a"):
        deltas["c"].enable()
        assert torch.equal(model(x), wanted["a", "c"])
        deltas["a"].disable()
        assert not deltas["a"].active
    assert torch.equal(model(x), base)
    assert all(d.active for d in deltas.values())


def test_a_copy_has_blocks_of_its_own(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    wanted = expected(model, x)
    base = model(x)
    with deltahub.using(model, "a"):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), base)
            with deltahub.using(other, "b"):
                assert torch.equal(other(x), wanted["b",])
                assert torch.equal(model(x), wanted["a",])


def test_threads_attach_and_detach_on_models_of_their_own() -> None:
    def work(i: int) -> None:
        model = build(i)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for n in range(15):
            delta = deltahub.attach(model, ("lora", "adapter", "bias")[(i + n) % 3], "0", **OPTIONS[(i + n) % 3])
            model(torch.randn(2, 8))
            delta.detach()
        assert type(model[0]) is nn.Linear
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


OPTIONS: tuple[dict[str, int], ...] = ({"rank": 2}, {"bottleneck": 2}, {})

_PULL = """
import os, sys
from deltahub.hub import pull
from deltahub.package import Package
go, started = os.pipe()
children = []
for _ in range(16):
    child = os.fork()
    if not child:
        os.close(started)
        os.read(go, 1)  # ends when the parent closes the other end, for all at once
        found = pull("acme/delta", cache_dir=sys.argv[1])
        with Package.open(found.path, root=found.root) as package:
            package.verify()
        os.write(1, (found.commit + "\\n").encode())
        os._exit(0)
    children.append(child)
os.close(started)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
def test_sixteen_processes_and_a_cold_cache(hub: LoopbackHub, cache: Path, make_package: Callable[..., Path]) -> None:
    folder = make_package(shards=2, size=256)
    commit = hub.create("acme/delta", {p.name: p.read_bytes() for p in folder.iterdir()}).branches["main"]
    done = subprocess.run(
        [sys.executable, "-c", _PULL, str(cache)],
        env={**os.environ, **hub.environment(), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (done.returncode, done.stdout.split()) == (0, [commit] * 16), done.stderr[-3000:]
    assert not [p for p in cache.rglob("*") if p.name.endswith((".incomplete", ".part"))]
