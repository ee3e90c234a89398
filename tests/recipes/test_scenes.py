"""Drawn pairs: made from a seed, and what is said of them is what differs."""

from __future__ import annotations

import hashlib
from itertools import islice

import pytest

from deltahub.errors import UsageError
from deltahub.recipes.scenes import CHANGES, Difficulty, Scene, ScenePair, describe, draw, pairs


def some(count: int = 300, **options: object) -> list[ScenePair]:
    return list(islice(pairs(seed=3, **options), count))  # type: ignore[arg-type]


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_the_sentence_is_what_differs(difficulty: str) -> None:
    found = some(difficulty=difficulty)
    assert {pair.change for pair in found} == set(CHANGES)
    for pair in found:
        before, after = ({item.cell: item for item in scene.items} for scene in (pair.before, pair.after))
        assert len({item.name for item in pair.before.items}) == len(pair.before.items), "names tell shapes apart"
        gone = [before[c] for c in before if after.get(c) != before[c]]
        new = [after[c] for c in after if before.get(c) != after[c]]
        counts = {"added": (0, 1), "removed": (1, 0), "nothing": (0, 0)}
        assert (len(gone), len(new)) == counts.get(pair.change, (1, 1)), pair
        assert pair.sentence in pair.sentences
        for item in gone or new:
            assert item.name in pair.sentence
            assert item.place in pair.sentence
        if pair.change == "moved":
            assert new[0].place in pair.sentence
        if pair.change in {"recoloured", "resized"}:
            assert (new[0].colour if pair.change == "recoloured" else new[0].size) in pair.sentence


def test_the_same_seed_gives_the_same_pixels() -> None:
    digest = hashlib.sha256()
    for pair in some(20, difficulty="hard"):
        digest.update(draw(pair.before).tobytes() + draw(pair.after).tobytes())
    again = hashlib.sha256()
    for pair in some(20, difficulty="hard"):
        again.update(draw(pair.before).tobytes() + draw(pair.after).tobytes())
    assert digest.hexdigest() == again.hexdigest()
    assert some(5) != list(islice(pairs(seed=4), 5))


def test_distractors_change_the_image_and_not_the_sentence() -> None:
    pair = next(p for p in some(difficulty="hard", changes=("nothing",)) if p.after.shift != (0, 0))
    assert draw(pair.before).tobytes() != draw(pair.after).tobytes()
    assert pair.sentences == ("nothing changed", "the two images are the same")
    easy = some(20, changes=("nothing",))
    assert all(draw(p.before).tobytes() == draw(p.after).tobytes() for p in easy)


def test_a_scene_drawn_and_described() -> None:
    scene = next(p.before for p in some() if len(p.before.items) == 2)
    image = draw(scene, 96)
    assert image.size == (96, 96)
    colours = {colour for _, colour in image.getcolors() or []}
    assert len(colours) == 1 + len({item.colour for item in scene.items})
    said = describe(scene)
    assert all(item.name in said and item.place in said for item in scene.items)
    assert describe(Scene(items=())) == ""


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="easy"):
        Difficulty.named("simple")
    with pytest.raises(UsageError, match="exploded"):
        pairs(seed=0, changes=("exploded",))
