"""The picture pack: 282 emoji drawings, 10,000 handwritten digits and the easy-VQA images, and their splits.

`pictures.npz` holds uint8 arrays: `drawings` [2, 141, 48, 48, 4] RGBA (Noto, Twemoji), `digits` [N, 28, 28],
`digit_labels` [N], `easy_images` [5000, 64, 64, 3] (4,000 of the official train split, then the 1,000 of the
test split) and `easy_questions` [M, 3] int16 = (image, question, answer); `pictures.json` holds the texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ASSETS = Path(__file__).parent / "assets"

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# First number of every random generator of a split: two splits never draw the same scene.
SPLIT_SEEDS = {"train": 1, "calibration": 2, "validation": 3, "test": 4}
# Handwritten digits and easy-VQA images by position (the digits after one fixed shuffle): disjoint by split.
DIGIT_RANGES = {
    "train": (0, 8000),
    "calibration": (8000, 8250),
    "validation": (8250, 8500),
    "test": (8500, 10000),
}
EASY_RANGES = {
    "train": (0, 3600),
    "calibration": (3600, 3800),
    "validation": (3800, 4000),
    "test": (4000, 5000),
}

# A drawing is shown in one of these fixed poses: degrees, then the side in pixels.
POSES = tuple((-12.0 + 24.0 * i / 17, 23 + (i * 5) % 9) for i in range(18))


@dataclass(frozen=True)
class Pack:
    """The whole pack in memory (about 72 MB)."""

    drawings: Bytes
    digits: Bytes
    digit_labels: Bytes
    easy_images: Bytes
    easy_questions: NDArray[np.int16]
    questions: list[str]
    answers: list[str]


@lru_cache(maxsize=1)
def pack(directory: Path = ASSETS) -> Pack:
    """The picture pack, read once."""
    texts = json.loads((directory / "pictures.json").read_text())
    with np.load(directory / "pictures.npz", allow_pickle=False) as arrays:
        return Pack(**{name: arrays[name] for name in arrays.files}, **texts)


def check_split(split: str) -> str:
    """`split` itself, or a ValueError that names the choices."""
    if split not in SPLIT_SEEDS:
        raise ValueError(f"split must be one of {', '.join(SPLIT_SEEDS)}, not {split!r}")
    return split


@cache
def digits_of(split: str, value: int) -> NDArray[np.int64]:
    """Positions in the pack of the handwritten digits `value` that `split` may show."""
    first, last = DIGIT_RANGES[check_split(split)]
    return first + np.flatnonzero(pack().digit_labels[first:last] == value)


@cache
def easy_questions_of(split: str) -> list[NDArray[np.int16]]:
    """Per easy-VQA image of `split`: its rows of `easy_questions`, `[n, 3]`."""
    first, last = EASY_RANGES[check_split(split)]
    rows = pack().easy_questions
    edges = np.searchsorted(rows[:, 0], np.arange(first, last + 1))
    return [rows[a:b] for a, b in pairwise(edges)]


@cache
def sprite(style: int, picture: int, pose: int) -> tuple[Floats, Floats]:
    """A drawing in a fixed pose: colour times alpha `[s, s, 3]` and alpha `[s, s, 1]`, both in 0..1."""
    angle, side = POSES[pose]
    image = Image.fromarray(pack().drawings[style, picture])
    # Both steps weigh colours by alpha, so the hidden colour of clear pixels does not bleed into the edges.
    image = image.rotate(angle, Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BILINEAR)
    posed: Floats = np.asarray(image, dtype=np.float32) / np.float32(255)
    return posed[..., :3] * posed[..., 3:], posed[..., 3:]


@lru_cache(maxsize=30_000)
def stroke(position: int, side: int) -> Floats:
    """Ink of one handwritten digit, `[side, side, 1]` in 0..1."""
    image = Image.fromarray(pack().digits[position]).resize((side, side), Image.Resampling.BILINEAR)
    ink: Floats = np.asarray(image, dtype=np.float32)[..., None] / np.float32(255)
    return ink
