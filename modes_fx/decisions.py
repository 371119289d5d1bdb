"""What a graph computes beside the op where thresholds are tensors, or where kept pairs are counted.

Plain functions of tensors, which the compiler traces into graphs: nothing here looks at a value, so that a
threshold may change between two calls of one compiled graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modes_fx.kernels.masked_moe import keep_mask
from modes_fx.modality import OTHER, TEXT, VISION

# Constants of the op under which `decide`'s numbers, as scores, keep and drop what was decided.
DECIDED = {"alpha_text": 1.0, "alpha_vision": 1.0, "tau_text": 0.0, "tau_vision": 0.0}


def decide(
    scores: Tensor, modality: Tensor | None, thresholds: Tensor, alpha_text: float, alpha_vision: float
) -> Tensor:
    """The rule with thresholds that are read now: 0 for a pair that is kept, -1 for one that is dropped.

    The decision is made here and not by scaling what the op compares, so that it is that of the same
    thresholds as constants to the bit, and so that thresholds of 0 and infinity can be left again.

    Args:
        scores, modality, alpha_text, alpha_vision: See `keep_mask`.
        thresholds: tau of text and of vision, `[2]`, float32.
    Returns:
        `[T, K]`, float32: scores for the op with the constants `DECIDED`.
    """
    keep = keep_mask(scores, modality, alpha_text, alpha_vision, thresholds[0], thresholds[1])
    return keep.float() - 1


def count_pairs(keeps: Sequence[Tensor | None], modality: Tensor, top_k: Sequence[int]) -> Tensor:
    """Pairs and dropped pairs of each block of a graph, by modality.

    Args:
        keeps: Which pairs are kept, `[T, M]`, bool, M <= the block's top-k; None where none is.
        modality: `[T]`, uint8.
        top_k: Slots of a token that each block's router chooses.
    Returns:
        `[blocks, 2, 3]`, int64: (pairs, dropped) by (text, vision, other).
    """
    is_of = [modality == kind for kind in (TEXT, VISION, OTHER)]
    tokens = torch.stack([each.sum() for each in is_of])
    counts = []
    for keep, slots in zip(keeps, top_k, strict=True):
        pairs = tokens * slots
        dropped = pairs
        if keep is not None:
            of_token = keep.sum(-1)
            dropped = pairs - torch.stack([(of_token * each).sum() for each in is_of])
        counts.append(torch.stack([pairs, dropped]))
    return torch.stack(counts)
