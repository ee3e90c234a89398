"""The author: trains a delta on the backbone from the Hub, saves it and publishes it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import deltahub
from deltahub.demo.corpus import Corpus
from deltahub.demo.stage import BACKBONE, DELTA, LINEAR_DELTA
from deltahub.demo.steps import CheckFailed, Step, Steps, folder_bytes
from deltahub.demo.training import FEW, Texts, accuracy, encode, fit, pooled, predict

__all__ = ["main"]

_HEAD_RATES = (0.01, 0.03)
_DELTA_RATE = 3e-3
_HEAD_RATE = 1e-2
_LEAST_GAIN = 0.03


def main(arguments: list[str]) -> int:
    """Play the author; ``arguments``: the shared folder, the number of the first step, the number of epochs."""
    shared, first, epochs = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    steps = Steps(Console(), first=first)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao, where it is installed, as it is loaded
    torch.manual_seed(0)
    try:
        corpus = Corpus.read(shared / "corpus.json")
        model, train, test = _backbone(steps, corpus)
        alone = _head_alone(steps, model, train, test, epochs)
        logits = _train(steps, model, train, test, epochs, alone)
        np.save(shared / "logits.npy", logits.numpy())
        _publish(steps, model, test, shared)
    except CheckFailed:
        return 1
    (shared / "author.steps").write_text(str(steps.number))
    return 0


def _backbone(steps: Steps, corpus: Corpus) -> tuple[Any, Texts, Texts]:
    from transformers import AutoTokenizer, BertForSequenceClassification

    with steps.step("The frozen backbone, by transformers, from the Hub") as step:
        labels = dict(enumerate(corpus.chapters))
        model: Any = BertForSequenceClassification.from_pretrained(
            BACKBONE, id2label=labels, label2id={name: i for i, name in labels.items()}
        )
        model.eval()  # without dropout in training too: a few passes with a small delta do not overfit
        tokenizer = AutoTokenizer.from_pretrained(BACKBONE)
        step.bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        step.note(f"{sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} thread(s)")
        train, test = (encode(tokenizer, half, corpus.labels(half)) for half in (corpus.train, corpus.test))
        known = torch.isfinite(pooled(model, train.first(8))).all()
        step.check("it computes finite numbers", bool(known))
    return model, train, test


@contextlib.contextmanager
def _progress(steps: Steps, label: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar with the loss, on terminals; it leaves nothing behind."""
    columns = (
        TextColumn("    {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=steps.console, transient=True, disable=not steps.console.is_terminal) as bar:
        task = bar.add_task(label, loss="", total=None)
        yield lambda at, of, loss: bar.update(task, completed=at, total=of, loss=f"loss {loss:.3f}")


def _head_alone(steps: Steps, model: Any, train: Texts, test: Texts, epochs: int) -> float:
    """The yardstick. A frozen backbone gives the same numbers in every epoch, so they are computed once."""
    with steps.step("Yardstick: a classification head alone, same batches, same epochs") as step:
        features, held_out = pooled(model, train), pooled(model, test)
        reached = {}
        for rate in _HEAD_RATES:
            torch.manual_seed(0)
            head = nn.Linear(features.shape[1], model.config.num_labels)
            groups = [(list(head.parameters()), rate)]
            with _progress(steps, f"head alone, rate {rate}") as progress:
                fit(_over(head, features), train, groups, epochs=epochs, progress=progress)
            with torch.no_grad():
                reached[rate] = accuracy(head(held_out), test)
            step.note(f"learning rate {rate}: {reached[rate]:.1%} of the held-out sentences")
    return max(reached.values())


def _over(head: nn.Linear, features: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: head(features[rows])


def _train(steps: Steps, model: Any, train: Texts, test: Texts, epochs: int, alone: float) -> Tensor:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with steps.step("A delta: LoRA, adapters and a head") as step:
        layers = "bert.encoder.layer.{2..5}"
        wide = [f"{layers}.attention.self.{{query,value}}", f"{layers}.intermediate.dense"]
        lora = deltahub.attach(model, "lora", wide, name="lora", rank=8, scale=2.0, seed=1)
        adapter = deltahub.attach(model, "adapter", f"{layers}.output.dense", name="adapter", bottleneck=16, seed=2)
        head = deltahub.attach(model, "assign", "classifier", name="head")
        small = [*lora.parameters(), *adapter.parameters()]
        count = sum(p.numel() for p in (*small, *head.parameters()))
        groups = [(small, _DELTA_RATE), (list(head.parameters()), _HEAD_RATE)]
        with _progress(steps, "delta") as progress:
            fit(lambda rows: model(**train.batch(rows)).logits, train, groups, epochs=epochs, progress=progress)
        logits = predict(model, test)
        reached = accuracy(logits, test)
        step.bytes = sum(t.numel() * t.element_size() for d in (lora, adapter, head) for t in d.tensors().values())
        everything = sum(p.numel() for p in model.parameters()) - count
        step.note(f"{count:,} parameters, {count / everything:.2%} of the backbone's")
        step.note(f"held-out accuracy {reached:.1%}, head alone {alone:.1%}")
        after = model.state_dict()
        same = list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
        step.check("not a bit of the backbone changed, nor a name in its state_dict", same)
        step.check(f"better than a head alone by {reached - alone:.1%}", reached - alone >= _LEAST_GAIN)
    return logits


def _publish(steps: Steps, model: Any, test: Texts, shared: Path) -> None:
    package = Path.home() / "package"
    with steps.step(f"deltahub.save → {package.name}/") as step:
        deltahub.save(model, package, probe=test.first(8).batch(slice(None)))
        step.bytes = folder_bytes(package)
        step.note(", ".join(f"{p.name} {p.stat().st_size:,} B" for p in sorted(package.iterdir())))
        report = deltahub.inspect(package)
        step.check("the package reads back, strictly", report is not None)
    _push(steps, DELTA, package, shared)
    with steps.step("The same without the adapters, to be merged later") as step:
        deltahub.deltas(model)["adapter"].detach()
        logits = predict(model, test)
        np.save(shared / "mergeable.npy", logits[:FEW].numpy())
        step.note("an adapter has a nonlinearity, hence no merged form; LoRA and head have one")
        step.note(f"held-out accuracy without the adapters, as they are: {accuracy(logits, test):.1%}")
        deltahub.save(model, Path.home() / "mergeable")
        step.bytes = folder_bytes(Path.home() / "mergeable")
        step.check("two modules are left", list(deltahub.deltas(model)) == ["lora", "head"])
    _push(steps, LINEAR_DELTA, Path.home() / "mergeable", shared)


def _push(steps: Steps, repo: str, package: Path, shared: Path) -> None:
    with steps.step(f'deltahub.push("{repo}")') as step:
        result = deltahub.push(package, repo)
        step.bytes = folder_bytes(package)
        step.note(f"commit {result.commit[:12]}: {', '.join(result.changed)}")
        _check_published(step, repo, result.commit)
        (shared / f"{repo.replace('/', '--')}.commit").write_text(result.commit)


def _check_published(step: Step, repo: str, commit: str) -> None:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo)
    step.check("the Hub's head is this commit", info.sha == commit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
