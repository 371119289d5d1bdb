"""token_modality: the same as a plain loop over ids, whatever the ids are."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from modes_fx.modality import OTHER, TEXT, VISION, token_modality

# A small vocabulary, so that the sets meet each other and the tokens.
IDS = st.lists(st.integers(0, 40), max_size=12)
DTYPES = (torch.int32, torch.int64)
TOKENS = st.lists(st.integers(0, 45), max_size=30)


def by_loop(tokens: list[int], visual: list[int], special: list[int]) -> list[int]:
    return [VISION if token in visual else OTHER if token in special else TEXT for token in tokens]


@given(TOKENS, IDS, IDS)
def test_agrees_with_a_loop_over_the_tokens(tokens, visual, special):
    got = token_modality(torch.tensor(tokens, dtype=torch.int64), visual, special)
    assert got.dtype == torch.uint8
    assert got.tolist() == by_loop(tokens, visual, special)


@given(TOKENS, IDS.filter(bool))
def test_a_token_in_both_sets_is_vision(tokens, ids):
    got = token_modality(torch.tensor(tokens, dtype=torch.int64), ids, ids)
    assert OTHER not in got.tolist()
    assert got.tolist() == by_loop(tokens, ids, [])


@given(TOKENS, IDS, IDS, st.randoms())
def test_order_and_repetition_of_the_sets_do_not_matter(tokens, visual, special, random):
    ids = torch.tensor(tokens, dtype=torch.int64)
    shuffled = [random.sample(group, len(group)) + group[:1] for group in (visual, special)]
    assert torch.equal(token_modality(ids, visual, special), token_modality(ids, *shuffled))


@given(st.lists(st.integers(0, 45), min_size=6, max_size=6), IDS, IDS, st.sampled_from(DTYPES))
def test_shape_is_kept_and_each_token_stands_alone(tokens, visual, special, dtype):
    flat = torch.tensor(tokens, dtype=dtype)
    square = token_modality(flat.reshape(2, 3), visual, special)
    assert square.shape == (2, 3)
    assert square.reshape(-1).tolist() == [int(token_modality(t, visual, special)) for t in flat]


@given(st.integers(2**31, 2**62))
def test_large_ids_are_not_cut_off(token):
    got = token_modality(torch.tensor([token, token - 1, token + 1]), [token], [])
    assert got.tolist() == [VISION, TEXT, TEXT]
