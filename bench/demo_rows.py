"""Training rows: one picture, then as many questions about it as fit a fixed number of tokens.

Each question sees the picture and itself, never the other questions, and starts at the same M-RoPE position,
so a row trains exactly what single-question prompts would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modes_fx.demo.pictures import easy_questions_of, pack
from modes_fx.demo.questions import ASK, captions
from modes_fx.demo.scenes import Scene, draw_scene, render
from modes_fx.demo.text import END, IMAGE, MERGE, PAD, PATCH, START, VISION_END, VISION_START
from modes_fx.demo.words import CELLS

# Weights of the tasks among a scene's questions: perception first, then what needs it.
PERCEPTION = dict(
    object=1.0, category=1.0, color=1.0, tone=1.2, flag=1.0, digit=1.2, read=1.2, sum=1.0,
    count=1.2, exist=1.0, spatial=1.5, row=0.8,
)  # fmt: skip
RELATIONS = dict(
    object=0.5, category=0.6, color=0.8, tone=0.9, flag=0.6, digit=1.2, read=2.2, sum=2.2,
    count=2.2, exist=1.8, spatial=2.4, row=0.6,
)  # fmt: skip
# Finding a named thing in the picture, which counting, existence and neighbours all wait for.
SEARCH = dict(
    object=0.2, category=0.3, color=0.5, tone=0.7, flag=0.2, digit=1.0, read=1.5, sum=1.0,
    count=2.5, exist=2.0, spatial=2.5, row=0.3,
)  # fmt: skip
# Counting and adding, which come last.
NUMBERS = dict(
    object=0.3, category=0.5, color=0.6, tone=0.8, flag=0.3, digit=0.8, read=1.8, sum=8.0,
    count=3.2, exist=1.5, spatial=2.2, row=0.5,
)  # fmt: skip


@dataclass
class Rows:
    """A packed training batch; the first `num_scenes` rows show scenes, the others easy-VQA pictures.

    `ids`, `labels`, `segment` [B, T] (segment 0 is the picture, -1 a pad), `positions` [3, B, T], and pixels
    `scenes` [S, 144, 192], `easy` [R, 64, 192].
    """

    ids: Tensor
    labels: Tensor
    segment: Tensor
    positions: Tensor
    scenes: Tensor
    easy: Tensor

    @property
    def mask(self) -> Tensor:
        """Who sees whom, `[B, 1, T, T]` bool: the picture or the same question, not ahead, and itself."""
        key, query = self.segment[:, None, :], self.segment[:, :, None]
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = causal & ((key == 0) | (key == query)) & (query >= 0) & (key >= 0)
        return (seen | torch.eye(length, dtype=torch.bool)).unsqueeze(1)


def cut_patches(pictures: np.ndarray) -> Tensor:
    """`[B, S, S, 3]` uint8 to `[B, patches, 3 * 8 * 8]` in -1..1, in the merge-block order of Qwen-VL."""
    batch, side, _, _ = pictures.shape
    blocks = side // (PATCH * MERGE)
    x = pictures.reshape(batch, blocks, MERGE, PATCH, blocks, MERGE, PATCH, 3)
    x = x.transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return torch.from_numpy(x.reshape(batch, -1, 3 * PATCH * PATCH).astype(np.float32) / 127.5 - 1.0)


def hint(task: str, pair: tuple[str, str], scene: Scene, spell: bool = False) -> tuple[str, str]:
    """Half of the way to a question's answer, as a question of its own that is not in the suite.

    For a sum its addends by name or, with `spell`, the sum of the same digits spelled out in the question;
    for a count and for a neighbour the cells where the thing stands, in order.
    """
    if task == "sum":
        digits = [t.attribute for t in scene.cells if t is not None and t.kind == "digit"]
        return (f"add {' '.join(digits)}", pair[1]) if spell else ("name the two digits", " ".join(digits))
    word = pair[0].split()[-1]
    cells = [name for name, thing in zip(CELLS, scene.cells, strict=True) if thing and thing.word == word]
    return f"what is the {word} at", " ".join(cells) or "nothing"


class RowMaker:
    """Draws training rows: a function of step, process and sizes alone."""

    def __init__(
        self,
        words: dict[str, int],
        length: int,
        list_share: float,
        weights: dict[str, float],
        hints: dict[str, float],
        sums: float = 0.0,
    ) -> None:
        self.words, self.length, self.list_share, self.hints = words, length, list_share, hints
        self.sums, self.spell = sums, sums > 0
        self.tasks = list(weights)
        self.cuts = np.cumsum(list(weights.values())) / max(1e-9, sum(weights.values()))

    def batch(self, step: int, rank: int, world: int, num_scenes: int, num_easy: int) -> Rows:
        """The rows of one process for one step."""
        rows, scenes, easy = [], [], []
        for i in range(num_scenes):
            rng = np.random.default_rng([1, (step * world + rank) * num_scenes + i])
            mode = "two digits" if self.sums and rng.random() < self.sums else None
            scene = draw_scene("train", rng, mode)
            scenes.append(render(scene, rng))
            rows.append(self.row(self._scene_questions(scene, rng), 6))
        rng = np.random.default_rng([55, step, rank])
        for _ in range(num_easy):
            index = int(rng.integers(len(easy_questions_of("train"))))
            asked = easy_questions_of("train")[index]
            easy.append(pack().easy_images[asked[0, 0]])
            order = rng.permutation(len(asked))
            pairs = [(pack().questions[asked[j, 1]], pack().answers[asked[j, 2]]) for j in order]
            rows.append(self.row(pairs, 4))
        ids, labels, segment, positions = (np.stack(part) for part in zip(*rows, strict=True))
        return Rows(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(segment),
            torch.from_numpy(positions).transpose(0, 1).contiguous(),
            cut_patches(np.stack(scenes)),
            cut_patches(np.stack(easy)),
        )

    def _scene_questions(self, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        if rng.random() < self.list_share:  # names and attributes of all nine cells in one dense answer
            pairs.append(("list everything", captions(scene.cells)))
        for _ in range(24):
            task = self.tasks[min(int(np.searchsorted(self.cuts, rng.random())), len(self.tasks) - 1)]
            pair = ASK[task](scene, rng)
            if pair is None:
                continue
            if task in self.hints and rng.random() < self.hints[task]:
                pair = hint(task, pair, scene, self.spell and rng.random() < 0.4)
            if pair not in pairs:
                pairs.append(pair)
        return pairs

    def row(self, pairs: list[tuple[str, str]], blocks: int) -> tuple[np.ndarray, ...]:
        """ids, labels, segment `[T]` and positions `[3, T]` of one picture and the questions that fit."""
        word, length = self.words, self.length
        tokens = blocks * blocks
        prefix = [START, word["user"], VISION_START, *[IMAGE] * tokens, VISION_END]
        ids = np.full(length, PAD, np.int64)
        labels = np.full(length, -100, np.int64)
        segment = np.full(length, -1, np.int64)
        positions = np.zeros((3, length), np.int64)
        used = len(prefix)
        ids[:used], segment[:used] = prefix, 0
        positions[:, :3] = np.arange(3)
        positions[0, 3 : 3 + tokens] = 3
        positions[1, 3 : 3 + tokens] = 3 + np.repeat(np.arange(blocks), blocks)
        positions[2, 3 : 3 + tokens] = 3 + np.tile(np.arange(blocks), blocks)
        positions[:, used - 1] = 3 + blocks
        number = 0
        for question, answer in pairs:
            asked = [*(word[w] for w in question.split()), END, START, word["assistant"]]
            told = [*(word[w] for w in answer.split()), END]
            total = len(asked) + len(told)
            if used + total > length:
                continue
            number += 1
            span = slice(used, used + total)
            ids[span], segment[span] = asked + told, number
            positions[:, span] = 4 + blocks + np.arange(total)
            # HF shifts labels by one; here a label sits on the token that predicts it.
            labels[used + len(asked) - 1 : used + total - 1] = told
            used += total
        return ids, labels, segment, positions
