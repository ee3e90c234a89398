"""Training, as a user of PyTorch writes it: a tokenizer, a loop, a measure of accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from deltahub.demo.corpus import Sentence

__all__ = ["FEW", "Texts", "accuracy", "encode", "fit", "pooled", "predict"]

FEW = 128
"""Rows that are enough where the claim is not about all of them; a whole number of batches."""
_LONGEST = 24
_ROWS = 32

Progress = Callable[[int, int, float], None]
"""Called with the step, the number of steps and the loss."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Tokenized sentences. ``ids`` and ``mask``: int64 ``[n, length]``; ``labels``: int64 ``[n]``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def batch(self, rows: Tensor | slice) -> dict[str, Tensor]:
        """Some rows as keyword inputs of a transformers model, cut to the longest of them."""
        longest = int(self.mask[rows].sum(1).max())
        return {"input_ids": self.ids[rows, :longest], "attention_mask": self.mask[rows, :longest]}

    def first(self, rows: int) -> Texts:
        """The first few texts."""
        return Texts(ids=self.ids[:rows], mask=self.mask[:rows], labels=self.labels[:rows])

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """All rows in order."""
        for start in range(0, len(self.labels), 2 * _ROWS):
            yield self.batch(slice(start, start + 2 * _ROWS))


def encode(tokenizer: Any, sentences: Sequence[Sentence], labels: Sequence[int]) -> Texts:
    """Tokenize sentences."""
    texts = [sentence.text for sentence in sentences]
    out = tokenizer(texts, truncation=True, max_length=_LONGEST, padding="max_length", return_tensors="pt")
    return Texts(ids=out["input_ids"], mask=out["attention_mask"], labels=torch.tensor(labels))


def _order(texts: Texts, generator: torch.Generator) -> list[Tensor]:
    """Batches in random order, each of sentences of about one length, so that little is computed on padding."""
    lengths = texts.mask.sum(1) + 4 * torch.rand(len(texts.labels), generator=generator)
    batches = torch.split(lengths.argsort(), _ROWS)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def fit(
    logits: Callable[[Tensor], Tensor],
    texts: Texts,
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    *,
    epochs: int,
    progress: Progress,
) -> None:
    """Train parameters by AdamW with a linear warm-up and decay; the same batches in every call.

    Args:
        logits: the model as a function of row numbers.
        texts: what to learn from.
        groups: parameters with their peak learning rates.
        epochs: passes over the texts.
        progress: told of every step.
    """
    generator = torch.Generator().manual_seed(0)
    steps = epochs * math.ceil(len(texts.labels) / _ROWS)
    optimizer = torch.optim.AdamW([{"params": list(p), "lr": rate} for p, rate in groups], weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: (at + 1) / warm if at < warm else (steps - at) / (steps - warm)
    )
    at = 0
    for _ in range(epochs):
        for rows in _order(texts, generator):
            loss = F.cross_entropy(logits(rows), texts.labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            at += 1
            progress(at, steps, float(loss.detach()))


@torch.no_grad()
def pooled(model: Any, texts: Texts) -> Tensor:
    """What a BERT classifier's head sees: float32 ``[n, hidden]``."""
    return torch.cat([model.bert(**batch).pooler_output for batch in texts.batches()])


@torch.no_grad()
def predict(model: nn.Module, texts: Texts) -> Tensor:
    """Logits of all texts: float32 ``[n, classes]``."""
    return torch.cat([model(**batch).logits for batch in texts.batches()])


def accuracy(logits: Tensor, texts: Texts) -> float:
    """Share of texts whose greatest logit is their label's."""
    return float((logits.argmax(1) == texts.labels).float().mean())
