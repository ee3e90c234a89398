"""Pairs of drawn scenes and the sentence that says what changed: coloured shapes on a grid, made from a seed.

A pair differs in one thing: a shape was added, removed, moved, recoloured or resized; or in nothing. Distractors, a
shifted view and another light, change every pixel and are not mentioned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltahub.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CHANGES", "Difficulty", "Item", "Scene", "ScenePair", "describe", "draw", "pairs"]

SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (214, 40, 40), "green": (42, 157, 60), "blue": (38, 84, 214), "yellow": (240, 196, 25),
    "purple": (126, 52, 168), "orange": (240, 128, 28),
}  # fmt: skip
SIZES = {"small": 0.26, "large": 0.42}
"""Half the width of a shape, as a share of its cell."""
CHANGES = ("added", "removed", "moved", "recoloured", "resized", "nothing")
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "added": ("a {item} appeared at the {place}", "there is a new {item} at the {place}"),
    "removed": ("the {item} at the {place} is gone", "the {item} disappeared from the {place}"),
    "moved": ("the {item} moved from the {place} to the {other}", "the {item} at the {place} went to the {other}"),
    "recoloured": ("the {item} at the {place} became {colour}", "the {item} at the {place} turned {colour}"),
    "resized": ("the {item} at the {place} became {size}", "the {item} at the {place} is {size} now"),
    "nothing": ("nothing changed", "the two images are the same"),
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One shape.

    Attributes:
        shape: of :data:`SHAPES`.
        colour: of :data:`COLOURS`.
        size: of :data:`SIZES`.
        cell: row and column on a grid of three by three.
    """

    shape: str
    colour: str
    size: str
    cell: tuple[int, int]

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"{_ROWS[self.cell[0]]} {_COLUMNS[self.cell[1]]}"

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn.

    Attributes:
        items: at most one in each cell.
        shift: of the view, in pixels.
        light: brightness; 1 is that of the colours' table.
    """

    items: tuple[Item, ...]
    shift: tuple[int, int] = (0, 0)
    light: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard the pairs are.

    Attributes:
        items: fewest and most shapes of the first scene.
        shift: greatest shift of the second view, in pixels.
        light: greatest change of its light.
        sizes: whether shapes come in two sizes.
        templates: how many ways there are to say the same.
    """

    items: tuple[int, int] = (1, 3)
    shift: int = 0
    light: float = 0.0
    sizes: bool = False
    templates: int = 1

    @classmethod
    def named(cls, name: str) -> Difficulty:
        """``easy``, ``medium`` or ``hard``.

        Raises:
            UsageError: ``E_USAGE_DATA`` for another name.
        """
        known = {
            "easy": cls(),
            "medium": cls(items=(2, 4), shift=1, light=0.1, sizes=True),
            "hard": cls(items=(3, 5), shift=2, light=0.25, sizes=True, templates=2),
        }
        if name not in known:
            raise UsageError("E_USAGE_DATA", "no such difficulty", found=name, expected=", ".join(known))
        return known[name]


@dataclass(frozen=True, kw_only=True)
class ScenePair:
    """Two scenes and what changed.

    Attributes:
        before: the first scene.
        after: the second.
        change: of :data:`CHANGES`.
        sentence: what is to be said.
        sentences: all ways to say it.
    """

    before: Scene
    after: Scene
    change: str
    sentence: str
    sentences: tuple[str, ...]


def describe(scene: Scene) -> str:
    """A caption of one scene, its shapes from the top left to the bottom right."""
    items = sorted(scene.items, key=lambda item: item.cell)
    return " and ".join(f"a {item.name} at the {item.place}" for item in items)


def draw(scene: Scene, size: int = 48) -> Image:
    """The scene as an image, ``size`` × ``size`` pixels, RGB; the same bytes on every machine."""
    from PIL import Image, ImageDraw

    def lit(colour: tuple[int, int, int]) -> tuple[int, int, int]:
        r, g, b = (min(255, max(0, round(c * scene.light))) for c in colour)
        return r, g, b

    image = Image.new("RGB", (size, size), lit((232, 232, 226)))
    pen = ImageDraw.Draw(image)
    cell = size / 3
    for item in scene.items:
        x = (item.cell[1] + 0.5) * cell + scene.shift[0]
        y = (item.cell[0] + 0.5) * cell + scene.shift[1]
        r = SIZES[item.size] * cell
        box = [round(x - r), round(y - r), round(x + r), round(y + r)]
        fill = lit(COLOURS[item.colour])
        if item.shape == "circle":
            pen.ellipse(box, fill=fill)
        elif item.shape == "square":
            pen.rectangle(box, fill=fill)
        else:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), (round(x), box[1])], fill=fill)
    return image


def _item(dice: random.Random, cell: tuple[int, int], how: Difficulty, taken: set[str]) -> Item:
    """A shape that no other one of the scene is called like: a sentence names it without doubt."""
    names = [(s, c) for s in SHAPES for c in COLOURS if f"{c} {s}" not in taken]
    shape, colour = dice.choice(names)
    return Item(shape=shape, colour=colour, size=dice.choice(list(SIZES)) if how.sizes else "large", cell=cell)


def _scene(dice: random.Random, how: Difficulty) -> Scene:
    cells = [(row, column) for row in range(3) for column in range(3)]
    items: list[Item] = []
    for cell in dice.sample(cells, dice.randint(*how.items)):
        items.append(_item(dice, cell, how, {item.name for item in items}))
    return Scene(items=tuple(items))


def _changed(dice: random.Random, scene: Scene, change: str, how: Difficulty) -> tuple[Scene, dict[str, str]]:
    """The second scene, and the words for what changed."""
    items, names = list(scene.items), {item.name for item in scene.items}
    free = [(r, c) for r in range(3) for c in range(3) if (r, c) not in {item.cell for item in items}]
    if change == "nothing":
        return scene, {}
    if change == "added":
        new = _item(dice, dice.choice(free), how, names)
        return replace(scene, items=(*items, new)), {"item": new.name, "place": new.place}
    at = dice.randrange(len(items))
    old = items[at]
    said = {"item": old.name, "place": old.place}
    if change == "removed":
        return replace(scene, items=tuple(items[:at] + items[at + 1 :])), said
    if change == "moved":
        items[at] = replace(old, cell=dice.choice(free))
        said["other"] = items[at].place
    elif change == "recoloured":
        colour = dice.choice([c for c in COLOURS if f"{c} {old.shape}" not in names])
        items[at] = replace(old, colour=colour)
        said["colour"] = colour
    else:
        size = next(s for s in SIZES if s != old.size)
        items[at] = replace(old, size=size)
        said["size"] = size
    return replace(scene, items=tuple(items)), said


def pairs(
    *, seed: int, difficulty: Difficulty | str = "easy", changes: tuple[str, ...] = CHANGES
) -> Iterator[ScenePair]:
    """Endless pairs; the same seed gives the same ones.

    Args:
        seed: of everything that is chosen.
        difficulty: or its name.
        changes: the types that occur, equally often.

    Raises:
        UsageError: ``E_USAGE_DATA`` for an unknown difficulty or type of change.
    """
    how = Difficulty.named(difficulty) if isinstance(difficulty, str) else difficulty
    if unknown := sorted(set(changes) - set(CHANGES)):
        raise UsageError("E_USAGE_DATA", "no such change", found=", ".join(unknown), expected=", ".join(CHANGES))
    return _endless(random.Random(seed), how, changes)  # noqa: S311 - pictures, not secrets


def _endless(dice: random.Random, how: Difficulty, changes: tuple[str, ...]) -> Iterator[ScenePair]:
    while True:
        before = _scene(dice, how)
        change = dice.choice(changes)
        after, said = _changed(dice, before, change, how)
        after = replace(
            after,
            shift=(dice.randint(-how.shift, how.shift), dice.randint(-how.shift, how.shift)),
            light=1.0 + dice.uniform(-how.light, how.light),
        )
        sentences = tuple(text.format(**said) for text in TEMPLATES[change][: how.templates])
        yield ScenePair(before=before, after=after, change=change, sentence=dice.choice(sentences), sentences=sentences)
