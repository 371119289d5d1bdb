"""Batches of the suite as model inputs, one question at a time for generation, and the metric."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from modes_fx.demo.pictures import check_split
from modes_fx.demo.samples import Sample, draw_sample
from modes_fx.demo.text import END, PAD, SPECIAL, prompt_text
from modes_fx.demo.words import TASKS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from modes_fx.demo.processor import PictureProcessor

IGNORED = -100  # the label of a token that carries no loss
SEED_STRIDE = 1_000_000  # samples of two seeds never meet


class Batch(dict[str, Any]):
    """Keyword inputs of the model, `labels`, and `task`, the name of each row's task (a list of B texts).

    `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` are `[B, L]` int64, padded on the right;
    `pixel_values` is `[B * patches, 384]` float32 and `image_grid_thw` `[B, 3]`. Labels are -100 except on
    the answer and its `<|im_end|>`. `prompts` (the questions) and `answers` hold one text a row.
    """

    def __init__(self, inputs: dict[str, Tensor], samples: Sequence[Sample]) -> None:
        super().__init__(inputs, task=[sample.task for sample in samples])
        self.prompts = [sample.question for sample in samples]
        self.answers = [sample.answer for sample in samples]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with: neither the labels nor the tasks."""
        return {name: tensor for name, tensor in self.items() if name not in ("labels", "task")}


@lru_cache(maxsize=1)
def shared_processor() -> PictureProcessor:
    """The shipped processor, built once."""
    from modes_fx.demo.processor import load_processor

    return load_processor()


def batches(split: str, n: int, *, batch_size: int = 16, seed: int = 0, grey: bool = False) -> list[Batch]:
    """The first `n` samples of a split, the 13 tasks in turn, as a list of batches.

    Args:
        split: `calibration`, `test`, `validation` or `train`; no two share a scene, digit or easy-VQA image.
        n: Number of samples; a multiple of 13 gives every task equally many.
        batch_size: Largest number of rows.
        seed: Another seed gives other samples of the same split.
        grey: Replace every picture by uniform grey, to see what the questions alone give away.

    Returns:
        Batches of one padded length and each of one picture size (scenes first, then easy-VQA). The same
        arguments give the same batches.
    """
    check_split(split)
    samples = [draw_sample(split, *_place(i, seed)) for i in range(n)]
    processor = shared_processor()
    by_size: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_size[sample.picture.shape[0]].append(sample)
    groups = [
        group[start : start + batch_size]
        for _, group in sorted(by_size.items(), reverse=True)
        for start in range(0, len(group), batch_size)
    ]
    encoded = [_encode(group, processor, grey) for group in groups]
    length = max((inputs["input_ids"].shape[1] for inputs in encoded), default=0)
    return [Batch(_pad(inputs, length), group) for inputs, group in zip(encoded, groups, strict=True)]


def question(split: str, index: int, *, picture: bool = True, seed: int = 0) -> tuple[dict[str, Tensor], str]:
    """Inputs for `model.generate` of one sample, without its answer, and the answer's text.

    Sample `index` is sample `index` of `batches(split, n, seed=seed)`, before those are grouped by
    picture size; so its task is `TASKS[index % 13]`. With `picture=False` the question stands alone, as a
    text-only prompt.
    """
    sample = draw_sample(check_split(split), *_place(index, seed))
    text = prompt_text(sample.question, picture)
    images = [sample.picture] if picture else None
    inputs = shared_processor()(text=[text], images=images, return_tensors="pt")
    return dict(inputs), sample.answer


def accuracy(model: PreTrainedModel | Any, batches: Iterable[Batch]) -> dict[str, float]:
    """Exact match per task, and their unweighted mean as `mean`, by one forward a batch.

    A greedy answer is right if and only if every gold token, the end token included, is the argmax given the
    gold tokens before it; so this equals the verdict of greedy generation. `model` may be compiled.
    """
    import torch

    right: dict[str, list[bool]] = defaultdict(list)
    device = next(model.parameters()).device
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with torch.no_grad():
            chosen = model(**inputs).logits[:, :-1].argmax(-1).cpu()
        gold = batch["labels"][:, 1:]
        for task, verdict in zip(batch["task"], ((chosen == gold) | (gold == IGNORED)).all(1), strict=True):
            right[task].append(bool(verdict))
    scores = {task: float(np.mean(right[task])) for task in TASKS if task in right}
    return scores | {"mean": float(np.mean(list(scores.values())))}


def _place(index: int, seed: int) -> tuple[str, int]:
    return TASKS[index % len(TASKS)], seed * SEED_STRIDE + index // len(TASKS)


def _encode(samples: list[Sample], processor: PictureProcessor, grey: bool) -> dict[str, Tensor]:
    prompts = [prompt_text(sample.question) for sample in samples]
    texts = [f"{text} {sample.answer} {SPECIAL[END]}" for text, sample in zip(prompts, samples, strict=True)]
    pictures = [np.full_like(s.picture, 128) if grey else s.picture for s in samples]
    inputs = dict(processor(text=texts, images=pictures, padding=True, return_tensors="pt"))
    labels = inputs["input_ids"].clone()
    for row, sample in enumerate(samples):
        end = int(inputs["attention_mask"][row].sum())
        labels[row, : end - len(sample.answer.split()) - 1] = IGNORED
        labels[row, end:] = IGNORED
    return inputs | {"labels": labels}


def _pad(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Every `[B, L]` tensor padded on the right to `length`, as the tokenizer pads."""
    import torch.nn.functional as F

    fill = {"input_ids": PAD, "attention_mask": 0, "mm_token_type_ids": 0, "labels": IGNORED}
    padded = {
        name: F.pad(inputs[name], (0, length - inputs[name].shape[1]), value=value)
        for name, value in fill.items()
    }
    return inputs | padded
