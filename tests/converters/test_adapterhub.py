"""AdapterHub's methods beyond the plain ones: each computed by hand from the tensors that the library would store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltahub
from deltahub.converters import import_
from deltahub.errors import DeltaHubError
from tests.models import bert_classifier, gpt2, ids

pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURES = Path(__file__).parents[1] / "fixtures"
BOTTLENECK = {
    "mh_adapter": False, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu",
    "original_ln_before": True, "original_ln_after": True, "residual_before_ln": True, "scaling": 1.0,
}  # fmt: skip


def written(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], **more: Any) -> Path:
    folder.mkdir()
    document = {"config": dict(config), "model_type": "bert", "name": "it", "version": "adapters.1.3.0", **more}
    (folder / "adapter_config.json").write_text(json.dumps(document), encoding="utf-8")
    torch.save(dict(tensors), folder / "pytorch_adapter.bin")
    return folder


def random(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {prefix + name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def imported(folder: Path, make: Callable[[], nn.Module], tmp_path: Path) -> nn.Module:
    import_(folder, tmp_path / "package", backbone=make(), allow_pickle=True)
    return deltahub.load(tmp_path / "package", backbone=make())


def hidden(model: nn.Module, path: str) -> Tensor:
    """What a module gives in one forward pass."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y))
    with torch.no_grad():
        model(input_ids=ids())
    handle.remove()
    return seen[0]


DENSE = {
    "adapter_down.0.weight": (8, 32),
    "adapter_down.0.bias": (8,),
    "adapter_up.weight": (32, 8),
    "adapter_up.bias": (32,),
}
NORMED = {key.replace("down.0", "down.1"): shape for key, shape in DENSE.items()}
NORMED |= {f"adapter_norm_before.{n}": (32,) for n in ("weight", "bias")}
NORMED |= {f"adapter_down.0.{n}": (32,) for n in ("weight", "bias")}
AFTER = {f"adapter_norm_after.{n}": (32,) for n in ("weight", "bias")}
GATE = {"gate.weight": (1, 32), "gate.bias": (1,)}
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "pfeiffer": ({}, DENSE),
    "learned": ({"scaling": "learned"}, {**DENSE, "scaling": (1,)}),
    "channel": ({"scaling": "channel"}, {**DENSE, "scaling": (32,)}),
    "norm-before": ({"ln_before": True}, NORMED),
    "norm-after": ({"ln_after": True}, {**DENSE, **AFTER}),
    "gated": ({"use_gating": True}, {**DENSE, **GATE}),
    "plus": ({"original_ln_after": False, "residual_before_ln": False}, DENSE),
    "houlsby": ({"original_ln_before": False}, DENSE),
    "houlsby-norm": (
        {"original_ln_before": False, "ln_after": True, "adapter_residual_before_ln": True},
        {**DENSE, **AFTER},
    ),
}


def by_hand(t: Mapping[str, Tensor], config: Mapping[str, Any], norm: nn.Module, h: Tensor, residual: Tensor) -> Tensor:
    """The library's own order of steps: ``Adapter.pre_forward``, ``forward`` and ``post_forward``."""
    z, kept = h, h
    if config["original_ln_before"]:
        z = norm(h + residual)
        kept = h if config["residual_before_ln"] else z
    n = z
    if config.get("ln_before"):
        n = F.layer_norm(z, (32,), t["adapter_norm_before.weight"], t["adapter_norm_before.bias"])
    first = "adapter_down.1" if config.get("ln_before") else "adapter_down.0"
    up = F.linear(
        F.relu(F.linear(n, t[f"{first}.weight"], t[f"{first}.bias"])), t["adapter_up.weight"], t["adapter_up.bias"]
    )
    up = up * (t["scaling"] if "scaling" in t else config["scaling"])
    if config.get("use_gating"):
        up = up * torch.sigmoid(F.linear(z, t["gate.weight"], t["gate.bias"])).mean(1, keepdim=True)
    if config.get("adapter_residual_before_ln"):
        up = up + kept
    if config.get("ln_after"):
        up = F.layer_norm(up, (32,), t["adapter_norm_after.weight"], t["adapter_norm_after.bias"])
    if not config.get("adapter_residual_before_ln"):
        up = up + kept
    return norm(up + residual) if config["original_ln_after"] else up


@pytest.mark.parametrize("name", CASES)
def test_a_bottleneck_of_every_form(name: str, tmp_path: Path) -> None:
    change, shapes = CASES[name]
    config, part = {**BOTTLENECK, **change}, random(shapes)
    prefix = "bert.encoder.layer.0.output.adapters.it."
    folder = written(tmp_path / "a", config, {prefix + key: value for key, value in part.items()})
    model, bare = imported(folder, bert_classifier, tmp_path), bert_classifier()
    layer = bare.bert.encoder.layer[0]
    h = hidden(bare, "bert.encoder.layer.0.output.dense")
    residual = hidden(bare, "bert.encoder.layer.0.attention.output.LayerNorm")
    with torch.no_grad():
        want = by_hand(part, config, layer.output.LayerNorm, h, residual)
    assert torch.allclose(hidden(model, "bert.encoder.layer.0.output"), want, atol=1e-5)
    assert not torch.allclose(hidden(bare, "bert.encoder.layer.0.output"), want, atol=1e-2)


HYPER = {"phm_rule": (4, 4, 4)}
LAYER = {
    "adapter_down.0.W_left": (4, 8, 1), "adapter_down.0.W_right": (4, 1, 2), "adapter_down.0.b": (8,),
    "adapter_up.W_left": (4, 2, 1), "adapter_up.W_right": (4, 1, 8), "adapter_up.b": (32,),
}  # fmt: skip


@pytest.mark.parametrize("before", [True, False])
def test_hypercomplex_layers_share_their_rule(before: bool, tmp_path: Path) -> None:
    config = {**BOTTLENECK, "phm_layer": True, "original_ln_before": before}
    part, shared = random(LAYER), random(HYPER)
    tensors = {f"bert.encoder.layer.1.output.adapters.it.{key}": value for key, value in part.items()}
    tensors |= {f"bert.shared_parameters.it.{key}": value for key, value in shared.items()}
    model, bare = imported(written(tmp_path / "a", config, tensors), bert_classifier, tmp_path), bert_classifier()
    dense = {}
    for side in ("adapter_down.0", "adapter_up"):
        inner = torch.bmm(part[f"{side}.W_left"], part[f"{side}.W_right"])
        dense[f"{side}.weight"] = sum(torch.kron(a, b) for a, b in zip(shared["phm_rule"], inner, strict=True)).T
        dense[f"{side}.bias"] = part[f"{side}.b"]
    h = hidden(bare, "bert.encoder.layer.1.output.dense")
    residual = hidden(bare, "bert.encoder.layer.1.attention.output.LayerNorm")
    with torch.no_grad():
        want = by_hand(dense, config, bare.bert.encoder.layer[1].output.LayerNorm, h, residual)
    assert torch.allclose(hidden(model, "bert.encoder.layer.1.output"), want, atol=1e-5)


def lora(**change: Any) -> dict[str, Any]:
    return {
        "architecture": "lora",
        "r": 4,
        "alpha": 8,
        "composition_mode": "add",
        "attn_matrices": ["q", "v"],
        **change,
    }


QUERY = "bert.encoder.layer.0.attention.self.query"


def test_lora_with_magnitudes_a_gate_and_shared_matrices(tmp_path: Path) -> None:
    x, pair = torch.randn(2, 7, 32), random({"lora_A": (4, 32), "lora_B": (32, 4)})
    bare = bert_classifier().get_submodule(QUERY)
    with torch.no_grad():
        bare.bias.add_(0.3)
    update = pair["lora_B"] @ pair["lora_A"]
    magnitude = random({"m.weight": (32, 1)})
    gate = random({"gate.weight": (1, 32), "gate.bias": (1,)})
    square = random({"vera_D": (4, 4), "vera_B": (32, 32)})

    def make() -> nn.Module:
        model = bert_classifier()
        with torch.no_grad():
            model.get_submodule(QUERY).bias.add_(0.3)
        return model

    y = bare(x)
    gain = magnitude["m.weight"].view(-1) / torch.linalg.norm(bare.weight + update, dim=1)
    opened = torch.sigmoid(F.linear(x, gate["gate.weight"], gate["gate.bias"])).mean(1, keepdim=True)
    wants = {
        "dora": (lora(use_dora=True), {**pair, **magnitude}, gain * (y + 2 * x @ update.T)),
        "gated": (lora(use_gating=True), {**pair, **gate}, y + opened * (x @ update.T)),
        "vera": (
            lora(vera_d=0.1, vera_b=0.0),
            square,
            y + 2 * x @ (square["vera_B"] @ pair["lora_B"] @ square["vera_D"] @ pair["lora_A"]).T,
        ),
    }
    for name, (config, part, want) in wants.items():
        tensors = {f"{QUERY}.loras.it.{key}": value for key, value in part.items()}
        if name == "vera":
            tensors |= {f"bert.shared_parameters.it.{key}": value for key, value in pair.items()}
        folder = written(tmp_path / name, config, tensors)
        (tmp_path / f"{name}-out").mkdir()
        model = imported(folder, make, tmp_path / f"{name}-out")
        with torch.no_grad():
            assert torch.allclose(model.get_submodule(QUERY)(x), want, atol=1e-5), name
    lonely = written(tmp_path / "lonely", wants["vera"][0], {f"{QUERY}.loras.it.{k}": v for k, v in square.items()})
    refused("E_CONVERT_MISSING", lonely, tmp_path)


def refused(code: str, folder: Path, tmp_path: Path, make: Callable[[], nn.Module] = bert_classifier) -> None:
    with pytest.raises(DeltaHubError) as caught:
        import_(folder, tmp_path / "refused", backbone=make(), allow_pickle=True)
    assert caught.value.code == code
    assert not (tmp_path / "refused").exists()


def test_parts_of_a_fused_projection(tmp_path: Path) -> None:
    part = random({"lora_A": (8, 32), "lora_B": (64, 4)})
    path = "transformer.h.0.attn.c_attn"
    tensors = {f"{path}.loras.it.{key}": value for key, value in part.items()}
    model = imported(written(tmp_path / "a", lora(), tensors), gpt2, tmp_path)
    x = torch.randn(2, 5, 32)
    a, b = part["lora_A"].split(4), part["lora_B"].split(32)
    with torch.no_grad():
        parts = [2 * x @ (b[0] @ a[0]).T, torch.zeros(2, 5, 32), 2 * x @ (b[1] @ a[1]).T]
        want = gpt2().get_submodule(path)(x) + torch.cat(parts, -1)
        assert torch.allclose(model.get_submodule(path)(x), want, atol=1e-5)


def test_a_lora_from_before_its_scale_was_right(tmp_path: Path) -> None:
    part = random({"lora_A": (4, 32), "lora_B": (32, 4)}, f"{QUERY}.loras.it.")
    for version, scale in (("adapters.1.0.1", 1.0), ("adapters.1.1.0", 2.0)):
        folder = written(tmp_path / version, lora(), part, version=version)
        package = import_(folder, tmp_path / f"{version}.out", backbone=bert_classifier(), allow_pickle=True)
        assert package.manifest.modules[0].config["scale"] == scale


def test_interventions_and_what_the_file_does_not_say(tmp_path: Path) -> None:
    config = {
        "architecture": "reft", "r": 2, "orthogonality": True, "prefix_positions": 3, "suffix_positions": 0,
        "layers": "all", "tied_weights": False, "non_linearity": None,
    }  # fmt: skip
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(32, 2, bias=False))
    part = random({"units.0.learned_source.weight": (2, 32), "units.0.learned_source.bias": (2,)})
    part |= {f"units.0.projection.{key}": value for key, value in layer.state_dict().items()}
    path = "bert.encoder.layer.0"
    tensors = {f"{path}.reft_layer.refts.it.{key}": value for key, value in part.items()}
    tensors |= {key.replace("units.0", "units.1"): value for key, value in tensors.items()}
    model, bare = imported(written(tmp_path / "a", config, tensors), bert_classifier, tmp_path), bert_classifier()
    with torch.no_grad():
        want = hidden(bare, path).clone()
        x, rows = want[:, :3], layer.weight
        source = F.linear(x, part["units.0.learned_source.weight"], part["units.0.learned_source.bias"])
        want[:, :3] = x + (source - F.linear(x, rows)) @ rows
    assert torch.allclose(hidden(model, path), want, atol=1e-5)
    for change in ({"orthogonality": False}, {"suffix_positions": 2}, {"non_linearity": "relu"}):
        folder = written(tmp_path / str(sorted(change)), {**config, **change}, tensors)
        refused("E_CONVERT_UNSUPPORTED", folder, tmp_path)


def test_a_union_takes_each_tensor_by_its_method(tmp_path: Path) -> None:
    union = {"architecture": "union", "configs": [lora(), BOTTLENECK]}
    low = random({"lora_A": (4, 32), "lora_B": (32, 4)}, f"{QUERY}.loras.it.")
    tensors = low | random(DENSE, "bert.encoder.layer.0.output.adapters.it.")
    package = import_(
        written(tmp_path / "a", union, tensors), tmp_path / "p", backbone=bert_classifier(), allow_pickle=True
    )
    assert {m.kind for m in package.manifest.modules} == {"lora", "ml.adapterhub.pfeiffer"}
    refused("E_CONVERT_MISSING", written(tmp_path / "b", union, low), tmp_path)
    both = {"architecture": "union", "configs": [lora(), {"architecture": "prompt_tuning"}]}
    refused("E_CONVERT_KIND", written(tmp_path / "c", both, low), tmp_path)


def test_heads_and_coupled_embeddings(tmp_path: Path) -> None:
    config = {**BOTTLENECK, "inv_adapter": "nice"}
    inner = random({f"{half}.{i}.{n}": s for half in "FG" for i, n, s in (
        (0, "weight", (8, 16)), (0, "bias", (8,)), (2, "weight", (16, 8)), (2, "bias", (16,)))})  # fmt: skip
    tensors = random(DENSE, "bert.encoder.layer.0.output.adapters.it.")
    tensors |= {f"bert.invertible_adapters.it.{key}": value for key, value in inner.items()}
    folder = written(tmp_path / "a", config, tensors)
    head = random({"heads.it.1.weight": (32, 32), "heads.it.1.bias": (32,)})
    head |= random({"heads.it.4.weight": (3, 32), "heads.it.4.bias": (3,)})
    options = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "use_pooler": False}
    (folder / "head_config.json").write_text(json.dumps({"config": options}), encoding="utf-8")
    torch.save(head, folder / "pytorch_model_head.bin")
    model, bare = imported(folder, bert_classifier, tmp_path), bert_classifier()

    def net(half: str, x: Tensor) -> Tensor:
        t = {key[2:]: value for key, value in inner.items() if key.startswith(half)}
        return F.linear(F.relu(F.linear(x, t["0.weight"], t["0.bias"])), t["2.weight"], t["2.bias"])

    with torch.no_grad():
        one, two = hidden(bare, "bert.embeddings").chunk(2, -1)
        one = one + net("F", two)
        want = torch.cat([one, two + net("G", one)], -1)
        assert torch.allclose(hidden(model, "bert.embeddings"), want, atol=1e-5)
        first = hidden(model, "bert.encoder.layer.1")[:, 0]
        dense = torch.tanh(F.linear(first, head["heads.it.1.weight"], head["heads.it.1.bias"]))
        logits = F.linear(dense, head["heads.it.4.weight"], head["heads.it.4.bias"])
        assert torch.allclose(model(input_ids=ids()).logits, logits, atol=1e-5)
    (folder / "head_config.json").write_text(json.dumps({"config": {**options, "layers": 3}}), encoding="utf-8")
    torch.save({**head, "heads.it.7.weight": torch.zeros(3, 3)}, folder / "pytorch_model_head.bin")
    refused("E_CONVERT_UNSUPPORTED", folder, tmp_path)
    refused("E_CONVERT_TARGET", _with_head(folder, {"span.weight": torch.zeros(2, 32)}), tmp_path)


def _with_head(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    torch.save(dict(tensors), folder / "pytorch_model_head.bin")
    return folder


@pytest.mark.parametrize("name", ["lora", "ia3", "pfeiffer"])
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """Exported again, the library's own file has the same tensors and means the same."""
    from deltahub.converters import export_
    from deltahub.tensors import TensorFile

    folder, base = FIXTURES / "adapters" / name, FIXTURES / "adapters" / "backbone"
    package = import_(folder, tmp_path / "p", backbone=base)
    export_(package, tmp_path / "out", to="adapterhub", backbone=base, name=json.loads(
        (folder / "adapter_config.json").read_text(encoding="utf-8"))["name"])  # fmt: skip
    one, two = (TensorFile.read(path / "adapter.safetensors").tensors() for path in (folder, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    theirs, ours = (
        json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["config"]
        for path in (folder, tmp_path / "out")
    )
    assert all(theirs[key] == value for key, value in ours.items())


def test_what_it_cannot_say_is_not_written(tmp_path: Path) -> None:
    from deltahub.converters import export_

    model = bert_classifier()
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("lora", "layer.0.attention.self.query", {"rank": 2}),
        ("lora", ["layer.0.attention.self.query", "layer.1.attention.self.value"], {"rank": 2}),
        ("lora", "classifier", {"rank": 2}),
        ("adapter", "attention.self.query", {"bottleneck": 4}),
        ("compacter", "layer.*.output.dense", {"bottleneck": 4, "division": 2}),
    ]
    for i, (kind, targets, config) in enumerate(cases):
        delta = deltahub.attach(model, kind, targets, **config)
        delta.save(tmp_path / f"p{i}")
        delta.detach()
        out = tmp_path / f"out{i}"
        if i == 0:  # a configuration leaves layers out
            export_(tmp_path / "p0", out, to="adapterhub", backbone=bert_classifier())
            found = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["config"]
            assert (found["attn_matrices"], found["leave_out"]) == (["q"], [1])
            continue
        with pytest.raises(DeltaHubError) as caught:
            export_(tmp_path / f"p{i}", out, to="adapterhub", backbone=bert_classifier())
        assert caught.value.code == "E_CONVERT_EXPORT"
        assert not out.exists()
