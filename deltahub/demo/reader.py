"""The reader: an empty cache and a name. Loads, compares, merges, meets the wrong backbone, exports."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import deltahub
from deltahub.demo.corpus import Corpus
from deltahub.demo.exporting import export
from deltahub.demo.stage import BACKBONE, DELTA, LINEAR_DELTA
from deltahub.demo.steps import CheckFailed, Steps, folder_bytes
from deltahub.demo.training import FEW, Texts, encode, predict
from deltahub.errors import DeltaHubError, IdentityError, InjectionError
from deltahub.tensors import TensorFile

__all__ = ["flip_bit", "main"]

_TOUCHED = "encoder.layer.3.attention.self.query.weight"
_TOLERANCE = 1e-4


def main(arguments: list[str]) -> int:
    """Play the reader; ``arguments``: the shared folder, the number of the first step, the backbone's folder."""
    shared, first, weights = Path(arguments[0]), int(arguments[1]), Path(arguments[2])
    steps = Steps(Console(), first=first)
    try:
        model, test = _load(steps, shared)
        _refuse_to_merge(steps, model, test)
        _verify(steps)
        _merge(steps, test, shared)
        _wrong_backbone(steps, weights)
        export(steps, model, test)
    except CheckFailed:
        return 1
    (shared / "reader.steps").write_text(str(steps.number))
    return 0


def _texts(shared: Path) -> Texts:
    from transformers import AutoTokenizer

    corpus = Corpus.read(shared / "corpus.json")
    return encode(AutoTokenizer.from_pretrained(BACKBONE), corpus.test, corpus.labels(corpus.test))


def _same_bits(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _load(steps: Steps, shared: Path) -> tuple[Any, Texts]:
    cache = Path.home()
    with steps.step(f'In a fresh process: deltahub.load("{DELTA}")') as step:
        step.check("nothing is in the cache", folder_bytes(cache) == 0)
        model = deltahub.load(DELTA)
        step.bytes = folder_bytes(cache)
        (delta,) = deltahub.deltas(model).values()
        for line in str(delta.report).splitlines():
            step.note(line)
        step.note(", ".join(f"{part.name}: {part.kind.name} × {len(part.sites)}" for part in delta.parts))
        commit = (shared / f"{DELTA.replace('/', '--')}.commit").read_text()
        step.check("it is the commit that the author made", getattr(delta.report, "commit", None) == commit)
        step.check("it is a transformers model", type(model).__name__ == "BertForSequenceClassification")
    with steps.step("The author's logits on the held-out sentences") as step:
        test = _texts(shared)
        logits, expected = predict(model, test).numpy(), np.load(shared / "logits.npy")
        step.bytes = logits.nbytes
        step.check(f"the same {logits.size:,} numbers, bit for bit", _same_bits(logits, expected))
    return model, test.first(FEW)


def _refuse_to_merge(steps: Steps, model: Any, test: Texts) -> None:
    with steps.step("merge() of all of it is refused, for the adapters have no merged form") as step:
        before = predict(model, test)
        (delta,) = deltahub.deltas(model).values()
        error = _error(delta.merge)
        step.note(str(error).splitlines()[0])
        step.check("E_INJECTION_NOT_MERGEABLE", getattr(error, "code", None) == "E_INJECTION_NOT_MERGEABLE")
        step.check("the model computes what it did before", torch.equal(before, predict(model, test)))


def _verify(steps: Steps) -> None:
    with steps.step(f'deltahub.verify("{DELTA}")') as step:
        report = deltahub.verify(DELTA)
        step.bytes = sum(report.files.values())
        for name, value in (report.probe or {}).items():
            step.note(f"the author's probe, output {name!r}: differs by {value:.3g}")
        step.check("the probe's numbers come out", report.probe is not None)
        step.check(f"the delta has an effect: {report.effect:.3g}", report.effect > 0)


def _merge(steps: Steps, test: Texts, shared: Path) -> None:
    with steps.step(f'merge() of "{LINEAR_DELTA}": LoRA and head, without the adapters') as step:
        model = deltahub.load(LINEAR_DELTA)
        (delta,) = deltahub.deltas(model).values()
        live = predict(model, test)
        step.check("live: the author's bits", _same_bits(live.numpy(), np.load(shared / "mergeable.npy")))
        delta.merge()
        difference = float((predict(model, test) - live).abs().max())
        step.check(f"merged = live: the greatest difference is {difference:.2g}", 0 <= difference <= _TOLERANCE)
        delta.unmerge()
        step.check("unmerged: the same bits as before", torch.equal(predict(model, test), live))


def _wrong_backbone(steps: Steps, weights: Path) -> None:
    with steps.step("The same delta on a backbone with one changed bit") as step:
        wrong = Path.home() / "wrong"
        shutil.copytree(weights, wrong)
        flip_bit(wrong / "model.safetensors", _TOUCHED)
        step.bytes = folder_bytes(wrong)
        error = _error(lambda: deltahub.load(DELTA, backbone=wrong))
        for line in str(error).splitlines():
            step.note(line)
        step.check("E_BACKBONE_MISMATCH", isinstance(error, IdentityError) and error.code == "E_BACKBONE_MISMATCH")
        step.check("the error names the tensor", _TOUCHED in str(error))
        right = deltahub.load(DELTA, backbone=weights)
        step.check("the untouched folder is accepted", len(deltahub.deltas(right)) == 1)


def _error(call: Any) -> DeltaHubError | None:
    try:
        call()
    except (IdentityError, InjectionError) as error:
        return error
    return None


def flip_bit(path: Path, tensor: str) -> None:
    """Change the lowest bit of the first number of a tensor in a file."""
    with TensorFile.open(path) as file:
        begin = file[tensor].begin
    with path.open("r+b") as stream:
        stream.seek(begin)
        (value,) = stream.read(1)
        stream.seek(begin)
        stream.write(bytes([value ^ 1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
