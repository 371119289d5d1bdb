"""Positions are those that the model itself counts."""

import torch

from modes_fx.aot.positions import next_position_offset, picture_positions, token_positions
from modes_fx.testing.tokens import IMAGE, PAD, VISION_END, VISION_START


def picture(rows, columns):
    return [VISION_START, *[IMAGE] * (rows * columns), VISION_END]


def test_pictures_of_several_sizes_between_texts_and_padding(model):
    rows = [[9, 10, *picture(2, 3), 11, *picture(4, 1), 12, 13], [*picture(1, 2), 14]]
    length = max(map(len, rows))
    grids = [[1, 4, 6], [1, 8, 2], [1, 2, 4]]
    for left in (False, True):
        pads = [[PAD] * (length - len(row)) for row in rows]
        ids = torch.tensor([p + r if left else r + p for r, p in zip(rows, pads, strict=True)])
        mask = (ids != PAD).long()
        want, deltas = model.model.get_rope_index(
            ids, (ids == IMAGE).long(), image_grid_thw=torch.tensor(grids), attention_mask=mask
        )
        got = picture_positions(ids, mask, grids, merge_size=2, picture_token_id=IMAGE)
        assert got.tolist() == want.tolist()
        # transformers counts the offset from the tokens of the row, as we do.
        assert next_position_offset(got, mask).tolist() == deltas.tolist()


def test_text_counts_its_own_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert token_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 0]]
    assert next_position_offset(token_positions(mask), mask).tolist() == [[0], [0]]
