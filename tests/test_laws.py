"""The laws that every kind obeys on every host that it fits; generated from the registry, so a new kind is covered."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deltahub
from deltahub import kinds
from deltahub.delta import Delta
from deltahub.hosts import BLOCK, view_of
from tests.zoo import CASES, Case, model_of, randomise

EVERY = pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in CASES])
# Tracing costs half a second, and a config changes constants only: one config of each kind. How a host is reached does
# not depend on the kind either: a few kinds go on every host, the others on one host of each family.
EVERYWHERE = {"adapter", "assign", "bias", "dora", "lora"}
FIRST = pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.id)
        for c in {(c.kind, c.host.name if c.kind in EVERYWHERE else c.family): c for c in reversed(CASES)}.values()
    ],
)


def attached(case: Case, *, trained: bool = True) -> tuple[nn.Module, Tensor, Delta]:
    model, x = model_of(case.host)
    delta = deltahub.attach(model, case.kind, "host", name="it", seed=3, **dict(case.config))
    if trained:
        randomise(delta.parameters())
    return model, x, delta


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(b.detach().abs().max()))
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance * scale, f"differs by {difference:.3g} where values reach {scale:.3g}"


@EVERY
def test_a_fresh_delta_is_the_identity_where_its_document_says_so(case: Case) -> None:
    model, x, _ = attached(case, trained=False)
    bare, _ = model_of(case.host)
    site = model.host._deltahub.sites[0]
    if site.bound.kind.is_identity(site.bound.config, site.bound.shape):
        close(model(x), bare(x), 1e-6)


@EVERY
def test_a_trained_delta_changes_the_output(case: Case) -> None:
    model, x, _ = attached(case)
    bare, _ = model_of(case.host)
    assert not torch.equal(model(x), bare(x))


@EVERY
def test_live_equals_merged_and_unmerging_restores_every_bit(case: Case) -> None:
    model, x, delta = attached(case)
    live = model(x)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    if not all(site.bound.mergeable for site in delta.sites):
        with pytest.raises(deltahub.DeltaHubError) as caught:
            delta.merge()
        assert caught.value.code == "E_INJECTION_NOT_MERGEABLE"
        return
    site, view = delta.sites[0], model.host._deltahub.view
    if "bias" in site.bound.ports and not view.takes_bias(model.host):
        with pytest.raises(deltahub.DeltaHubError) as caught:  # a module whose forward knows no bias
            delta.merge()
        assert caught.value.code == "E_HOST_NO_BIAS"
        assert torch.equal(model(x), live)
        return
    delta.merge()
    close(model(x), live)
    delta.unmerge()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(x), live)


@EVERY
def test_torch_equals_the_numpy_interpreter(case: Case) -> None:
    from deltahub.kinds import reference

    model, x, delta = attached(case)
    site = delta.sites[0]
    module = model.host
    view = view_of(module, type(module).__mro__[1])
    base = type(module).__mro__[1]
    tensors = {n: t.detach().numpy() for n, t in zip(site.names, site.tensors(), strict=True)}

    def run(port: str, **values: Tensor | None) -> np.ndarray:
        arrays = {k: None if v is None else v.detach().numpy() for k, v in values.items()}
        document = kinds.get(case.kind).document
        return reference.run(document, site.bound.config, port, host, tensors, **arrays)

    host = reference.Host(
        shape=site.bound.shape,
        apply=lambda a, w: (
            view.partial(module, base, torch.from_numpy(a), torch.from_numpy(np.ascontiguousarray(w))).detach().numpy()
        ),
        context={"grid": case.host.grid},
    )
    with deltahub.using(model):
        out = module(case.host.inner(x))
    y = out[0] if isinstance(out, tuple) else out
    ports = site.bound.ports
    if "replace" in ports and not ports["replace"].uses & {"base", "W", "b"}:
        close(model(x), torch.from_numpy(run("replace", x=case.host.inner(x))))
    if "output" in ports and site.bound.live:
        own = {} if view is BLOCK else {"W": view.weight(module), "b": view.bias(module)}
        close(model(x), torch.from_numpy(run("output", x=case.host.inner(x), y=y, **own)))
    if {"weight", "bias"} & set(ports):
        weight, bias = view.weight(module), view.bias(module)
        own = weight.new_zeros(weight.shape[0]) if bias is None else bias
        new_weight, new_bias = module._deltahub.transformed(module, [site])
        if "weight" in ports:
            close(new_weight, torch.from_numpy(run("weight", W=weight, b=own)))
        if "bias" in ports:
            assert new_bias is not None
            close(new_bias, torch.from_numpy(run("bias", W=weight, b=own)))


@EVERY
def test_save_then_load_gives_the_same_bits(case: Case, tmp_path: Path) -> None:
    model, x, delta = attached(case)
    expected = model(x)
    delta.save(tmp_path / "package")
    again, _ = model_of(case.host)
    again = deltahub.load(tmp_path / "package", backbone=again)
    assert torch.equal(again(x), expected)
    loaded = deltahub.deltas(again).popitem()[1] if isinstance(deltahub.deltas(again), dict) else None
    assert loaded is not None
    fold = delta.parts[0].kind.document.fold
    if fold and {**delta.parts[0].config, **fold} != delta.parts[0].config:
        return  # a reparametrised kind is stored as what it stands for
    assert {n: t.dtype for n, t in loaded.tensors().items()} == {n: t.dtype for n, t in delta.tensors().items()}
    assert all(torch.equal(t, delta.tensors()[n]) for n, t in loaded.tensors().items())


@EVERY
def test_detaching_leaves_the_model_as_it_was(case: Case) -> None:
    bare, x = model_of(case.host)
    model, _ = model_of(case.host)
    model.host.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    attributes = set(model.host.__dict__), set(model.__dict__)
    delta = deltahub.attach(model, case.kind, "host", seed=3, **dict(case.config))
    randomise(delta.parameters())
    model(x)
    delta.detach()
    assert type(model.host) is type(bare.host)
    assert (set(model.host.__dict__), set(model.__dict__)) == attributes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [n for n, _ in model.named_modules()] == [n for n, _ in bare.named_modules()]
    assert torch.equal(model(x), bare(x))


@EVERY
def test_a_copy_is_independent_and_a_pickle_is_whole(case: Case) -> None:
    model, x, delta = attached(case)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        randomise(deltahub.deltas(twin)["it"].parameters(), seed=9)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
        deltahub.deltas(twin)["it"].disable()
        assert delta.active


@EVERY
def test_the_backbones_own_keys_stay(case: Case) -> None:
    model, _, _ = attached(case)
    bare, _ = model_of(case.host)
    assert list(model.state_dict()) == list(bare.state_dict())
    model.load_state_dict(bare.state_dict())


@EVERY
def test_gradients_reach_every_trainable_tensor_through_checkpointing(case: Case) -> None:
    model, x, delta = attached(case)
    model.train()
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in delta.parameters()]
    assert all(p.grad is None for n, p in model.named_parameters() if "deltahub:" not in n)
    for p in delta.parameters():
        p.grad = None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for p, g in zip(delta.parameters(), plain, strict=True):
        close(p.grad, g)


@EVERY
def test_bfloat16(case: Case) -> None:
    model, x, delta = attached(case)
    wide = model(x)
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in delta.parameters())
    half = model(x.to(torch.bfloat16) if x.is_floating_point() else x)
    assert half.dtype == torch.bfloat16
    close(half.float(), wide, 6e-2)


@EVERY
def test_float32_deltas_work_on_a_bfloat16_backbone(case: Case) -> None:
    model, x = model_of(case.host)
    model.to(torch.bfloat16)
    delta = deltahub.attach(model, case.kind, "host", seed=3, dtype=torch.float32, **dict(case.config))
    randomise(delta.parameters())
    y = model(x.to(torch.bfloat16) if x.is_floating_point() else x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in delta.parameters())


@FIRST
def test_compiles_without_a_graph_break(case: Case) -> None:
    model, x, _ = attached(case)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(x), model(x))


@FIRST
def test_exports(case: Case) -> None:
    model, x, _ = attached(case)
    program = torch.export.export(model, (x,))
    close(program.module()(x), model(x))


@EVERY
def test_scale_is_continuous_and_zero_is_off(case: Case) -> None:
    model, x, delta = attached(case)
    bare, _ = model_of(case.host)
    full = model(x)
    delta.scale = 0.0
    close(model(x), bare(x))
    delta.scale = 1.0
    assert torch.equal(model(x), full)
