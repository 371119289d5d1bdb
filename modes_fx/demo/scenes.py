"""Scenes: a 3x3 board of real pictures, drawn at random and rendered to 96x96 RGB.

Four scene modes make every task possible often enough: exactly two digits (sum), a row of digits (read), a
noun several times (count), or free. The board is then filled to 4-7 things.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modes_fx.demo.pictures import POSES, Bytes, check_split, digits_of, sprite, stroke
from modes_fx.demo.words import BANNERS, COLORED, DIGITS, GESTURES, OBJECTS, PICTURES, Thing

SIDE = 96
CELL = 32
MODES = ("two digits", "digit row", "repeated", "free")
MODE_CUTS = np.cumsum([0.22, 0.18, 0.35, 0.25])
FILL = (OBJECTS, COLORED, BANNERS, GESTURES, DIGITS)
FILL_CUTS = np.cumsum([0.50, 0.18, 0.12, 0.11, 0.09])
PICTURE_INDEX = {thing.code: index for index, thing in enumerate(PICTURES)}


@dataclass
class Scene:
    """A board of nine cells in reading order; an empty cell is None."""

    split: str
    cells: list[Thing | None] = field(default_factory=lambda: [None] * 9)

    @property
    def filled(self) -> list[int]:
        return [cell for cell, thing in enumerate(self.cells) if thing is not None]


def draw_scene(split: str, rng: np.random.Generator, mode: str | None = None) -> Scene:
    """A random scene; `mode` forces one of `MODES`. Nothing is rendered yet."""
    scene = Scene(check_split(split))
    mode = mode or MODES[_pick(MODE_CUTS, rng)]
    order = [int(cell) for cell in rng.permutation(9)]
    wanted = int(rng.integers(4, 8))
    if mode == "two digits":
        _place(scene, order[:2], [DIGITS[int(value)] for value in rng.integers(0, 10, 2)])
    elif mode == "digit row":
        row = int(rng.integers(3))
        columns = sorted(int(column) for column in rng.permutation(3)[: int(rng.integers(2, 4))])
        values = rng.integers(0, 10, len(columns))
        _place(scene, [3 * row + column for column in columns], [DIGITS[int(value)] for value in values])
    elif mode == "repeated":
        family = OBJECTS if rng.random() < 0.75 else COLORED
        thing = family[int(rng.integers(len(family)))]
        alike = [other for other in family if other.word == thing.word]
        copies = int(rng.integers(2, 5))
        _place(scene, order[:copies], [alike[int(i)] for i in rng.integers(0, len(alike), copies)])
    for cell in order:
        if len(scene.filled) >= wanted:
            break
        if scene.cells[cell] is None:
            scene.cells[cell] = _filler(rng, digits=mode != "two digits")
    return scene


def _pick(cuts: np.ndarray, rng: np.random.Generator) -> int:
    return min(int(np.searchsorted(cuts, rng.random(), side="right")), len(cuts) - 1)


def _place(scene: Scene, cells: list[int], things: list[Thing]) -> None:
    for cell, thing in zip(cells, things, strict=True):
        scene.cells[cell] = thing


def _filler(rng: np.random.Generator, digits: bool) -> Thing:
    family = FILL[_pick(FILL_CUTS, rng)]
    if family is DIGITS and not digits:
        family = OBJECTS
    if family is COLORED:  # by shape first: only four books have a colour, nine hearts
        shape = ("heart", "circle", "square", "book")[int(rng.integers(4))]
        family = tuple(thing for thing in COLORED if thing.word == shape)
    return family[int(rng.integers(len(family)))]


def render(scene: Scene, rng: np.random.Generator) -> Bytes:
    """The scene as `[96, 96, 3]` uint8: tinted gradient, posed pictures at random offsets, a little noise."""
    corners = 0.35 + 0.6 * rng.random((2, 2, 3), dtype=np.float32)
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)
    sides = corners[0] * (1 - ramp[:, None, None]) + corners[1] * ramp[:, None, None]  # [96, 2, 3]
    canvas = sides[:, :1] * (1 - ramp[None, :, None]) + sides[:, 1:] * ramp[None, :, None]
    for cell in scene.filled:
        thing = scene.cells[cell]
        assert thing is not None
        top, left = CELL * (cell // 3), CELL * (cell % 3)
        if thing.kind == "digit":
            choices = digits_of(scene.split, int(thing.attribute))
            alpha = stroke(int(choices[int(rng.integers(len(choices)))]), int(rng.integers(24, 32)))
            ink: np.ndarray | float = alpha * (0.97 if rng.random() < 0.35 else 0.03)
        else:
            pose = int(rng.integers(len(POSES)))
            ink, alpha = sprite(int(rng.integers(2)), PICTURE_INDEX[thing.code], pose)
        side = alpha.shape[0]
        y = top + int(rng.integers(CELL - side + 1))
        x = left + int(rng.integers(CELL - side + 1))
        window = canvas[y : y + side, x : x + side]
        window *= 1 - alpha
        window += ink
    canvas += 0.02 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
