"""Metrics of captions equal those of ``pycocoevalcap`` on the same tokens, and known values."""

from __future__ import annotations

import random

import pytest

from deltahub.errors import UsageError
from deltahub.recipes.caption_metrics import bleu, bootstrap, cider, cider_d, exact, exact_by, rouge_l, scores, tokens

WORDS = ("a the red blue circle square moved from top left to bottom right and is gone became").split()  # noqa: SIM905


def corpus(seed: int, images: int = 40) -> tuple[list[str], list[list[str]]]:
    """Captions that share some words with their references."""
    dice = random.Random(seed)
    references = [
        [" ".join(dice.choices(WORDS, k=dice.randint(4, 12))) for _ in range(dice.randint(1, 4))] for _ in range(images)
    ]
    captions = []
    for refs in references:
        words = dice.choice(refs).split()
        for _ in range(dice.randint(0, 4)):
            words[dice.randrange(len(words))] = dice.choice(WORDS)
        captions.append(" ".join(words[: dice.randint(1, len(words))]))
    return captions, references


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocoevalcap(seed: int) -> None:
    scorers = pytest.importorskip("pycocoevalcap.bleu.bleu_scorer"), pytest.importorskip("pycocoevalcap.rouge.rouge")
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    captions, references = corpus(seed)
    theirs = scorers[0].BleuScorer(n=4)
    whole = CiderScorer(n=4, sigma=6.0)
    for caption, refs in zip(captions, references, strict=True):
        theirs += (caption, refs)
        whole += (caption, refs)
    assert bleu(captions, references) == pytest.approx(theirs.compute_score(option="closest")[0], rel=1e-9)
    assert cider_d(captions, references) == pytest.approx(whole.compute_score()[0], rel=1e-9)
    named = {i: [caption] for i, caption in enumerate(captions)}
    expected = scorers[1].Rouge().compute_score(dict(enumerate(references)), named)[0]
    assert rouge_l(captions, references) == pytest.approx(expected, rel=1e-9)


def test_values_that_were_worked_out_by_hand() -> None:
    # "the cat is on the mat" against "the cat sat on the mat": 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, no four.
    found = bleu(["the cat is on the mat"], [["the cat sat on the mat"]])
    assert found[:3] == pytest.approx((5 / 6, (5 / 6 * 3 / 5) ** 0.5, (5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3)), rel=1e-6)
    assert found[3] < 1e-3
    assert rouge_l(["the cat is on the mat"], [["the cat sat on the mat"]]) == pytest.approx(5 / 6)
    short = bleu(["the cat"], [["the cat sat on the mat"]])
    assert short[0] == pytest.approx(2.718281828 ** (1 - 3), rel=1e-6)  # six words for two: e^(1 - 6/2)


def test_the_best_and_the_worst() -> None:
    captions, references = corpus(7)
    best = [refs[0] for refs in references]
    alone = [[b] for b in best]
    assert cider(best, alone) == pytest.approx(10)
    assert cider_d(best, alone) == pytest.approx(10)
    assert scores(best, alone)["exact"] == scores(best, alone)["ROUGE-L"] == 100
    strange = ["xylophone"] * len(captions)
    assert max(cider(strange, references), rouge_l(strange, references), exact(strange, references)) == 0
    assert cider(captions, references) != cider_d(captions, references)


def test_tokens_exactness_and_groups() -> None:
    assert tokens("The cat's HAT, at 3!") == ["the", "cat's", "hat", "at", "3"]
    assert exact(["The cat."], [["a dog", "the cat"]]) == 1
    assert exact_by(["a", "b", "c"], [["a"], ["x"], ["c"]], ["one", "one", "two"]) == {"one": 0.5, "two": 1.0}


def test_intervals_hold_the_value_and_repeat() -> None:
    captions, references = corpus(3)
    found = bootstrap(rouge_l, captions, references, draws=200, seed=1)
    assert found["low"] < found["value"] < found["high"]
    assert found == bootstrap(rouge_l, captions, references, draws=200, seed=1)
    assert found["value"] == rouge_l(captions, references)


@pytest.mark.parametrize(("captions", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_nothing_to_compare(captions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(UsageError) as caught:
        bleu(captions, references)
    assert caught.value.code == "E_USAGE_RECIPE"
