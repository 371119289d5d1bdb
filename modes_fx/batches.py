"""Batches of model inputs and labels: what is in them, known before any model runs on them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modes_fx.errors import ModesError
from modes_fx.modality import MODALITY_NAMES, VISION
from modes_fx.skipping import DECODE, NO_PHASE, PREFILL, call_tokens

Batch = Mapping[str, Any]
IGNORED = -100
# What a batch says about its rows; the model is not called with it.
NOT_INPUTS = ("labels", "task")


@dataclass(frozen=True)
class Survey:
    """What batches hold, known before any model runs on them.

    Attributes:
        digests: `batch_digest` of each batch.
        answer_tokens: Per sample, labels that are not -100 and have a token before them.
        tasks: Per sample, the name of its task, or "".
        tokens: Real tokens of each modality.
        decode_tokens: Real tokens of the phase DECODE that can be skipped.
    """

    digests: tuple[str, ...]
    answer_tokens: tuple[int, ...]
    tasks: tuple[str, ...]
    tokens: tuple[int, int, int]
    decode_tokens: int

    @property
    def num_batches(self) -> int:
        return len(self.digests)

    @property
    def num_samples(self) -> int:
        return len(self.answer_tokens)

    @property
    def num_answer_tokens(self) -> int:
        return sum(self.answer_tokens)


def survey(
    batches: Iterable[Batch],
    visual_token_ids: Sequence[int],
    special_token_ids: Sequence[int],
    vocab_size: int,
    *,
    ahead: int = 1,
) -> Survey:
    """Look through batches for all that would fail hours later or measure nothing, and count what they hold.

    Args:
        ahead: How many tokens of a row come before the first answer token that counts; see `answer_logits`.
    Raises:
        ModesError: No batches or no answers; a batch that is empty, or no dict with labels of the shape of
            its `input_ids`; ids beyond the vocabulary; inputs that are not finite; task names that do not fit
            the rows.
    """
    digests: list[str] = []
    answers: list[int] = []
    tasks: list[str] = []
    tokens = torch.zeros(len(MODALITY_NAMES), dtype=torch.int64)
    decode = 0
    for index, batch in enumerate(check_batches(batches)):
        labels = checked_labels(batch)
        if not labels.numel():
            raise ModesError(f"Batch {index} is empty: its input_ids have shape {tuple(labels.shape)}.")
        called = call_tokens(batch, visual_token_ids, special_token_ids)
        modality, real = called.modality.cpu(), called.real.cpu()
        # A placeholder may lie beyond the vocabulary, for what it stands for is put in its place.
        looked_up = batch["input_ids"].flatten().cpu()[modality != VISION]
        _check_ids(f"The labels of batch {index}", labels[labels != IGNORED], vocab_size)
        _check_ids(f"The input_ids of batch {index}", looked_up, vocab_size)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModesError(f"The {name} of batch {index} contain NaN or infinity; leave the batch out.")
        answers += (labels[:, ahead:] != IGNORED).sum(1).tolist()
        tasks += _task_names(batch, len(labels))
        tokens += modality[real].long().bincount(minlength=len(MODALITY_NAMES))
        in_decode = (token_phase(labels).flatten() == DECODE) & real
        decode += int((modality[in_decode] <= VISION).sum())
        digests.append(batch_digest(batch))
    if not sum(answers):
        raise ModesError(no_answers(len(digests)))
    text, vision, other = tokens.tolist()
    return Survey(tuple(digests), tuple(answers), tuple(tasks), (text, vision, other), decode)


def _check_ids(what: str, ids: Tensor, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise ModesError(
            f"{what} hold {int(wrong[0])}, which is no token id: the vocabulary has {vocab_size}; use the "
            f"model's own tokenizer, and {IGNORED} for labels to ignore."
        )


def token_phase(labels: Tensor) -> Tensor:
    """Where generation would compute each token: `[B, S]` uint8, PREFILL, DECODE or NO_PHASE.

    The answer is generated token by token, so each of its tokens but the last is an input of its own
    (DECODE); the last one ends the answer, and nothing is computed from it or after it (NO_PHASE). All else
    is the prompt, also between two answers of a conversation, where it holds the end of the first.

    Args:
        labels: `[B, S]`, -100 everywhere but at the answer.
    """
    answer = labels != IGNORED
    following = torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], 1)
    phase = torch.where(answer & following, DECODE, PREFILL)
    # From the last answer token of the row on.
    later = following.flip(1).cumsum(1).flip(1) > 0
    phase = torch.where(~later & answer.any(1, keepdim=True), NO_PHASE, phase)
    return phase.to(torch.uint8)


def _task_names(batch: Batch, num_rows: int) -> list[str]:
    task = batch.get("task", "")
    names = [task] * num_rows if isinstance(task, str) else list(task)
    if len(names) != num_rows or not all(isinstance(name, str) for name in names):
        raise ModesError(
            f"task must be one name, or a list of one name for each of the {num_rows} rows, got {task!r}."
        )
    return names


def check_batches(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Refuse what cannot be run over again."""
    if isinstance(batches, Iterator):
        raise ModesError(
            f"batches must be run over several times, and a {type(batches).__name__} is exhausted after the "
            "first; pass a list of dicts, or an object whose __iter__ starts again."
        )
    if isinstance(batches, Mapping):
        raise ModesError("batches must be an iterable of dicts, got one dict; wrap it in a list.")
    return batches


def changed(index: int, expected: int) -> str:
    return (
        f"The batches differ between two passes: the first gave {expected}, and batch {index} is missing or "
        "not what it was; pass batches that give the same dicts each time they are iterated over."
    )


def no_answers(num_batches: int) -> str:
    if not num_batches:
        return "batches is empty; pass at least one dict of model inputs with labels."
    return "No answer token in any batch: all labels are -100; put the answer's token ids into labels."


def checked_labels(batch: Batch) -> Tensor:
    """The labels of a batch, `[B, S]`, on the CPU; refuses what is not a batch."""
    if not isinstance(batch, Mapping):
        raise ModesError(f"Each batch must be a dict of model inputs and labels, got {type(batch).__name__}.")
    if batch.get("labels") is None:
        raise ModesError("A batch has no labels; add labels [B, S], -100 everywhere but at the answer.")
    labels = torch.as_tensor(batch["labels"]).cpu()
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or labels.shape != ids.shape:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
        raise ModesError(f"labels must have the shape of input_ids, got {tuple(labels.shape)} and {shape}.")
    return labels


def batch_digest(batch: Batch) -> str:
    """sha256 of a batch's tensors, so that a resumed run can tell other data."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        digest.update(key.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous()
            digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            digest.update(flat.view(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
