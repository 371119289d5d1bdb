"""One sample of the suite: a picture, a question about it and the gold answer, the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modes_fx.demo.pictures import SPLIT_SEEDS, Bytes, check_split, easy_questions_of, pack
from modes_fx.demo.questions import ASK
from modes_fx.demo.scenes import draw_scene, render
from modes_fx.demo.words import TASKS


@dataclass(frozen=True)
class Sample:
    """`picture` is uint8 RGB, `[96, 96, 3]` for scenes and `[64, 64, 3]` for easy-VQA."""

    task: str
    question: str
    answer: str
    picture: Bytes


def draw_sample(split: str, task: str, index: int) -> Sample:
    """Sample `index` of `task` in `split`: a function of these three alone."""
    rng = np.random.default_rng([SPLIT_SEEDS[check_split(split)], 1000 + TASKS.index(task), index])
    if task == "easyvqa":
        images = easy_questions_of(split)
        asked = images[int(rng.integers(len(images)))]
        image, question, answer = asked[int(rng.integers(len(asked)))]
        return Sample(task, pack().questions[question], pack().answers[answer], pack().easy_images[image])
    while True:  # until the board allows the task; the rarest (sum) takes five tries on average
        scene = draw_scene(split, rng)
        if pair := ASK[task](scene, rng):
            return Sample(task, *pair, render(scene, rng))
