"""Questions: for each task, a random question about a scene and its answer, or None if the scene has none.

Numbers are spelled digit by digit, and every answer is made of words of the vocabulary. easy-VQA brings its
own published questions, so it has no function here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from modes_fx.demo.scenes import Scene
from modes_fx.demo.words import CATEGORY, CELLS, COUNTABLE, DIRECTIONS, ROWS, Thing

Rng = np.random.Generator
Pair = tuple[str, str]
T = TypeVar("T")


def _things(scene: Scene, kind: str) -> list[tuple[int, Thing]]:
    pairs = ((cell, thing) for cell, thing in enumerate(scene.cells) if thing is not None)
    return [(cell, thing) for cell, thing in pairs if thing.kind == kind]


def _words(scene: Scene) -> list[str]:
    return [thing.word for thing in scene.cells if thing is not None]


def _choose(options: Sequence[T], rng: Rng) -> T:
    return options[int(rng.integers(len(options)))]


def _object(scene: Scene, rng: Rng) -> Pair | None:
    empty = rng.random() < 0.12
    cell = _choose([c for c in range(9) if (scene.cells[c] is None) == empty], rng)
    thing = scene.cells[cell]
    return f"what is at {CELLS[cell]}", "nothing" if thing is None else thing.word


def _category(scene: Scene, rng: Rng) -> Pair | None:
    if not (objects := _things(scene, "object")):
        return None
    cell, thing = _choose(objects, rng)
    return f"what kind is at {CELLS[cell]}", thing.category


def _attribute(scene: Scene, rng: Rng, kind: str) -> Pair | None:
    if not (things := _things(scene, kind)):
        return None
    cell, thing = _choose(things, rng)
    alone = sum(other.word == thing.word for _, other in things) == 1
    where = "" if alone and rng.random() < 0.5 else f" at {CELLS[cell]}"
    return f"what {kind if kind == 'color' else 'tone'} is the {thing.word}{where}", thing.attribute


def _color(scene: Scene, rng: Rng) -> Pair | None:
    return _attribute(scene, rng, "color")


def _tone(scene: Scene, rng: Rng) -> Pair | None:
    return _attribute(scene, rng, "hand")


def _flag(scene: Scene, rng: Rng) -> Pair | None:
    if not (flags := _things(scene, "flag")):
        return None
    cell, thing = _choose(flags, rng)
    return f"which country is at {CELLS[cell]}", thing.attribute


def _digit(scene: Scene, rng: Rng) -> Pair | None:
    if not (digits := _things(scene, "digit")):
        return None
    cell, thing = _choose(digits, rng)
    return f"which digit is at {CELLS[cell]}", thing.attribute


def _read(scene: Scene, rng: Rng) -> Pair | None:
    digits = _things(scene, "digit")
    rows = [[thing.attribute for cell, thing in digits if cell // 3 == row] for row in range(3)]
    if not (readable := [row for row in range(3) if len(rows[row]) >= 2]):
        return None
    row = _choose(readable, rng)
    return f"read the {ROWS[row]} digits", " ".join(rows[row])


def _sum(scene: Scene, rng: Rng) -> Pair | None:
    digits = _things(scene, "digit")
    if len(digits) != 2:
        return None
    return "add the two digits", " ".join(str(sum(int(thing.attribute) for _, thing in digits)))


def _count(scene: Scene, rng: Rng) -> Pair | None:
    words = _words(scene)
    repeated = sorted({word for word in words if words.count(word) > 1})
    draw = rng.random()
    if draw < 0.15:
        word = _choose([word for word in COUNTABLE if word not in words], rng)
    elif repeated and draw < 0.8:
        word = _choose(repeated, rng)
    else:
        word = _choose(words, rng)
    return f"how many {word}", str(words.count(word))


def _exist(scene: Scene, rng: Rng) -> Pair | None:
    words = _words(scene)
    nouns = [word for word in words if word in CATEGORY]
    if rng.random() < 0.5:
        return f"is there a {_choose(nouns or words, rng)}", "yes"
    kinds = {CATEGORY[word] for word in nouns}
    near = [word for word, kind in CATEGORY.items() if kind in kinds and word not in words]
    # Half of the negatives come from a category that is in the picture, as hallucination benchmarks do.
    options = near if near and rng.random() < 0.5 else [word for word in CATEGORY if word not in words]
    return f"is there a {_choose(options, rng)}", "no"


def _spatial(scene: Scene, rng: Rng) -> Pair | None:
    words = _words(scene)
    options: tuple[list[Pair], list[Pair]] = ([], [])
    for cell, thing in enumerate(scene.cells):
        if thing is None or words.count(thing.word) > 1:
            continue
        for direction, (down, across) in DIRECTIONS.items():
            row, column = cell // 3 + down, cell % 3 + across
            if 0 <= row < 3 and 0 <= column < 3:
                neighbour = scene.cells[3 * row + column]
                answer = "nothing" if neighbour is None else neighbour.word
                options[neighbour is None].append((f"what is {direction} the {thing.word}", answer))
    empty = rng.random() < 0.22
    chosen = options[empty] or options[not empty]
    return _choose(chosen, rng) if chosen else None


def _row(scene: Scene, rng: Rng) -> Pair | None:
    row = int(rng.integers(3))
    return f"list the {ROWS[row]} row", captions(scene.cells[3 * row : 3 * row + 3])


def captions(cells: list[Thing | None]) -> str:
    """What the cells hold, in order, as one answer."""
    return " ".join("nothing" if thing is None else thing.caption for thing in cells)


ASK: dict[str, Callable[[Scene, Rng], Pair | None]] = {
    "object": _object,
    "category": _category,
    "color": _color,
    "tone": _tone,
    "flag": _flag,
    "digit": _digit,
    "read": _read,
    "sum": _sum,
    "count": _count,
    "exist": _exist,
    "spatial": _spatial,
    "row": _row,
}
