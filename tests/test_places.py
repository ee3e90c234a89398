"""Parts of modules as hosts: rows of fused layers, parameters that a module uses by itself, stacks of experts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from deltahub.attaching import attach_parts
from deltahub.delta import Delta
from deltahub.errors import DeltaHubError
from deltahub.places import Rows, overlap
from deltahub.sites import Part
from tests.models import gpt2, ids
from tests.zoo import randomise

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def built(name: str, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM if name != "modernbert" else transformers.AutoModelForMaskedLM
    return made.from_config(transformers.AutoConfig.for_model(name, **config), attn_implementation="eager").eval()


FUSED: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "gpt_neox": lambda: built("gpt_neox", **SMALL, intermediate_size=24),
    "bloom": lambda: built("bloom", **SMALL),
    "mpt": lambda: built("mpt", vocab_size=99, d_model=16, n_heads=4, n_layers=2, expansion_ratio=2),
    "phi3": lambda: built("phi3", **SMALL, num_key_value_heads=2, intermediate_size=24, pad_token_id=0),
    "falcon": lambda: built("falcon", **SMALL, new_decoder_architecture=False, multi_query=False),
    "falcon, one key": lambda: built("falcon", **SMALL, new_decoder_architecture=False, multi_query=True),
    "falcon, groups": lambda: built("falcon", **SMALL, new_decoder_architecture=True, num_kv_heads=2),
    "bigcode": lambda: built("gpt_bigcode", n_embd=16, n_layer=2, n_head=4, vocab_size=99, multi_query=False),
    "bigcode, one key": lambda: built("gpt_bigcode", n_embd=16, n_layer=2, n_head=4, vocab_size=99, multi_query=True),
    "modernbert": lambda: built("modernbert", **SMALL, intermediate_size=24, pad_token_id=0, cls_token_id=1),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


@pytest.mark.parametrize("name", FUSED)
def test_roles_of_a_fused_layer_are_its_own_parts(name: str) -> None:
    """Where queries are nought, keys do not matter and values do; and the other way round."""
    for nought, idle in (("query", "key"), ("key", "query")):
        model = FUSED[name]()
        zero = deltahub.attach(model, "assign", f"role:attention.{nought}", name="zero")
        assert all(site.rows is not None for site in zero.sites)
        with torch.no_grad():
            for parameter in zero.parameters():
                parameter.zero_()
        before = logits(model)
        randomise(deltahub.attach(model, "diff", f"role:attention.{idle}", name="idle").parameters())
        assert torch.allclose(logits(model), before, atol=1e-6)
        randomise(deltahub.attach(model, "diff", "role:attention.value", name="value").parameters())
        assert not torch.allclose(logits(model), before, atol=1e-4)


def test_gates_and_diffusion_models_have_their_parts() -> None:
    import diffusers

    phi = FUSED["phi3"]()
    rows = [s.rows for s in deltahub.attach(phi, "lora", ["role:mlp.gate", "role:mlp.up"], rank=1).sites]
    assert rows == [Rows(start=0, stop=24, period=48)] * 2 + [Rows(start=24, stop=48, period=48)] * 2
    dit = diffusers.PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=8, sample_size=4, in_channels=4,
        caption_channels=8,
    )  # fmt: skip
    fused = copy.deepcopy(dit)
    for module in list(fused.modules()):
        if isinstance(module, diffusers.models.attention_processor.Attention):
            module.fuse_projections(fuse=True)
    with pytest.raises(DeltaHubError) as caught:
        deltahub.attach(fused, "lora", "attn1.to_q", rank=1)
    assert caught.value.code == "E_HOST_NOT_RUN"
    (site,) = deltahub.attach(fused, "lora", "role:attention.key", rank=1).sites
    assert (site.path, site.rows) == ("transformer_blocks.0.attn1.to_qkv", Rows(start=8, stop=16, period=24))
    (site,) = deltahub.attach(dit, "lora", "role:attention.key", rank=1).sites
    assert (site.path, site.rows) == ("transformer_blocks.0.attn1.to_k", None)


# ----------------------------------------------------------------------------------------------------------- the laws


class Fused(nn.Module):
    """A linear layer that is called, seen in part."""

    def __init__(self) -> None:
        super().__init__()
        self.host = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x)


class Attending(nn.Module):
    """``nn.MultiheadAttention`` as its callers call it: three times the same tensor, in evaluation on the fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.host = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x, x, x, need_weights=False)[0]


class Mixture(nn.Module):
    """A mixture of experts of transformers, all of which see some token."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import transformers
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        size = {"hidden_size": 8, "intermediate_size": 6, "num_local_experts": 3}
        if name == "mixtral":
            self.host = MixtralExperts(transformers.MixtralConfig(**size, experts_implementation="eager"))
        else:
            self.host = GptOssExperts(transformers.GptOssConfig(**size, experts_implementation="eager"))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        index = torch.arange(flat.shape[0])[:, None] % 3
        chosen = torch.cat([index, (index + 1) % 3], 1)
        return self.host(flat, chosen, torch.full(chosen.shape, 0.5, dtype=x.dtype)).reshape(x.shape)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    make = {"fused": Fused, "attention": Attending}.get(name)
    return (Mixture(name) if make is None else make()).eval()


PLACES: dict[str, tuple[str, str, tuple[int, int, int] | None, int]] = {
    "rows in one piece": ("fused", "host", (4, 8, 12), 0),
    "rows interleaved": ("fused", "host", (1, 2, 3), 0),
    "all projections": ("attention", "host.in_proj_weight", None, 0),
    "the values": ("attention", "host.in_proj_weight", (16, 24, 24), 0),
    "never called": ("attention", "host.out_proj", None, 0),
    "experts": ("mixtral", "host.down_proj", None, 3),
    "gates of experts": ("mixtral", "host.gate_up_proj", (0, 6, 12), 3),
    "transposed experts": ("gpt_oss", "host.down_proj", None, 3),
    "interleaved gates": ("gpt_oss", "host.gate_up_proj", (0, 1, 2), 3),
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "scale": 0.7},
    "dora": {"rank": 2},
    "assign": {},
    "hra": {"rank": 2},
    "loha": {"rank": 2},
    "bias": {"scale": 1.0},
    "adapter": {"bottleneck": 2},
}


def fits(place: str, kind: str) -> bool:
    host = PLACES[place][0]
    if kind == "adapter":
        return host == "fused"
    return not (kind == "bias" and host == "mixtral")


def attached(place: str, kind: str, *, trained: bool = True) -> tuple[nn.Module, Tensor, Delta]:
    host, path, rows, stack = PLACES[place]
    model = model_of(host)
    found = kinds.get(kind)
    part = Part(
        name="it", kind=found, config=found.check_config(KINDS[kind]), paths=[path], rows=Rows.of(rows), stack=stack
    )
    delta = attach_parts(model, "it", [part], generator=torch.Generator().manual_seed(3))
    if trained:
        randomise(delta.parameters())
    return model, torch.randn(2, 3, 6 if host == "fused" else 8), delta


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert (a - b).detach().abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


EVERY = pytest.mark.parametrize(("place", "kind"), [(p, k) for p in PLACES for k in KINDS if fits(p, k)])


@EVERY
def test_the_laws_hold_on_parts_of_modules(place: str, kind: str, tmp_path: Path) -> None:
    host = PLACES[place][0]
    bare, (model, x, delta) = model_of(host), attached(place, kind)
    site = delta.sites[0]
    fresh, _, one = attached(place, kind, trained=False)
    if one.sites[0].bound.kind.is_identity(one.sites[0].bound.config, one.sites[0].bound.shape):
        close(fresh(x), bare(x), 1e-6)
    live = model(x)
    assert not torch.allclose(live, bare(x), atol=1e-5)
    with torch.no_grad():
        close(model(x), live)  # on the fast path, if there is one
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert before.keys() == bare.state_dict().keys()
    live.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in delta.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "deltahub:" not in n)
    if site.bound.mergeable:
        delta.merge()
        close(model(x), live)
        with torch.no_grad():
            close(model(x), live)
        delta.unmerge()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    delta.save(tmp_path / "package")
    again = deltahub.load(tmp_path / "package", backbone=model_of(host))
    assert torch.equal(again(x), live)
    report = deltahub.verify(tmp_path / "package", backbone=model_of(host))
    assert report.effect > 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), live)
        randomise(deltahub.deltas(twin)["it"].parameters(), seed=9)
        assert not torch.equal(twin(x), live)
    delta.scale = 0.0
    close(model(x), bare(x))
    delta.detach()
    assert torch.equal(model(x), bare(x))
    assert type(model.host) is type(bare.host)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in bare.named_modules()]


@pytest.mark.parametrize("place", ["rows interleaved", "the values", "gates of experts"])
def test_merging_from_disk_to_disk_gives_the_bits_of_merging_in_memory(place: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from deltahub.converters import merge

    model, _, delta = attached(place, "lora")
    delta.save(tmp_path / "package")
    delta.merge()
    save_file(model_of(PLACES[place][0]).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "backbone").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "backbone" / "model.safetensors")
    (tmp_path / "backbone" / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    merge(
        tmp_path / "package", tmp_path / "out", backbone=tmp_path / "backbone",
        architecture_of=model_of(PLACES[place][0]),
    )  # fmt: skip
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("place", ["rows in one piece", "the values", "gates of experts"])
def test_parts_compile_and_export(place: str) -> None:
    model, x, _ = attached(place, "lora")
    if "experts" not in place:  # the forward of these experts asks which of them were hit
        torch._dynamo.reset()
        close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
        close(torch.export.export(model, (x,)).module()(x), model(x))
    else:
        close(torch.compile(model, backend="eager")(x), model(x))


def test_rows_of_a_batch_on_parts() -> None:
    model, x, _ = attached("rows interleaved", "lora")
    found = kinds.get("adapter")
    part = Part(
        name="b", kind=found, config=found.check_config(KINDS["adapter"]), paths=["host"], rows=Rows.of((0, 6, 12))
    )
    randomise(attach_parts(model, "b", [part]).parameters(), seed=5)
    with torch.no_grad():
        single = []
        for name in ("it", "b"):
            with deltahub.using(model, name):
                single.append(model(x))
        with deltahub.using(model, ["it", "b"]):
            for _ in range(3):
                mixed = model(x)
        close(mixed[0], single[0][0])
        close(mixed[1], single[1][1])
    model, _, _ = attached("all projections", "lora")
    with pytest.raises(DeltaHubError) as caught, deltahub.using(model, ["it", None]):
        pass
    assert caught.value.code == "E_INJECTION_ROWS"


def test_what_parts_cannot_take_is_refused_before_anything_changes() -> None:
    model = model_of("mixtral")
    for target, kind, config, code in (
        ("host.down_proj", "adapter", {"bottleneck": 2}, "E_KIND_HOST"),
        ("host.down_proj", "bias", {"scale": 1.0}, "E_HOST_NO_BIAS"),
        ("host.none", "lora", {"rank": 1}, "E_TARGET_NOTHING"),
    ):
        with pytest.raises(DeltaHubError) as caught:
            deltahub.attach(model, kind, target, **config)
        assert caught.value.code == code
    kind = kinds.get("lora")
    config = kind.check_config({"rank": 1})
    for paths, rows, stack, code in (
        (["host.down_proj"], None, 0, "E_HOST_STACK"),
        (["host.down_proj"], (0, 1, 5), 3, "E_HOST_ROWS"),
        (["host"], (0, 1, 2), 0, "E_KIND_HOST"),
    ):
        part = Part(name="it", kind=kind, config=config, paths=paths, rows=Rows.of(rows), stack=stack)
        with pytest.raises(DeltaHubError) as caught:
            attach_parts(model, "it", [part])
        assert caught.value.code in {code, "E_HOST_ROWS"}
    assert not deltahub.deltas(model)
    assert type(model.host) is type(model_of("mixtral").host)


def test_what_two_rows_have_in_common() -> None:
    assert overlap(None, Rows(start=0, stop=1, period=2))
    assert not overlap(Rows(start=0, stop=4, period=12), Rows(start=4, stop=8, period=12))
    assert overlap(Rows(start=0, stop=4, period=12), Rows(start=1, stop=2, period=3))
    assert not overlap(Rows(start=0, stop=1, period=2), Rows(start=1, stop=2, period=4))


@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_torchs_encoder_does_not_pass_a_delta_by(*, masked: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = masked
    given = {"src_key_padding_mask": mask} if masked else {}
    with torch.no_grad():
        bare = model(x, **given)
    delta = deltahub.attach(model, "lora", ["in_proj_weight", "self_attn.out_proj", "linear1"], rank=2)
    randomise(delta.parameters())
    slow = model(x, **given)
    with torch.no_grad():
        close(model(x, **given)[~mask], slow[~mask])
        assert not torch.allclose(slow[~mask], bare[~mask], atol=1e-3)
        delta.detach()
        assert torch.equal(model(x, **given), bare)
    assert model.use_nested_tensor
