"""rows_modality: embedded tokens are told apart by the bits of their rows."""

import pytest
import torch

from modes_fx.kernels.rows_modality import row_keys, rows_modality
from modes_fx.modality import OTHER, TEXT, VISION

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def table(dtype: torch.dtype = torch.float32, vocabulary: int = 50, hidden: int = 24) -> torch.Tensor:
    return torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)


def sorted_table(weight: torch.Tensor, modality: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    keys, order = row_keys(weight).sort()
    return keys, modality[order]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_does_not_depend_on_the_rows_around_it(dtype):
    weight = table(dtype)
    ids = torch.tensor([[3, 49, 3], [0, 17, 8]])
    alone = torch.stack([row_keys(weight[i]) for i in ids.reshape(-1)])
    assert torch.equal(row_keys(weight[ids]).reshape(-1), alone)
    assert torch.equal(row_keys(weight)[ids].reshape(-1), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_key_does_not_depend_on_strides(dtype):
    weight = table(dtype)
    assert torch.equal(row_keys(weight.t().contiguous().t()), row_keys(weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_different_rows_have_different_keys(dtype):
    keys = row_keys(table(dtype, vocabulary=4000))
    assert keys.unique().numel() == 4000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_change_and_any_order_of_a_row_change_the_key(dtype):
    row = table(dtype)[0]
    nudged = row.clone()
    bits = nudged.view(torch.int32 if row.element_size() == 4 else torch.int16)
    bits[5] ^= 1
    assert row_keys(nudged) != row_keys(row)
    assert row_keys(row.flip(0)) != row_keys(row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_table_have_its_modality_and_others_are_vision(dtype):
    weight = table(dtype)
    modality = torch.where(torch.arange(50) < 5, OTHER, TEXT).to(torch.uint8)
    rows = torch.stack([weight[[2, 30, 4]], weight[[49, 0, 5]]])
    rows[0, 1] = torch.randn(24, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = rows_modality(rows, *sorted_table(weight, modality))
    assert got.dtype == torch.uint8
    assert got.tolist() == [OTHER, VISION, OTHER, TEXT, OTHER, TEXT]


def test_keys_beyond_both_ends_of_the_table_are_vision():
    rows = table(vocabulary=3)
    keys, order = row_keys(rows).sort()
    middle = rows_modality(rows[order], keys[1:2], torch.tensor([TEXT], dtype=torch.uint8))
    assert middle.tolist() == [VISION, TEXT, VISION]


def test_no_rows_give_no_modality():
    keys, modality = sorted_table(table(), torch.zeros(50, dtype=torch.uint8))
    assert rows_modality(torch.empty(1, 0, 24), keys, modality).shape == (0,)


@pytest.mark.parametrize("shape", [(1, 7), (3, 2), (5,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_passes_opcheck(dtype, shape):
    weight = table(dtype)
    keys, modality = sorted_table(weight, torch.zeros(50, dtype=torch.uint8))
    rows = torch.cat([weight, weight])[torch.arange(torch.Size(shape).numel())].reshape(*shape, 24)
    torch.library.opcheck(rows_modality, (rows, keys, modality))
