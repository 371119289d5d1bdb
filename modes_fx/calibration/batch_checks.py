"""What can be wrong with batches and is seen without running the model on them: errors before the hours."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from modes_fx.batches import IGNORED, Batch, batch_digest, check_batches, checked_labels, no_answers
from modes_fx.errors import ModesError
from modes_fx.modality import MODALITY_NAMES, TEXT, VISION
from modes_fx.skipping import call_tokens


def look_through(
    model: nn.Module,
    batches: Iterable[Batch],
    ids: tuple[Sequence[int], Sequence[int]],
    dropped: Iterable[int | None],
    *,
    ahead: int = 1,
) -> list[str]:
    """`batch_digest` of every batch, after looking for all that would fail hours later or measure nothing.

    Args:
        ids: Visual and special token ids.
        dropped: The modalities that alpha is measured for; None: any.
        ahead: See `answer_logits`.
    Raises:
        ModesError: No batches, no answers, a batch that is empty or no dict with labels of the shape of its
            `input_ids`, ids beyond the vocabulary, inputs that are not finite, or no token of a modality.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    digests: list[str] = []
    answers = 0
    seen = torch.zeros(len(MODALITY_NAMES), dtype=torch.int64)
    for index, batch in enumerate(check_batches(batches)):
        labels = checked_labels(batch)
        if not labels.numel():
            raise ModesError(f"Batch {index} is empty: its input_ids have shape {tuple(labels.shape)}.")
        tokens = call_tokens(batch, *ids)
        modality = tokens.modality.cpu()
        seen += modality[tokens.real.cpu()].long().bincount(minlength=len(seen))
        # A placeholder may lie beyond the vocabulary, for what it stands for is put in its place.
        looked_up = batch["input_ids"].flatten().cpu()[modality != VISION]
        _check_ids(f"The labels of batch {index}", labels[labels != IGNORED], vocabulary)
        _check_ids(f"The input_ids of batch {index}", looked_up, vocabulary)
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise ModesError(f"The {name} of batch {index} contain NaN or infinity; leave the batch out.")
        answers += int((labels[:, ahead:] != IGNORED).sum())
        digests.append(batch_digest(batch))
    if not answers:
        raise ModesError(no_answers(len(digests)))
    for modality_dropped in dropped:
        if modality_dropped == TEXT and not seen[TEXT]:
            raise ModesError("No batch has a text token, so alpha for text cannot be measured.")
        if modality_dropped == VISION and ids[0] and not seen[VISION]:
            raise ModesError(
                "No batch has a picture, so alpha for vision cannot be measured; add batches with pictures, "
                'or use variant="paper", which measures one alpha for text and vision together.'
            )
    return digests


def _check_ids(what: str, ids: Tensor, vocabulary: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocabulary)]
    if len(wrong):
        raise ModesError(
            f"{what} hold {int(wrong[0])}, which is no token id: the vocabulary has {vocabulary}; use the "
            f"model's own tokenizer, and {IGNORED} for labels to ignore."
        )
