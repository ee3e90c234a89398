"""Metrics of captions: BLEU, ROUGE-L, CIDEr and CIDEr-D, exactness, and bootstrap intervals; no Java, no downloads.

The numbers are those of ``pycocoevalcap`` on the same tokens. That package's tokens come from a Java program
(PTBTokenizer), so figures of papers differ a little from those on :func:`tokens`. Its score called CIDEr is the variant
with clipping and a penalty of length that its authors call CIDEr-D; here each has its own name. METEOR is left out: its
tables of synonyms and paraphrases come with a Java program only.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from deltahub.errors import UsageError

__all__ = ["bleu", "bootstrap", "cider", "cider_d", "exact", "exact_by", "rouge_l", "scores", "tokens"]

Captions = Sequence[str]
References = Sequence[Sequence[str]]
Grams = Counter[tuple[str, ...]]

ORDERS = 4
"""Longest n-grams that BLEU and CIDEr look at."""
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def tokens(text: str) -> list[str]:
    """Words in lower case; punctuation is dropped, as the evaluation of COCO captions drops it."""
    return _WORD.findall(text.lower())


def _check(captions: Captions, references: References) -> None:
    if not captions or len(captions) != len(references) or not all(references):
        raise UsageError(
            "E_USAGE_RECIPE",
            "each caption needs at least one reference, and there must be captions",
            where="caption_metrics",
            expected=len(captions),
            found=len(references),
        )


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(captions: Captions, references: References) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of a corpus, from 0 to 1 (Papineni et al., 2002; the closest reference gives the length).

    Args:
        captions: one for each image.
        references: for each image, its references.
    """
    _check(captions, references)
    tiny, small = 1e-15, 1e-9  # as pycocoevalcap has them, so that an order without a match does not end the product
    correct, guessed = [0] * ORDERS, [0] * ORDERS
    length = closest = 0
    for caption, refs in zip(captions, references, strict=True):
        words, theirs = tokens(caption), [tokens(ref) for ref in refs]
        length += len(words)
        closest += min((abs(len(ref) - len(words)), len(ref)) for ref in theirs)[1]
        for n in range(1, ORDERS + 1):
            most: Grams = Counter()
            for ref in theirs:
                most |= _grams(ref, n)
            own = _grams(words, n)
            correct[n - 1] += (own & most).total()
            guessed[n - 1] += max(0, len(words) - n + 1)
    ratio = (length + tiny) / (closest + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, found = 1.0, []
    for n in range(ORDERS):
        product *= (correct[n] + tiny) / (guessed[n] + small)
        found.append(penalty * product ** (1 / (n + 1)))
    return found[0], found[1], found[2], found[3]


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = 0
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], above + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(captions: Captions, references: References) -> float:
    """ROUGE-L, the mean over images, from 0 to 1 (Lin, 2004; beta 1.2, the best precision and recall of references)."""
    _check(captions, references)
    beta = 1.2**2
    found = []
    for caption, refs in zip(captions, references, strict=True):
        words, theirs = tokens(caption), [tokens(ref) for ref in refs]
        common = [_common(ref, words) for ref in theirs]
        precision = max(c / max(1, len(words)) for c in common)
        recall = max(c / max(1, len(ref)) for c, ref in zip(common, theirs, strict=True))
        both = precision and recall
        found.append((1 + beta) * precision * recall / (recall + beta * precision) if both else 0.0)
    return fmean(found)


def _cider(captions: Captions, references: References, *, clipped: bool, sigma: float) -> list[float]:
    _check(captions, references)
    own = [[_grams(tokens(c), n) for n in range(1, ORDERS + 1)] for c in captions]
    theirs = [[[_grams(tokens(r), n) for n in range(1, ORDERS + 1)] for r in refs] for refs in references]
    seen: Grams = Counter(gram for refs in theirs for gram in {g for ref in refs for part in ref for g in part})
    corpus = math.log(len(captions))

    def weights(part: Grams) -> dict[tuple[str, ...], float]:
        return {gram: n * (corpus - math.log(max(1, seen[gram]))) for gram, n in part.items()}

    def similarity(a: Sequence[Grams], b: Sequence[Grams]) -> float:
        apart = a[1].total() - b[1].total()  # in pairs of words, as the original counts lengths
        total = 0.0
        for left, right in zip(map(weights, a), map(weights, b), strict=True):
            norm = math.sqrt(sum(v * v for v in left.values()) * sum(v * v for v in right.values()))
            dot = sum((min(v, right[g]) if clipped else v) * right[g] for g, v in left.items() if g in right)
            total += dot / norm if norm else 0.0
        return total * (math.exp(-(apart**2) / (2 * sigma**2)) if clipped else 1.0) / len(a)

    return [10 * fmean(similarity(caption, ref) for ref in refs) for caption, refs in zip(own, theirs, strict=True)]


def cider(captions: Captions, references: References) -> float:
    """CIDEr of a corpus (Vedantam et al., arXiv:1411.5726): cosines of tf-idf of n-grams, no stems; 10 at most."""
    return fmean(_cider(captions, references, clipped=False, sigma=6.0))


def cider_d(captions: Captions, references: References, *, sigma: float = 6.0) -> float:
    """CIDEr-D of a corpus: counts are clipped, and lengths that differ are penalised; 10 at most.

    It is what ``pycocoevalcap`` and most tables of papers, times 100, call CIDEr.
    """
    return fmean(_cider(captions, references, clipped=True, sigma=sigma))


def exact(captions: Captions, references: References) -> float:
    """Share of captions whose tokens are those of one of their references."""
    _check(captions, references)
    return fmean(float(tokens(c) in [tokens(r) for r in refs]) for c, refs in zip(captions, references, strict=True))


def exact_by(captions: Captions, references: References, groups: Sequence[str]) -> dict[str, float]:
    """:func:`exact` within each group, such as the type of a change."""
    found: dict[str, float] = {}
    for group in sorted(set(groups)):
        rows = [i for i, g in enumerate(groups) if g == group]
        found[group] = exact([captions[i] for i in rows], [references[i] for i in rows])
    return found


def scores(captions: Captions, references: References) -> dict[str, float]:
    """All of the above, in the units in which papers print them: hundredths, CIDEr times 100."""
    names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
    found = {name: 100 * value for name, value in zip(names, bleu(captions, references), strict=True)}
    found["ROUGE-L"] = 100 * rouge_l(captions, references)
    found["CIDEr"] = 100 * cider(captions, references)
    found["CIDEr-D"] = 100 * cider_d(captions, references)
    found["exact"] = 100 * exact(captions, references)
    return found


def bootstrap(
    metric: Callable[[Captions, References], float],
    captions: Captions,
    references: References,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Mapping[str, float]:
    """A metric with the interval that resampling the images gives (percentiles).

    Args:
        metric: of captions and references, such as :func:`cider_d`.
        captions: one for each image.
        references: for each image, its references.
        draws: how many samples, each as large as the corpus, with replacement.
        level: share of the samples inside the interval.
        seed: of the draws.

    Returns:
        ``value``, ``low`` and ``high``.
    """
    _check(captions, references)
    dice = random.Random(seed)  # noqa: S311 - statistics, not secrets
    found = []
    for _ in range(draws):
        rows = dice.choices(range(len(captions)), k=len(captions))
        found.append(metric([captions[i] for i in rows], [references[i] for i in rows]))
    found.sort()
    low = found[int((1 - level) / 2 * (draws - 1))]
    high = found[math.ceil((1 + level) / 2 * (draws - 1))]
    return {"value": metric(captions, references), "low": low, "high": high}
