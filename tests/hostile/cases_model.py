"""28 to 47: targets, numbers, and backbones."""

from __future__ import annotations

import copy
from typing import Any

import torch

import deltahub
from tests.hostile.corpus import ACCEPTED, Room, case, cases
from tests.models import ids, llama
from tests.test_loading import flip
from tests.test_package import rewrite
from tests.zoo import randomise

REGEXPS = (
    "(([a-z_0-9.])+)+!",
    "^model\\..*",
    "(\\w+\\.?)+X",
    "model.layers.*.self_attn.q_proj",
    ".*q_proj",
    "model.layers.[0-9].q",
    "a|b",
    "model.layers.{0..1}.(self_attn|mlp)",
    "q_proj$",
    "?",
    "**",
)


@cases(28, {f"pattern {p}": (p, "E_TARGET_REGEXP") for p in REGEXPS})
def _(room: Room, pattern: str) -> Any:
    room.module(targets=[pattern])
    return room.refuse()


EXPANSIONS = {
    "one range": "model.layers.{0..999999999}.q",
    "ranges of ranges": "{0..99}.{0..99}.{0..99}.{0..99}",
    "nine braces": ".".join(["{a,b,c,d,e,f,g,h,i,j}"] * 9),
    "many digits": "{0..99999999999999999999999999}.x",
}


@cases(29, {f"expansion, {name}": (p, "E_TARGET_EXPANSION") for name, p in EXPANSIONS.items()})
def _(room: Room, pattern: str) -> Any:
    room.module(targets=[pattern])
    return room.refuse()


@case(29, "many targets that expand", "E_TARGET_EXPANSION")
def _(room: Room) -> Any:
    room.module(targets=[f"a{i}.{{0..9999}}" for i in range(1000)])
    return room.refuse()


@cases(
    30,
    {
        "missing": ("model.layers.{0..1}.self_attn.nothing", "E_TARGET_MISSING"),
        "of another type": ("model.layers.{0..1}.self_attn", "E_KIND_HOST"),
        "the root": ("", "E_TARGET_SYNTAX"),
        "a list of modules": ("model.layers", "E_KIND_HOST"),
    },
)
def _(room: Room, target: str) -> Any:
    _renamed(room, target)
    return lambda: room.load(verify=None)


def _renamed(room: Room, target: str) -> None:
    """The package's tensors, consistently, under other targets."""
    from deltahub.targets import expand

    paths = expand(target) if target else [""]
    down, up = torch.ones(2, 32), torch.ones(32, 2)

    def change(held: dict[str, torch.Tensor]) -> None:
        held.clear()
        for path in paths:
            held.update({f"lora/{path}/down": down.clone(), f"lora/{path}/up": up.clone()})

    room.module(targets=[target])
    room.tensors(change)


@cases(
    30,
    {
        "twice": (["model.norm", "model.norm"], "E_TARGET_TWICE"),
        "twice by expansion": (["a.{0..3}", "a.{3..5}"], "E_TARGET_TWICE"),
        "twice in one": (["a.{b,b}"], "E_TARGET_TWICE"),
    },
)
def _(room: Room, targets: list[str]) -> Any:
    room.module(targets=targets)
    return room.refuse()


@case(30, "inside another delta", "E_TARGET_MISSING")
def _(room: Room) -> Any:
    deltahub.attach(room.model, "lora", "q_proj", rank=2, name="first")
    _renamed(room, "model.layers.0.self_attn.q_proj.deltahub:first:lora")
    return lambda: room.load(verify=None)


@case(30, "through an inner module of a model with a delta", "E_INJECTION_NESTED")
def _(room: Room) -> Any:
    deltahub.attach(room.model, "lora", "q_proj", rank=2, name="first")
    return lambda: deltahub.attach(room.model.model, "lora", "q_proj", rank=2, name="second")


@case(31, "a tied head, live", ACCEPTED)
def _(room: Room) -> Any:
    """A delta on the head leaves the embedding alone."""

    def act() -> None:
        model = llama(tied=True)
        before = model.model.embed_tokens.weight.clone()
        hidden = model.model(input_ids=ids()).last_hidden_state
        delta = deltahub.attach(model, "lora", "lm_head", rank=2)
        randomise(delta.parameters())
        assert torch.equal(model.model.embed_tokens.weight, before)
        assert torch.equal(model.model(input_ids=ids()).last_hidden_state, hidden)

    return act


@case(31, "a tied head, merged while loading", "E_INJECTION_TIED")
def _(room: Room) -> Any:
    room.model = llama(tied=True)
    delta = deltahub.attach(room.model, "lora", "lm_head", rank=2)
    randomise(delta.parameters())
    delta.save(room.folder / "tied")
    delta.detach()
    return lambda: room.load(source=room.folder / "tied", merge=True)


@cases(
    32,
    {
        "a buffer": ("model.rotary_emb.inv_freq", "E_TARGET_MISSING"),
        "a parameter": ("model.norm.weight", "E_TARGET_MISSING"),
        "an embedding": ("model.embed_tokens", "E_KIND_SHAPE"),
        "a rotary embedding": ("model.rotary_emb", "E_KIND_HOST"),
        "an activation": ("model.layers.0.mlp.act_fn", "E_KIND_HOST"),
    },
)
def _(room: Room, target: str) -> Any:
    def change(held: dict[str, torch.Tensor]) -> None:
        held.clear()
        held[f"lora/{target}/weight"] = torch.ones(32, 32)

    room.module(targets=[target], kind="diff", config={})
    room.tensors(change)
    return lambda: room.load(verify=None)


@cases(
    33,
    {
        "rank 0": (0, "E_KIND_CONFIG"),
        "rank -1": (-1, "E_KIND_CONFIG"),
        "rank 10^9": (10**9, "E_KIND_CONFIG"),
        "rank 2^31": (2**31, "E_KIND_CONFIG"),
        "rank 65536": (65536, "E_KIND_SHAPE"),
        "rank 2^52": (2**52, "E_KIND_CONFIG"),
    },
)
def _(room: Room, rank: int) -> Any:
    room.config(rank=rank)
    return room.refuse()


@cases(
    33,
    {
        f"authored rank {r}": (r, c)
        for r, c in {0: "E_KIND_CONFIG", -3: "E_KIND_CONFIG", 2**60: "E_KIND_CONFIG"}.items()
    },
)
def _(room: Room, rank: int) -> Any:
    return lambda: deltahub.attach(room.model, "lora", "q_proj", rank=rank)


@cases(
    34,
    {
        "1e308": (1e308, "E_KIND_CONFIG"),
        "-1e308": (-1e308, "E_KIND_CONFIG"),
        "1e39, no float32": (1e39, "E_KIND_CONFIG"),
    },
)
def _(room: Room, scale: float) -> Any:
    room.config(scale=scale)
    return room.refuse()


@cases(34, {f"scale {n}": (n, "E_MANIFEST_NUMBER") for n in ("NaN", "Infinity", "1e309")})
def _(room: Room, number: str) -> Any:
    (room.package / "delta.json").write_text(room.text().replace('"scale": 2.0', f'"scale": {number}'))
    return room.refuse()


@case(34, "scale 0 does nothing", "E_PACKAGE_NO_EFFECT")
def _(room: Room) -> Any:
    room.config(scale=0.0)
    return room.refuse()[1]


@cases(34, {f"authored scale {n}": (float(n), "E_KIND_CONFIG") for n in ("nan", "inf", "1e308")})
def _(room: Room, scale: float) -> Any:
    return lambda: deltahub.attach(room.model, "lora", "q_proj", rank=2, scale=scale)


@cases(34, {f"user's scale {n}": (float(n), "E_USAGE_SCALE") for n in ("nan", "inf", "-inf")})
def _(room: Room, scale: float) -> Any:
    delta = deltahub.attach(room.model, "lora", "q_proj", rank=2)
    return lambda: setattr(delta, "scale", scale)


SHAPES: dict[str, tuple[object, str]] = {
    "a column": (("up", (32, 1)), "E_KIND_SHAPE"),
    "a row": (("down", (1, 32)), "E_KIND_SHAPE"),
    "a vector": (("up", (2,)), "E_KIND_SHAPE"),
    "a number": (("down", ()), "E_PACKAGE_TENSORS"),
    "one axis more": (("up", (1, 32, 2)), "E_KIND_SHAPE"),
    "of one": (("down", (1, 1)), "E_KIND_SHAPE"),
    "empty": (("down", (2, 0)), "E_KIND_SHAPE"),
}


@cases(35, {f"factor that broadcasts, {name}": given for name, given in SHAPES.items()})
def _(room: Room, change: tuple[str, tuple[int, ...]]) -> Any:
    name, shape = change
    path = f"lora/model.layers.0.self_attn.q_proj/{name}"
    room.tensors(lambda held: held.update({path: torch.ones(shape)}))
    return room.refuse()


@cases(36, {f"weights, {n}": (float(n), "E_PACKAGE_VALUES") for n in ("nan", "inf", "-inf")})
def _(room: Room, value: float) -> Any:
    room.tensors(lambda held: held[max(held)].view(-1).__setitem__(-1, value))
    return room.refuse()


@case(36, "probe that is not finite", "E_PACKAGE_PROBE_DIFFERS")
def _(room: Room) -> Any:
    from deltahub.tensors import TensorFile, write

    model = copy.deepcopy(room.model)
    delta = deltahub.attach(model, "lora", "q_proj", rank=2)
    randomise(delta.parameters())
    package = room.folder / "probed"
    delta.save(package, probe={"input_ids": ids()})
    with TensorFile.read(package / "probe.safetensors") as file:
        held = {n: file.torch(n).clone() for n in file}
    for name, value in held.items():
        if value.is_floating_point():
            held[name] = torch.full_like(value, float("nan"))
    write(package / "probe.safetensors", held)
    rewrite(package)
    return lambda: deltahub.verify(package, backbone=room.model)


@case(37, "overflow of float16 on merge", "E_INJECTION_NONFINITE")
def _(room: Room) -> Any:
    room.model = copy.deepcopy(room.model).half()
    room.tensors(lambda held: [t.fill_(300.0) for t in held.values()])
    return lambda: room.load(merge=True, verify=None)


@case(37, "overflow of float16 in a checkpoint", "E_MERGE_NONFINITE")
def _(room: Room) -> Any:
    from transformers import LlamaForCausalLM

    from deltahub.converters.merge import merge

    half = room.folder / "half"
    LlamaForCausalLM.from_pretrained(room.backbone, dtype=torch.float16).save_pretrained(half)
    delta = deltahub.attach(LlamaForCausalLM.from_pretrained(half), "lora", "q_proj", rank=2)
    for parameter in delta.parameters():
        torch.nn.init.constant_(parameter, 300.0)
    delta.save(room.folder / "large")
    return lambda: merge(room.folder / "large", room.cache / "merged", backbone=half)


@case(38, "layer beyond the depth", "E_TARGET_MISSING")
def _(room: Room) -> Any:
    _renamed(room, "model.layers.{0..9}.self_attn.q_proj")
    return lambda: room.load(verify=None)


@case(38, "layer beyond the depth, checked", "E_BACKBONE_MISMATCH")
def _(room: Room) -> Any:
    _renamed(room, "model.layers.{0..9}.self_attn.q_proj")
    leaf = "0" * 64
    room.edit(
        lambda d: d["backbone"].update(leaves={f"model.layers.{i}.self_attn.q_proj.weight": leaf for i in range(10)})
    )
    return room.refuse()


@case(39, "int8 factors without a scale", "E_PACKAGE_TENSORS")
def _(room: Room) -> Any:
    room.tensors(lambda held: held.update({n: t.to(torch.int8) for n, t in held.items()}))
    return room.refuse()


@case(40, "another commit of the same name", "E_BACKBONE_MISMATCH")
def _(room: Room) -> Any:
    hub = room.hub()
    other = room.folder / "other"
    llama(seed=1).save_pretrained(other)
    hub.create("org/llama", room.contents(other))
    room.edit(lambda d: d["backbone"].update(source={
        "hub": "org/llama", "commit": "0" * 40, "class": "transformers.LlamaForCausalLM",
    }))  # fmt: skip
    hub_options = {"endpoint": hub.url, "token": hub.token}
    return lambda: room.load(backbone="org/llama@main", **hub_options)


@case(40, "commit that is gone", "E_BACKBONE_NOT_FOUND")
def _(room: Room) -> Any:
    hub = room.hub()
    hub.create("org/llama", room.contents(room.backbone))
    room.edit(lambda d: d["backbone"].update(source={
        "hub": "org/llama", "commit": "0" * 40, "class": "transformers.LlamaForCausalLM",
    }))  # fmt: skip
    return lambda: room.load(backbone=None, endpoint=hub.url, token=hub.token)


@case(41, "one bit of a touched tensor, on disk", "E_BACKBONE_MISMATCH")
def _(room: Room) -> Any:
    flip(room.backbone, "model.layers.1.mlp.down_proj.weight")
    return [
        lambda: room.load(backbone=room.backbone),
        lambda: deltahub.verify(room.package, backbone=room.backbone),
    ]


@case(41, "one bit of another tensor, on disk", "E_BACKBONE_MISMATCH")
def _(room: Room) -> Any:
    flip(room.backbone, "model.embed_tokens.weight")
    return [
        lambda: room.load(backbone=room.backbone, verify="full"),
        lambda: deltahub.verify(room.package, backbone=room.backbone, level="full"),
    ]


@case(41, "one bit of a touched tensor, in memory", "E_BACKBONE_MISMATCH")
def _(room: Room) -> Any:
    weight = room.model.get_submodule("model.layers.1.mlp.down_proj").weight
    weight.detach().view(torch.int32).view(-1)[-1] ^= 1
    return room.refuse()


@case(42, "right names, wrong shapes", "E_BACKBONE_MISMATCH")
def _(room: Room) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=99,
    )  # fmt: skip
    room.model = LlamaForCausalLM(config).eval()
    room.model.save_pretrained(room.folder / "wide")
    return [*room.refuse(), lambda: room.load(backbone=room.folder / "wide")]


@case(42, "right names, wrong shapes, unchecked", "E_KIND_SHAPE")
def _(room: Room) -> Any:
    room.model.get_submodule("model.layers.1.mlp").down_proj = torch.nn.Linear(50, 32, bias=False)
    return lambda: room.load(verify=None)


@case(43, "a quantised copy on disk", "E_BACKBONE_QUANTISED")
def _(room: Room) -> Any:
    from safetensors.torch import load_file, save_file

    path = room.backbone / "model.safetensors"
    held = load_file(path)
    for name in list(held):
        if held[name].ndim == 2:
            scale = held[name].abs().amax() / 127
            held[name] = (held[name] / scale).round().to(torch.int8)
            held[f"{name}_scale"] = scale.reshape(1)
    save_file(held, path, metadata={"format": "pt"})
    return lambda: room.load(backbone=room.backbone)


@case(43, "a quantised copy that says so", "E_BACKBONE_QUANTISED")
def _(room: Room) -> Any:
    from safetensors.torch import load_file, save_file

    path = room.backbone / "model.safetensors"
    held = load_file(path)
    for name in [n for n in held if n.endswith("proj.weight")]:
        stem = name.removesuffix(".weight")
        del held[name]
        held |= {f"{stem}.qweight": torch.zeros(4, 32, dtype=torch.int32), f"{stem}.scales": torch.ones(1, 32)}
    save_file(held, path, metadata={"format": "pt"})
    return lambda: room.load(backbone=room.backbone)


@case(44, "float32 for bfloat16", ACCEPTED)
def _(room: Room) -> Any:
    from transformers import LlamaForCausalLM

    half = room.folder / "half"
    LlamaForCausalLM.from_pretrained(room.backbone, dtype=torch.bfloat16).save_pretrained(half)

    def act() -> None:
        model = deltahub.load(room.package, backbone=half)
        (delta,) = deltahub.deltas(model).values()
        assert delta.report.identity.root == "bf16"
        assert any("BF16" in note for note in delta.report.identity.notes)

    return act


@cases(
    45,
    {
        "a tied alias that differs": (True, "E_BACKBONE_TIED"),
        "an alias that nobody declared": (False, "E_BACKBONE_MISMATCH"),
    },
)
def _(room: Room, declared: bool) -> Any:
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    tied, package = room.folder / "tied", room.folder / "head"
    llama(tied=True).save_pretrained(tied)
    model = LlamaForCausalLM.from_pretrained(tied).eval()
    delta = deltahub.attach(model, "lora", "lm_head", rank=2)
    randomise(delta.parameters())
    delta.save(package)
    if declared:
        tie = {"lm_head.weight": "model.embed_tokens.weight"}
        rewrite(package, lambda d: d["backbone"]["identity"].update(tied=tie))
    held = load_file(tied / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    save_file(held, tied / "model.safetensors", metadata={"format": "pt"})
    return [lambda: room.load(source=package, backbone=tied), lambda: deltahub.verify(package, backbone=tied)]


DIGESTS: dict[str, tuple[object, str]] = {
    "short": ("a" * 63, "E_MANIFEST_FIELD"),
    "long": ("a" * 65, "E_MANIFEST_FIELD"),
    "upper case": ("A" * 64, "E_MANIFEST_FIELD"),
    "no hex": ("g" * 64, "E_MANIFEST_FIELD"),
    "with a newline": ("a" * 64 + "\n", "E_MANIFEST_FIELD"),
    "other digits": ("\u0661" * 64, "E_MANIFEST_FIELD"),
    "with a prefix": ("sha256:" + "a" * 57, "E_MANIFEST_FIELD"),
}


@cases(46, {f"root, {name}": given for name, given in DIGESTS.items()})
def _(room: Room, digest: str) -> Any:
    room.edit(lambda d: d["backbone"]["identity"].update(exact=digest))
    return room.refuse()


@cases(46, {f"algorithm {name}": (name, "E_MANIFEST_FIELD") for name in ("md5", "SHA256-TREE-1", "sha256-tree-2", "")})
def _(room: Room, name: str) -> Any:
    room.edit(lambda d: d["backbone"]["identity"].update(algorithm=name))
    return room.refuse()


@case(46, "digest of a file in upper case", "E_MANIFEST_FIELD")
def _(room: Room) -> Any:
    room.edit(lambda d: d["files"][0].update(sha256=d["files"][0]["sha256"].upper()))
    return room.refuse()


PLACES = (
    "/etc", "./backbone", "../backbone", "~/backbone", "https://evil.example/org/base", "file:///etc",
    "org/../base", "org/base/more", "C:\\base", "org/base@main", "hf://org/base", "org\u202e/base", "",
)  # fmt: skip


@cases(47, {f"backbone at {place!a}": (place, "E_MANIFEST_FIELD") for place in PLACES})
def _(room: Room, place: str) -> Any:
    room.edit(lambda d: d["backbone"].update(source={
        "hub": place, "commit": "0" * 40, "class": "transformers.LlamaForCausalLM",
    }))  # fmt: skip
    return [lambda: room.load(backbone=None), *room.refuse()]


@cases(47, {f"a local folder called {name}": (name, "E_BACKBONE_OFFLINE") for name in ("org/base", "base")})
def _(room: Room, name: str) -> Any:
    """A folder of this name in the working directory is not the repository of this name."""
    import os

    room.edit(lambda d: d["backbone"].update(source={
        "hub": name, "commit": "0" * 40, "class": "transformers.LlamaForCausalLM",
    }))  # fmt: skip
    (room.folder / "org").mkdir()
    room.backbone.rename(room.folder / name)
    os.chdir(room.folder)
    return lambda: room.load(backbone=None, local_files_only=True)
