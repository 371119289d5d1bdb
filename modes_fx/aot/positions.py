"""Positions of tokens, as the models of transformers count them before their forward."""

from collections.abc import Sequence

import torch
from torch import Tensor


def token_positions(attention_mask: Tensor) -> Tensor:
    """The place of each token among the real ones of its row, `[B, S]`, int64; 0 at padding.

    Args:
        attention_mask: `[B, S]`, 1 for a token, 0 for padding.
    """
    mask = attention_mask.long()
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def picture_positions(
    input_ids: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Sequence[int]],
    merge_size: int,
    picture_token_id: int,
) -> Tensor:
    """Positions in time, height and width (M-RoPE, as Qwen3-VL's `get_rope_index`), `[3, B, S]`, int64.

    A text token is one step on in all three. The tokens of a picture start together, and count rows and
    columns of its merged grid; the text after them goes on from the longer side.

    Args:
        input_ids, attention_mask: `[B, S]`.
        grids: (time, height, width) of every picture in patches, in the order of the rows.
        merge_size: Patches that make one token, along one side.
        picture_token_id: The placeholder.
    """
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    pictures = iter(grids)
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        kinds = (ids[mask] == picture_token_id).tolist()
        pieces: list[Tensor] = []
        at = start = 0
        while at < len(kinds):
            if kinds[at]:
                time, height, width = next(pictures)
                height, width = height // merge_size, width // merge_size
                sides = torch.meshgrid(
                    torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij"
                )
                piece = torch.stack(sides).reshape(3, -1)
                step = max(height, width)
            else:
                end = next((i for i in range(at, len(kinds)) if kinds[i]), len(kinds))
                piece = torch.arange(end - at).expand(3, -1)
                step = end - at
            pieces.append(piece + start)
            at, start = at + piece.shape[1], start + step
        if pieces:
            positions[:, row, mask] = torch.cat(pieces, dim=1)[:, : len(kinds)]
    return positions


def next_position_offset(positions: Tensor, attention_mask: Tensor) -> Tensor:
    """How far the position of the next token is from its place in the row, `[B, 1]`, int64.

    Args:
        positions: `[3, B, S]` or `[B, S]`.
        attention_mask: `[B, S]`.
    """
    furthest = positions.reshape(-1, *positions.shape[-2:]).amax(dim=(0, 2))
    return (furthest + 1 - attention_mask.long().sum(-1))[:, None]
