"""What kind of token each position is: text, vision, or other (special tokens, which are never skipped)."""

from collections.abc import Sequence

import torch
from torch import Tensor

TEXT, VISION, OTHER = 0, 1, 2
MODALITY_NAMES = ("text", "vision", "other")


def token_modality(
    input_ids: Tensor, visual_token_ids: Sequence[int], special_token_ids: Sequence[int]
) -> Tensor:
    """The modality of every token, read off its id alone (MoDES code, table 1.4 row 7 of the method notes).

    A visual placeholder is often listed among a tokenizer's special tokens too; it counts as vision.

    Args:
        input_ids: Token ids, any shape, integer.
        visual_token_ids: Ids of the image and video placeholders.
        special_token_ids: Ids of chat markers, end of text, padding and the like.
    Returns:
        uint8 of the same shape and device: 0 text, 1 vision, 2 other.
    """
    # Functional, with constants alone, because the compiler traces it into graphs.
    text = torch.full_like(input_ids, TEXT, dtype=torch.uint8)
    modality = torch.where(_is_in(input_ids, special_token_ids), OTHER, text)
    return torch.where(_is_in(input_ids, visual_token_ids), VISION, modality).to(torch.uint8)


def _is_in(input_ids: Tensor, ids: Sequence[int]) -> Tensor:
    hit = torch.zeros_like(input_ids, dtype=torch.bool)
    for first, last in _runs(ids):
        hit = hit | ((input_ids >= first) & (input_ids <= last))
    return hit


def _runs(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive ids, `(first, last)`: a few comparisons instead of one for each special token."""
    runs: list[tuple[int, int]] = []
    for token in sorted(set(ids)):
        if runs and runs[-1][1] + 1 == token:
            runs[-1] = (runs[-1][0], token)
        else:
            runs.append((token, token))
    return runs
