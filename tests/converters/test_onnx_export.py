"""Exports run in ONNX Runtime and compared with PyTorch: what is written, what is proved, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltahub
from deltahub.converters.onnx import export_onnx, proof
from deltahub.converters.onnx.graphs import Graph, Input, Output
from deltahub.errors import ConverterError, UsageError
from tests.converters.onnx_models import TARGETS, attached, make

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

OTHERS = ["gpt2", "roberta-tokens", "distilbert-answers"]
"""Tasks that the matrix leaves out."""


def run(folder: Path, file: str, feeds: dict[str, Any]) -> list[Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_further_tasks_export_merged(name: str, tmp_path: Path) -> None:
    model = make(name)
    attached(model, "lora", TARGETS[name], rank=3, scale=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = export_onnx(model, tmp_path / "out")
    assert done.difference <= 1e-4
    assert done.effect > 10 * done.difference
    assert len({(one.graph, one.case) for one in done.parity}) >= 4 * len(done.graphs)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the model is as it was"
    assert not next(iter(deltahub.deltas(model).values())).merged


@pytest.fixture
def classifier() -> nn.Module:
    model = make("bert-classifier")
    attached(model, "lora", ["query", "value"], rank=3)
    return model


def test_what_an_export_holds(classifier: nn.Module, tmp_path: Path) -> None:
    done = export_onnx(classifier, tmp_path / "out")
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "model.onnx_data", "export.json", "config.json"}
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [i.name for i in graph.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [[d.dim_param for d in i.type.tensor_type.shape.dim] for i in graph.graph.input] == [
        ["batch_size", "sequence_length"]
    ] * 3
    assert [o.name for o in graph.graph.output] == ["logits"]
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(said["deltahub.kinds"]) == ["lora@1"]
    assert said["deltahub.spec_version"] == "1.0"
    assert len(json.loads(said["deltahub.deltas"])[0]["tensors_sha256"]) == 64
    assert len(json.loads(said["deltahub.backbone"])["identity"]["exact"]) == 64
    assert not graph.graph.node[0].metadata_props
    assert not graph.graph.value_info or str(Path.cwd()) not in str(graph)
    report = json.loads((folder / "export.json").read_text())
    assert report["parity"]["greatest"] == done.difference
    assert report["files"]["model.onnx_data"]["size"] == (folder / "model.onnx_data").stat().st_size
    places = report["weights"]["model.onnx"].values()
    assert all(p["offset"] % (4096 if p["length"] >= 4096 else 64) == 0 for p in places)
    assert str(done).count("\n") >= 1


def test_the_merged_graph_is_the_plain_one_and_its_trace_is_kept(classifier: nn.Module, tmp_path: Path) -> None:
    first = export_onnx(classifier, tmp_path / "a")
    attached(classifier, "bias", ["query"], name="two")
    second = export_onnx(classifier, tmp_path / "b")
    assert second.cached
    ops = [[n.op_type for n in onnx.load(f / "model.onnx", load_external_data=False).graph.node]
           for f in (first.folder, second.folder)]  # fmt: skip
    assert ops[0] == ops[1]
    assert second.difference <= 1e-4


def test_kinds_that_cannot_merge_are_exported_live(tmp_path: Path) -> None:
    model = make("bert-classifier")
    attached(model, "adapter", ["output.dense"], bottleneck=5)
    with pytest.raises(ConverterError) as caught:
        export_onnx(model, tmp_path / "merged")
    assert caught.value.code == "E_ONNX_UNMERGEABLE"
    assert list(tmp_path.iterdir()) == []
    done = export_onnx(model, tmp_path / "live", form="live")
    assert done.effect > 1e-2
    assert done.difference <= 1e-4


def _watch_release(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the loaded model still lives when the comparison begins."""
    import weakref

    from deltahub.converters.onnx import exporting

    models: list[Any] = []
    alive: list[bool] = []
    describe, prove = exporting.describe, exporting.prove

    def described(model: nn.Module) -> Any:
        models.append(weakref.ref(next(model.parameters())))
        return describe(model)

    def proved(*args: Any, **kwargs: Any) -> Any:
        alive.append(models[0]() is not None)
        return prove(*args, **kwargs)

    monkeypatch.setattr(exporting, "describe", described)
    monkeypatch.setattr(exporting, "prove", proved)
    return alive


def test_a_package_with_its_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("bert-classifier")
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = type(model).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]
    delta = attached(model, "lora", ["query"], rank=2)
    attached(model, "assign", ["classifier"], name="head")
    ids = torch.randint(1, 99, (3, 11))
    deltahub.save(model, tmp_path / "package", probe={"input_ids": ids})
    alive = _watch_release(monkeypatch)
    done = export_onnx(tmp_path / "package", tmp_path / "out", backbone=str(tmp_path / "base"))
    assert alive == [False], "PyTorch's weights are gone before ONNX Runtime maps its own"
    names = {(one.case, one.output) for one in done.parity}
    assert ("probe", "logits as published") in names
    assert done.difference <= 1e-4
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["kinds"] == ["assign@1", "lora@1"]
    assert len(report["deltas"][0]["manifest_sha256"]) == 64
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((3, 11), np.int64)}
    got = run(tmp_path / "out", "model.onnx", {**feeds, "token_type_ids": np.zeros((3, 11), np.int64)})[0]
    assert np.abs(got - expected).max() < 1e-5
    assert delta.active


def test_what_differs_leaves_nothing(classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "deltahub.converters.onnx.exporting.cases",
        lambda *args: [
            proof.Case(graph=c.graph, name=c.name, inputs=c.inputs, outputs=[o + 1e-2 for o in c.outputs], published={})
            for c in proof.cases(*args)
        ],
    )
    with pytest.raises(ConverterError) as caught:
        export_onnx(classifier, tmp_path / "out")
    assert caught.value.code == "E_ONNX_DIFFERS"
    assert "logits" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Frozen(nn.Module):
    """Computes with the size of an axis that is said to vary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).reshape(2, -1, 4) if x.shape[0] == 2 else self.linear(x)


class Unsayable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(self.linear(x))


def _graph(*sizes: int) -> Graph:
    dims = ("batch_size", 3, 4)
    return Graph(
        file="model.onnx", call=lambda m, i: [m(i["x"])], inputs=(Input(name="x", dims=dims),),
        outputs=(Output(name="y", dims=dims),), sizes=tuple({"batch_size": n} for n in sizes),
    )  # fmt: skip


def test_an_axis_that_cannot_vary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConverterError) as caught:
        export_onnx(Frozen(), tmp_path / "out", graphs=[_graph(2, 3, 1)])
    assert caught.value.code in {"E_ONNX_STATIC", "E_ONNX_UNSUPPORTED"}
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_translation_is_named(tmp_path: Path) -> None:
    graph = Graph(
        file="model.onnx", call=lambda m, i: [m(i["x"])], inputs=(Input(name="x", dims=("batch_size", 4, 4)),),
        outputs=(Output(name="y", dims=("batch_size", 4)),), sizes=({"batch_size": 2}, {"batch_size": 3}),
    )  # fmt: skip
    with pytest.raises(ConverterError) as caught:
        export_onnx(Unsayable(), tmp_path / "out", graphs=[graph])
    assert caught.value.code == "E_ONNX_UNSUPPORTED"
    assert "eigvalsh" in str(caught.value) or "eigh" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


KIND = {
    "kind": "com.example.spectral", "version": 1, "title": "What ONNX cannot say", "hosts": ["linear"],
    "tensors": {"gate": {"shape": ["out", "out"], "init": "zeros"}},
    "equations": {"output": "h = inverse(gate + eye(d_out, gate))\nlinear(y, h)"},
}  # fmt: skip


def test_a_kind_that_has_no_translation_is_named_with_its_equation(tmp_path: Path) -> None:
    model = Small()
    deltahub.attach(model, KIND, ["linear"])
    with pytest.raises(ConverterError) as caught:
        export_onnx(model, tmp_path / "out", form="live", graphs=[_graph(2, 3)])
    text = str(caught.value)
    assert caught.value.code == "E_ONNX_UNSUPPORTED"
    assert "com.example.spectral" in text
    assert "equation of output" in text
    assert "h = inverse(gate" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"form": "frozen"}, "E_ONNX_FORM"),
        ({"task": "mind-reading"}, "E_ONNX_TASK"),
        ({"task": "image-classification"}, "E_ONNX_TASK"),
        ({"dtype": "bfloat16"}, "E_ONNX_DTYPE"),
        ({"dtype": "float16"}, "E_ONNX_DTYPE"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], code: str, tmp_path: Path) -> None:
    with pytest.raises(ConverterError) as caught:
        export_onnx(make("bert-classifier"), tmp_path / "out", **options)
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_options_of_packages_are_not_dropped(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        export_onnx(make("bert-classifier"), tmp_path / "out", backbone="base")


def test_no_space(classifier: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("deltahub.converters.onnx.storing.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConverterError) as caught:
        export_onnx(classifier, tmp_path / "out")
    assert caught.value.code == "E_ONNX_SPACE"
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_lie_in_the_file_once(tmp_path: Path) -> None:
    model = make("gpt2")
    export_onnx(model, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    numbers = sum(p.numel() for p in model.parameters())
    assert report["files"]["model.onnx_data"]["size"] < 4 * numbers * 1.5 + 100_000
