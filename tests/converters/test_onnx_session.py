"""Running exports: providers, what is checked before a file is opened, swapping, generation."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deltahub
from deltahub.converters.onnx import Session, add_delta, export_onnx
from deltahub.converters.onnx.providers import choose
from deltahub.errors import ConverterError
from tests.converters.onnx_models import attached, make

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    model = make("llama")
    attached(model, "lora", ["q_proj", "down_proj"], rank=3)
    return model


@pytest.fixture(scope="module")
def folder(decoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with a merged delta."""
    place = tmp_path_factory.mktemp("onnx") / "decoder"
    export_onnx(decoder, place)
    return place


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def torch_generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, count: int) -> Any:
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1
    )


def test_64_tokens_are_those_of_pytorch(decoder: nn.Module, folder: Path) -> None:
    ids = torch.randint(1, 98, (2, 6), generator=torch.Generator().manual_seed(3))
    expected = torch_generate(decoder, ids, torch.ones_like(ids), 64)
    assert expected.shape == (2, 70)
    session = Session(folder, provider="cpu")
    assert torch_equal(session.generate(ids, max_new_tokens=64), expected, ends=98)


def test_padded_prompts_generate_as_in_pytorch(decoder: nn.Module, folder: Path) -> None:
    ids = torch.randint(1, 98, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    expected = torch_generate(decoder, ids, mask, 16)
    assert torch_equal(Session(folder).generate(ids, mask, max_new_tokens=16), expected, ends=98)


def torch_equal(got: Any, expected: torch.Tensor, ends: int) -> bool:
    """Equal up to the first end of a row: PyTorch was told not to stop there."""
    for row, wanted in zip(got, expected.numpy(), strict=True):
        stop = np.flatnonzero(row == ends)
        n = int(stop[0]) if len(stop) else len(row)
        if not np.array_equal(row[:n], wanted[:n]):
            return False
    return True


def test_a_row_that_has_ended_is_padded(folder: Path) -> None:
    session = Session(folder)
    free = session.generate([[5, 6, 7]], max_new_tokens=8)
    end = int(free[0, 5])
    stopped = session.generate([[5, 6, 7]], max_new_tokens=8, eos_token_id=end)
    assert stopped.shape[1] <= 6
    assert stopped[0, -1] == end


def test_what_a_caller_may_leave_out(folder: Path) -> None:
    session = Session(folder)
    ids = np.array([[3, 4, 5]])
    out = session.run({"input_ids": ids})
    again = session.run({"input_ids": ids, "attention_mask": [[1, 1, 1]], "position_ids": [[0, 1, 2]]})
    assert np.array_equal(out["logits"], again["logits"])
    assert list(session.run({"input_ids": ids}, outputs=["logits"])) == ["logits"]


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"input_ids": [[1, 2]], "pixels": [[1.0]]},
        {"input_ids": [1, 2]},
        {"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]},
        {"input_ids": [[1, 2]], "past_key_values.0.key": np.zeros((1, 3, 0, 8), np.float32)},
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ConverterError) as caught:
        Session(folder).run(inputs)
    assert caught.value.code == "E_ONNX_INPUT"


def test_a_graph_without_a_cache_cannot_generate(tmp_path: Path) -> None:
    model = make("bert-classifier")
    export_onnx(model, tmp_path / "out")
    with pytest.raises(ConverterError) as caught:
        Session(tmp_path / "out").generate([[1, 2]])
    assert caught.value.code == "E_ONNX_GENERATE"


# --- what lies outside the graph


def _relocate(folder: Path, **said: str) -> None:
    """Change what a graph says of its external data, and the report's digest with it."""
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key in said:
            entry.value = said[entry.key]
    path.write_bytes(model.SerializeToString())
    _renew(folder)


def _renew(folder: Path) -> None:
    from deltahub.tensors import sha256_file

    report = json.loads((folder / "export.json").read_text())
    for name in report["files"]:
        if (folder / name).is_file():
            size, digest = sha256_file(folder / name)
            report["files"][name] = {"size": size, "sha256": digest}
    (folder / "export.json").write_text(json.dumps(report))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "..\\secret", "C:/x", "a/../../secret", ""])
def test_external_data_outside_the_folder(location: str, copied: Path) -> None:
    (copied.parent / "secret").write_bytes(b"0" * 1_000_000)
    _relocate(copied, location=location)
    with pytest.raises(ConverterError) as caught:
        Session(copied)
    assert caught.value.code == "E_ONNX_DATA_OUTSIDE"


def test_a_link_out_of_the_folder(copied: Path) -> None:
    shutil.move(copied / "model.onnx_data", copied.parent / "elsewhere")
    (copied / "model.onnx_data").symlink_to(copied.parent / "elsewhere")
    with pytest.raises(ConverterError) as caught:
        Session(copied)
    assert caught.value.code == "E_ONNX_DATA_OUTSIDE"


def test_external_data_in_an_attribute_is_seen_too(copied: Path) -> None:
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../secret")
    node = model.graph.node.add(op_type="Constant", output=["hidden"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    _renew(copied)
    with pytest.raises(ConverterError) as caught:
        Session(copied)
    assert caught.value.code == "E_ONNX_DATA_OUTSIDE"


@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (lambda f: (f / "model.onnx_data").unlink(), "E_ONNX_DATA_MISSING"),
        (lambda f: os.truncate(f / "model.onnx_data", 1000), "E_ONNX_DATA_SIZE"),
        (lambda f: (f / "model.onnx").write_bytes(b"\xff" * 50), "E_ONNX_FILE"),
        (lambda f: (f / "model.onnx").unlink(), "E_ONNX_FILE"),
        (lambda f: (f / "export.json").write_text("[]"), "E_ONNX_FILE"),
        (lambda f: (f / "export.json").unlink(), "E_ONNX_FILE"),
        (lambda f: _flip(f / "model.onnx_data"), "E_ONNX_CHANGED"),
        (lambda f: _relocate(f, offset="-1"), "E_ONNX_DATA_SIZE"),
        (lambda f: _relocate(f, length="9" * 17), "E_ONNX_DATA_SIZE"),
    ],
)
def test_broken_exports(break_it: Any, code: str, copied: Path) -> None:
    break_it(copied)
    with pytest.raises(ConverterError) as caught:
        Session(copied)
    assert caught.value.code == code


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# --- providers


def test_an_unknown_provider() -> None:
    with pytest.raises(ConverterError) as caught:
        choose("abacus")
    assert caught.value.code == "E_ONNX_PROVIDER"


def test_a_provider_that_is_missing_is_named_with_the_way_to_get_it(folder: Path) -> None:
    if choose("auto").provider == "cuda":
        pytest.skip("this machine has a working GPU")
    with pytest.raises(ConverterError) as caught:
        Session(folder, provider="cuda")
    assert caught.value.code == "E_ONNX_PROVIDER"
    assert "onnxruntime-gpu[cuda,cudnn]" in str(caught.value)
    session = Session(folder, provider="cuda", strict=False)
    assert session.choice.provider == "cpu"
    assert "cuda is not used" in str(session.choice)


# --- swapping


@pytest.fixture(scope="module")
def swappable(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """One graph, five deltas: ranks, a bias, an adapter."""
    model = make("bert-classifier")
    for name, kind, targets, config in (
        ("low", "lora", ["query", "value"], {"rank": 2, "scale": 0.5}),
        ("high", "lora", ["query", "output.dense"], {"rank": 9}),
        ("shift", "bias", ["query"], {"scale": 3.0}),
        ("narrow", "adapter", ["intermediate"], {"bottleneck": 3, "scale": 0.7}),
        ("wide", "adapter", ["intermediate"], {"bottleneck": 11}),
    ):
        attached(model, kind, targets, name=name, **config).disable()
    place = tmp_path_factory.mktemp("onnx") / "swappable"
    done = export_onnx(model, place, form="swappable")
    assert done.difference <= 1e-4
    assert done.effect > 1e-2
    return model, place


def expect(model: nn.Module, ids: torch.Tensor, *names: str) -> Any:
    with torch.no_grad(), deltahub.using(model, *names):
        return model(input_ids=ids).logits.numpy()


@pytest.mark.parametrize(
    "names",
    [(), ("low",), ("high",), ("shift",), ("narrow",), ("wide",), ("low", "high"), ("high", "shift", "wide", "low")],
)
def test_deltas_chosen_per_run(names: tuple[str, ...], swappable: tuple[nn.Module, Path]) -> None:
    model, folder = swappable
    session = Session(folder)
    for batch, length in ((1, 1), (2, 7), (3, 16), (5, 11)):
        ids = torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(length))
        got = session.run({"input_ids": ids.numpy()}, deltas=names)["logits"]
        assert np.abs(got - expect(model, ids, *names)).max() <= 1e-5
    assert session.active == ()


def test_what_cannot_be_put_in(swappable: tuple[nn.Module, Path]) -> None:
    session = Session(swappable[1])
    assert session.deltas == ("high", "low", "narrow", "shift", "wide")
    with pytest.raises(ConverterError) as caught:
        session.use("unknown")
    assert caught.value.code == "E_ONNX_DELTA"
    with pytest.raises(ConverterError) as caught:
        session.use("narrow", "wide")
    assert caught.value.code == "E_ONNX_SLOT"
    assert session.active == ()


def test_a_delta_file_that_does_not_fit(swappable: tuple[nn.Module, Path], tmp_path: Path) -> None:
    from deltahub.tensors import TensorFile, write

    folder = Path(shutil.copytree(swappable[1], tmp_path / "copy"))
    with TensorFile.read(folder / "deltas" / "low.safetensors") as file:
        values = {name: file.torch(name).clone() for name in file}
    first = next(name for name in values if name.endswith("/down"))
    for bad in ({first: values[first][:1]}, {first: values[first][:, :3]}, {"lora/nowhere/down": values[first]}):
        write(folder / "deltas" / "bad.safetensors", {**values, **bad})
        with pytest.raises(ConverterError) as caught:
            Session(folder).use("bad")
        assert caught.value.code == "E_ONNX_SLOT"


def test_slots_of_two_configs_at_one_place(tmp_path: Path) -> None:
    model = make("bert-classifier")
    attached(model, "adapter", ["output.dense"], bottleneck=2, activation="relu", name="one")
    attached(model, "adapter", ["output.dense"], bottleneck=2, activation="tanh", name="two")
    with pytest.raises(ConverterError) as caught:
        export_onnx(model, tmp_path / "out", form="swappable")
    assert caught.value.code == "E_ONNX_SLOT"
    assert "tanh" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_added_without_tracing(tmp_path: Path) -> None:
    base = make("bert-classifier")
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def fresh() -> nn.Module:
        return type(base).from_pretrained(tmp_path / "base").eval()  # type: ignore[attr-defined]

    model = fresh()
    attached(model, "lora", ["query"], rank=1)
    export_onnx(model, tmp_path / "out", form="swappable")
    other = fresh()
    attached(other, "lora", ["query"], rank=6, scale=1.5, name="other", seed=7)
    deltahub.save(other, tmp_path / "package")
    place = add_delta(tmp_path / "out", tmp_path / "package", name="other")
    assert place.stat().st_size < 20_000
    ids = torch.arange(1, 8)[None]
    got = Session(tmp_path / "out").run({"input_ids": ids}, deltas=["other"])["logits"]
    assert np.abs(got - expect(other, ids, "other")).max() <= 1e-5
    with pytest.raises(ConverterError) as caught:
        add_delta(tmp_path / "out", tmp_path / "package", name="other")
    assert caught.value.code == "E_ONNX_FILE"
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0, 0] += 1  # type: ignore[union-attr,index,operator]
    wrong = make("bert-classifier", seed=5)
    attached(wrong, "lora", ["query"], rank=2)
    deltahub.save(wrong, tmp_path / "wrong")
    with pytest.raises(ConverterError) as caught:
        add_delta(tmp_path / "out", tmp_path / "wrong", name="wrong")
    assert caught.value.code == "E_ONNX_BACKBONE"
