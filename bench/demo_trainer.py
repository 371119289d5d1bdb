"""The training loop of the demo model: schedules over steps, checkpoints, validation."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from demo_model import VisionGrid, new_model, vision_features, watch_routers
from demo_optim import Optimizer
from demo_rows import NUMBERS, PERCEPTION, RELATIONS, SEARCH, RowMaker, Rows, cut_patches
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modes_fx.demo.pictures import pack
from modes_fx.demo.samples import Sample, draw_sample
from modes_fx.demo.text import IMAGE, MERGE, PATCH, SPECIAL
from modes_fx.demo.words import TASKS, vocabulary


@dataclass(frozen=True)
class Phase:
    """A stretch of the run: what a batch holds, per process and step, and which penalties count."""

    steps: int
    rate: float  # learning rate
    scenes: int  # rows with a scene
    easy: int  # rows with an easy-VQA picture
    length: int  # tokens a row
    list_share: float  # share of scenes whose nine cells are all listed in one dense answer
    weights: dict[str, float]  # of the tasks among a scene's questions
    hints: dict[str, float]  # share of a task's questions that ask for half of the way instead
    sums: float = 0.0  # share of scenes made to hold exactly two digits, on top of the usual ones
    flat: float = 0.0  # weight of the penalty on peaked routers


# Listing all cells teaches perception fast, with big batches; relations need many small steps, and hints.
# Each phase was chosen after a look at validation accuracy in the one before it.
PHASES = (
    Phase(997, 3e-3, 14, 3, 112, 1.0, PERCEPTION, {"sum": 0.5}),
    Phase(280, 3e-3, 9, 2, 128, 0.3, RELATIONS, {"sum": 0.5}),
    Phase(491, 3e-3, 9, 2, 128, 0.3, RELATIONS, {"sum": 0.3, "count": 0.4, "spatial": 0.4}),
    Phase(529, 2e-3, 9, 2, 128, 0.1, SEARCH, {"sum": 0.4, "count": 0.5, "spatial": 0.7}),
    Phase(600, 2e-3, 9, 2, 128, 0.1, NUMBERS, {"sum": 0.35, "count": 0.2, "spatial": 0.2}, 0.35),
    Phase(1100, 2e-3, 9, 2, 128, 0.1, NUMBERS, {"sum": 0.2, "count": 0.1, "spatial": 0.1}, 0.25, flat=1.0),
)


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on, besides the library versions; recorded in metrics.json."""

    phases: tuple[Phase, ...] = PHASES
    world: int = 2
    seed: int = 0
    warmup: int = 100
    decay: int = 1400  # the last steps, over which the learning rate falls to 2%
    balance: float = 0.01  # weight of the load-balance loss
    hinge: float = 0.20  # sum of squared routing weights that costs nothing; 1/8 would be quite flat

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> Phase:
        """The phase that `step` belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)

    def rate(self, step: int) -> float:
        """Learning rate: warm-up, the phase's own, and at the end linear to 2% of it."""
        left = (self.steps - step) / self.decay
        return self.phase(step).rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * min(1.0, left))

    def scaled(self, scale: float) -> Recipe:
        """The same recipe with `scale` times the steps."""
        phases = tuple(replace(phase, steps=max(1, round(phase.steps * scale))) for phase in self.phases)
        return replace(self, phases=phases, decay=max(1, round(self.decay * scale)))


class Trainer:
    """One process's model, optimizer and data; `seconds` counts training time over all resumed runs."""

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self.recipe, self.rank = recipe, rank
        words = [*SPECIAL, *vocabulary((*pack().questions, *pack().answers))]
        self.words = {word: index for index, word in enumerate(words)}
        torch.manual_seed(recipe.seed)
        self.build(len(words))
        self.optimizer = Optimizer(self.model.named_parameters())
        self.step, self.seconds = 0, 0.0

    def build(self, vocab_size: int) -> None:
        """Set `model` and `routing`; another family overrides this and `logits`."""
        self.model: Any = new_model(vocab_size)
        self.routing = watch_routers(self.model)
        self.grids = VisionGrid(self.model, 96), VisionGrid(self.model, 64)

    def logits(self, rows: Rows) -> Tensor:
        """Logits of the packed rows at the positions that have a label, `[labels, V]`."""
        self.routing.layers.clear()
        parts = [
            vision_features(self.model, pixels, grid)
            for pixels, grid in zip((rows.scenes, rows.easy), self.grids, strict=True)
            if len(pixels)
        ]
        features, deep = (torch.cat(part) for part in zip(*parts, strict=True))
        visual = rows.ids == IMAGE
        embeds = self.model.get_input_embeddings()(rows.ids).masked_scatter(visual.unsqueeze(-1), features)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=rows.mask,
            position_ids=rows.positions,
            visual_pos_masks=visual,
            deepstack_visual_embeds=[deep],
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[rows.labels >= 0])

    def train_step(self) -> dict[str, float]:
        """One update; returns the figures to log."""
        recipe, began = self.recipe, time.time()
        phase = recipe.phase(self.step)
        maker = RowMaker(self.words, phase.length, phase.list_share, phase.weights, phase.hints, phase.sums)
        rows = maker.batch(self.step, self.rank, recipe.world, phase.scenes, phase.easy)
        logits = self.logits(rows)
        gold = rows.labels[rows.labels >= 0]
        loss = F.cross_entropy(logits, gold)
        real = (rows.segment >= 0).flatten()
        balance = self.routing.balance_loss(real)
        peaks = self.routing.peak_loss(real, recipe.hinge)
        (loss + recipe.balance * balance + phase.flat * peaks).backward()
        norm = self.optimizer.step(self.step, recipe.rate(self.step))
        self.step += 1
        self.seconds += time.time() - began
        right = (logits.argmax(-1) == gold).float().mean()
        figures = {"ce": loss, "acc": right, "balance": balance, "peaks": peaks}
        return {name: float(figure.detach()) for name, figure in figures.items()} | {"norm": norm}

    @torch.no_grad()
    def evaluate(self, split: str, count: int) -> dict[str, float]:
        """Exact match per task on the first `count` samples of each, shared among the processes."""
        right = torch.zeros(len(TASKS))
        for number, task in enumerate(TASKS):
            indices = range(self.rank, count, self.recipe.world)
            for start in range(0, len(indices), 32):
                samples = [draw_sample(split, task, index) for index in indices[start : start + 32]]
                right[number] += self._count_right(samples)
        if dist.is_initialized():
            dist.all_reduce(right)
        scores = dict(zip(TASKS, (right / count).tolist(), strict=True))
        return scores | {"mean": float(right.mean() / count)}

    def _count_right(self, samples: list[Sample]) -> int:
        """How many of these samples, all of one picture size, are answered exactly."""
        maker = RowMaker(self.words, 64, 0.0, {}, {})
        blocks = samples[0].picture.shape[0] // (PATCH * MERGE)
        parts = [maker.row([(sample.question, sample.answer)], blocks) for sample in samples]
        ids, labels, segment, positions = (torch.from_numpy(np.stack(p)) for p in zip(*parts, strict=True))
        pixels = cut_patches(np.stack([sample.picture for sample in samples]))
        scenes, easy = (pixels[:0], pixels) if blocks == 4 else (pixels, pixels[:0])
        rows = Rows(ids, labels, segment, positions.transpose(0, 1), scenes, easy)
        told = labels >= 0
        owner = torch.arange(len(samples)).unsqueeze(1).expand_as(labels)[told]
        wrong = torch.zeros(len(samples)).index_add_(
            0, owner, (self.logits(rows).argmax(-1) != labels[told]).float()
        )
        return int((wrong == 0).sum())

    def save(self, path: Path) -> None:
        """Everything a resumed run needs, in one safetensors file, replaced at once."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state.items()}
        metadata = {"step": str(self.step), "seconds": f"{self.seconds:.0f}"}
        save_file(tensors, path.with_suffix(".tmp"), metadata=metadata)
        os.replace(path.with_suffix(".tmp"), path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go on from `save`."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata.get("seconds", 0))
        tensors = load_file(path)
        for name, p in self.model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
        for name, t in self.optimizer.state.items():
            t.copy_(tensors[f"optimizer.{name}"])
