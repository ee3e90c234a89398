"""The height and width of a token map reach the blocks that need them, whatever happens around the call."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import contexts
from deltahub.errors import HostError, InjectionError
from tests.diffusion import dit, flux, inputs_of, pixart, sample, sd3, unet
from tests.zoo import randomise

KIND = {
    "kind": "org.example.blur",
    "version": 1,
    "hosts": ["block"],
    "identity": False,
    "context": ["grid"],
    "tensors": {
        "mix": {"shape": ["out", "in"], "init": "xavier_uniform"},
        "dw": {"shape": ["in", 1, 3, 3], "init": "normal(0.3)"},
    },
    "equations": {
        "replace": (
            "m = permute(reshape(x, (size(x, 0), grid[0], grid[1], d_in)), (0, 3, 1, 2))\n"
            "c = conv2d(m, dw, padding=1, groups=d_in)\n"
            "linear(transpose(flatten(c, 2), 1, 2), mix)"
        )
    },
}  # fmt: skip
MAKERS = {"unet": unet, "pixart": pixart, "dit": dit}
EVERY = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in MAKERS.items()])


def replaced(model: nn.Module, **options: Any) -> deltahub.Delta:
    return deltahub.attach(model, KIND, "role:attention", name="it", seed=3, **options)


class Spy:
    """What a model hears when its blocks are told the grid."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[int, tuple[int, int]]] = []
        for site_host in (m for m in model.modules() if hasattr(m, "_deltahub")):
            site_host.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.seen.append((args[0].shape[1], kwargs[contexts.CARRIED]["grid"]))


@EVERY
def test_every_block_hears_the_grid_of_its_own_map(make: Any) -> None:
    model = make()
    replaced(model)
    spy = Spy(model)
    sample(model, inputs_of(model, 16, 24 if make is not dit else 16))
    wide = 24 if make is not dit else 16
    expected = {(16, wide), (8, wide // 2)} if make is unet else {(8, wide // 2)}
    assert {grid for _, grid in spy.seen} == expected
    assert all(n == h * w for n, (h, w) in spy.seen)


def test_odd_sizes() -> None:
    for make, size in ((unet, (15, 23)), (pixart, (14, 22))):
        model = make()
        replaced(model)
        assert sample(model, inputs_of(model, *size)).shape[-2:] == size


@EVERY
def test_detaching_leaves_every_bit_class_and_hook_as_it_was(make: Any) -> None:
    model, bare = make(), make()
    inputs = inputs_of(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    delta = replaced(model)
    randomise(delta.parameters())
    assert not torch.equal(sample(model, inputs), sample(bare, inputs))
    with deltahub.using(model):
        assert torch.equal(sample(model, inputs), sample(bare, inputs))
    delta.detach()
    assert torch.equal(sample(model, inputs), sample(bare, inputs))
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for mine, theirs in zip(model.modules(), bare.modules(), strict=True):
        assert type(mine) is type(theirs)
        assert set(mine.__dict__) == set(theirs.__dict__)
        assert not mine._forward_pre_hooks
        assert not mine._forward_pre_hooks_with_kwargs


def test_two_deltas_share_the_one_who_knows() -> None:
    model = unet()
    one = deltahub.attach(model, KIND, "down_blocks.**.attn1", name="one", seed=1)
    two = deltahub.attach(model, KIND, "up_blocks.**.attn1", name="two", seed=2)
    inputs = inputs_of(model)
    both = sample(model, inputs)
    with deltahub.using(model, "two"):
        expected = sample(model, inputs)
    one.detach()
    assert torch.equal(sample(model, inputs), expected)
    assert not torch.equal(expected, both)
    two.detach()
    assert not any(m._forward_pre_hooks for m in model.modules())


@EVERY
def test_copies_and_pickles_are_whole_and_independent(make: Any) -> None:
    model = make()
    replaced(model)
    inputs = inputs_of(model)
    expected = sample(model, inputs)
    twins = [copy.deepcopy(model)] + ([pickle.loads(pickle.dumps(model))] if make is not unet else [])
    for twin in twins:
        assert torch.equal(sample(twin, inputs), expected)
        deltahub.deltas(twin)["it"].detach()
        assert torch.equal(sample(twin, inputs), sample(make(), inputs))
        assert torch.equal(sample(model, inputs), expected)


@EVERY
def test_gradient_checkpointing_recomputes_on_the_right_grid(make: Any) -> None:
    """Between forward and backward, a map of another shape but as many tokens passes through the same model."""
    model = make()
    delta = replaced(model)
    randomise(delta.parameters())
    model.train()
    first, other = ((8, 32), (32, 8)) if make is not dit else ((16, 16), (16, 16))

    def gradients(*, checkpointing: bool) -> list[Tensor]:
        model.enable_gradient_checkpointing() if checkpointing else model.disable_gradient_checkpointing()
        torch.manual_seed(0)  # DiT drops class labels at random
        for p in delta.parameters():
            p.grad = None
        one = model(**inputs_of(model, *first)).sample
        two = model(**inputs_of(model, *other, seed=5)).sample
        (one.square().sum() + two.square().sum()).backward()
        return [p.grad.clone() for p in delta.parameters()]

    for plain, recomputed in zip(gradients(checkpointing=False), gradients(checkpointing=True), strict=True):
        assert torch.equal(plain, recomputed)


def test_several_sizes_in_flight() -> None:
    model = pixart()
    replaced(model)
    sizes = [(16, 16), (8, 32), (32, 8), (4, 64)]
    batches = [inputs_of(model, *size, seed=i) for i, size in enumerate(sizes)]
    expected = [sample(model, batch) for batch in batches]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(sizes))}

    def work(i: int) -> None:
        for _ in range(4):
            found[i].append(sample(model, batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, expected[i]) for i, many in found.items() for one in many)


def test_compiles_without_a_graph_break_for_all_sizes() -> None:
    model = pixart(layers=1)
    replaced(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=None)
    for size in ((16, 16), (16, 24), (8, 24)):
        inputs = inputs_of(model, *size)
        with torch.no_grad():
            assert torch.allclose(compiled(**inputs).sample, sample(model, inputs), atol=1e-5)


def test_exports_with_sizes_that_stay_open() -> None:
    model = unet()
    replaced(model)
    h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
    dynamic = {"sample": {2: 2 * h, 3: 2 * w}, "timestep": None, "encoder_hidden_states": None}
    program = torch.export.export(model, (), inputs_of(model, 16, 24), dynamic_shapes=dynamic, strict=False)
    for size in ((16, 24), (24, 16), (10, 30)):
        inputs = inputs_of(model, *size)
        assert torch.allclose(program.module()(**inputs).sample, sample(model, inputs), atol=1e-5)


def test_attention_calls_of_diffusers_keep_working() -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model, bare = unet(), unet()
    delta = replaced(model)
    inputs = inputs_of(model)
    expected = sample(model, inputs)
    assert model.attn_processors.keys() == bare.attn_processors.keys()
    model.set_attn_processor(dict.fromkeys(model.attn_processors, AttnProcessor()))
    assert torch.allclose(sample(model, inputs), expected, atol=1e-5)
    model.set_attention_slice(2)
    assert torch.allclose(sample(model, inputs), expected, atol=1e-5)
    model.set_default_attn_processor()
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(sample(model, inputs), expected)
    model.fuse_qkv_projections()
    assert torch.allclose(sample(model, inputs), expected, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(sample(model, inputs), expected)
    delta.detach()
    assert torch.equal(sample(model, inputs), sample(bare, inputs))


def test_no_warning_reaches_the_attentions_that_were_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    model = unet()
    replaced(model)
    logger = logging.getLogger("diffusers")
    logger.propagate, before = True, logger.propagate
    try:
        sample(model, inputs_of(model))
    finally:
        logger.propagate = before
    assert not caplog.records


@pytest.mark.parametrize(("make", "says"), [(sd3, "image and text"), (flux, "text and image")])
def test_joint_attention_is_refused_with_the_reason(make: Any, says: str) -> None:
    model = make()
    before = [type(m) for m in model.modules()]
    with pytest.raises(HostError, match=says) as caught:
        deltahub.attach(model, KIND, "transformer_blocks.0.attn")
    assert caught.value.code == "E_HOST_REPLACE"
    assert [type(m) for m in model.modules()] == before
    assert not deltahub.deltas(model)


def test_cross_attention_and_strange_surroundings_are_refused() -> None:
    model = unet()
    with pytest.raises(HostError) as caught:
        deltahub.attach(model, KIND, "**.attn2")
    assert caught.value.code == "E_HOST_REPLACE"
    alone = nn.ModuleDict({"inner": model.mid_block.attentions[0].transformer_blocks[0]})
    with pytest.raises(HostError, match="no module around it") as caught:
        deltahub.attach(alone, KIND, "inner.attn1")
    assert caught.value.code == "E_HOST_CONTEXT"
    with pytest.raises(HostError) as caught:
        deltahub.attach(nn.Sequential(nn.Linear(4, 4)), {**KIND, "hosts": ["linear"]}, "0")
    assert caught.value.code == "E_HOST_CONTEXT"
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_a_replacement_would_ignore_is_refused() -> None:
    model = unet()
    replaced(model)
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn1
    x, grid = torch.randn(1, 16, 64), {contexts.CARRIED: {"grid": (4, 4)}}
    assert attn(x, None, None, **grid).shape == x.shape
    for kwargs in ({"attention_mask": torch.zeros(1, 16)}, {"encoder_hidden_states": x}):
        with pytest.raises(HostError) as caught:
            attn(x, **kwargs, **grid)
        assert caught.value.code == "E_HOST_ARGUMENT"
    with pytest.raises(HostError) as caught:
        attn(torch.randn(1, 64, 4, 4), **grid)
    assert caught.value.code == "E_HOST_ARGUMENT"
    with pytest.raises(HostError, match="called by itself") as caught:
        attn(x)
    assert caught.value.code == "E_HOST_CONTEXT"


def test_a_replacement_says_what_it_removes_and_a_lora_on_that_is_refused_beforehand() -> None:
    model = unet()
    delta = deltahub.attach(model, KIND, "mid_block.**.attn1", name="it", seed=3)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    inner = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    assert set(delta.parts[0].removes) == {f"{path}.{name}" for name in inner}
    inputs = inputs_of(model)
    expected = sample(model, inputs)
    for target in (f"{path}.to_q", f"{path}.to_out.0"):
        with pytest.raises(InjectionError) as caught:
            deltahub.attach(model, "lora", target, rank=2)
        assert caught.value.code == "E_INJECTION_CONFLICT"
    assert torch.equal(sample(model, inputs), expected)
    around = deltahub.attach(model, "adapter", [path, "mid_block.attentions.0.transformer_blocks.0"], bottleneck=2)
    randomise(around.parameters())
    assert not torch.equal(sample(model, inputs), expected)
    elsewhere = deltahub.attach(model, "lora", "mid_block.**.attn2.to_q", name="elsewhere", rank=2)
    elsewhere.detach()
    around.detach()
    delta.disable()
    deltahub.attach(model, "lora", f"{path}.to_q", rank=2)
    with pytest.raises(InjectionError) as caught:
        delta.enable()
    assert caught.value.code == "E_INJECTION_CONFLICT"


def test_a_package_keeps_it_all(tmp_path: Any) -> None:
    model = unet()
    delta = replaced(model)
    randomise(delta.parameters())
    inputs = inputs_of(model, 12, 20)
    package = delta.save(tmp_path / "package", probe=inputs)
    assert package.manifest.modules[0].removes == tuple(delta.parts[0].removes)
    assert set(package.manifest.backbone.leaves or ()) >= set(delta.parts[0].removes)
    again = deltahub.load(tmp_path / "package", backbone=unet())
    assert torch.equal(sample(again, inputs), sample(model, inputs))
    other = unet()
    with torch.no_grad():
        other.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.add_(1)
    with pytest.raises(deltahub.DeltaHubError) as caught:
        deltahub.load(tmp_path / "package", backbone=other)
    assert caught.value.code == "E_BACKBONE_MISMATCH"


def test_an_authors_own_model_can_be_registered() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(tokens)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, image: Tensor, extra: dict[str, Any] | None = None) -> Tensor:
            return self.inner(image.flatten(2).mT, **(extra or {}))

    library = Outer.__module__.partition(".")[0]
    contexts.register(
        contexts.Provider(name=f"{library}.Outer", argument="image", carrier="extra", blocks=(f"{library}.Inner",))
    )
    model = Outer()
    image = torch.randn(2, 8, 3, 5)
    bare = model(image)
    delta = deltahub.attach(model, KIND, "inner", seed=1)
    assert model(image).shape == (2, 15, 8)
    assert torch.equal(model(image, None), model(image, {}))
    delta.detach()
    assert torch.equal(model(image), bare)
