"""Embedded tokens: the table of an embedding's rows, and what is read back with it."""

import pytest
import torch
from torch import nn

from modes_fx.embeddings import EmbeddingTable
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.profile import Layer, Profile


@pytest.fixture
def profile():
    layer = Layer(name="mlp", alpha_text=0.5, alpha_vision=0.5, num_experts=8, top_k=4, fingerprint=64 * "0")
    return Profile(
        layers=(layer,),
        tau_text=0.1,
        tau_vision=0.1,
        visual_token_ids=(5,),
        special_token_ids=(0, 12),
        vocab_size=20,
        hidden_size=8,
    )


@pytest.fixture
def embedding():
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return nn.Embedding(20, 8, _weight=weight)


@pytest.fixture
def table(embedding, profile):
    return EmbeddingTable(embedding, profile)


class Scaled(nn.Embedding):
    """As in Gemma: what it makes is not what its weight holds."""

    def forward(self, input):
        return super().forward(input) * 8**0.5


ALL = torch.arange(20)
WANTED = [OTHER, *[TEXT] * 4, VISION, *[TEXT] * 6, OTHER, *[TEXT] * 7]


def test_the_table_knows_each_token(table, embedding):
    keys = table.keys()
    assert (keys.dtype, table.modality().dtype) == (torch.int64, torch.uint8)
    assert torch.equal(keys, keys.sort().values)
    assert table.read(embedding(ALL)).tolist() == WANTED
    assert table.read(embedding(ALL.reshape(4, 5))).tolist() == WANTED


def test_a_row_of_no_token_is_vision(table, embedding):
    rows = embedding(torch.tensor([3, 0, 3]))
    assert table.read(torch.cat([rows, rows[:1] + 1])).tolist() == [TEXT, OTHER, TEXT, VISION]


def test_the_rows_that_count_are_those_that_the_module_makes(profile, embedding):
    scaled = Scaled(20, 8, _weight=embedding.weight.detach())
    table = EmbeddingTable(scaled, profile)
    assert table.read(scaled(ALL)).tolist() == WANTED
    assert table.read(embedding(ALL)) is None


def test_a_weight_alone_stands_for_a_plain_embedding(profile, embedding):
    table = EmbeddingTable(embedding.weight, profile)
    assert table.read(embedding(ALL)).tolist() == WANTED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reads_half_precision(profile, embedding, dtype):
    embedding = embedding.to(dtype)
    assert EmbeddingTable(embedding, profile).read(embedding(ALL)).tolist() == WANTED


def test_hooks_do_not_see_the_table_being_made(table, embedding):
    seen = []
    embedding.register_forward_pre_hook(lambda module, args: seen.append(args))
    table.keys()
    assert seen == []


def in_place(weight):
    with torch.no_grad():
        weight[7] += 1


def without_a_version(weight):
    weight.data[7] += 1


@pytest.mark.parametrize("edit", [in_place, without_a_version])
def test_the_table_follows_an_edit_of_one_row(table, embedding, edit):
    table.keys()
    edit(embedding.weight)
    assert table.read(embedding(torch.tensor([7, 3]))).tolist() == [TEXT, TEXT]


def test_the_table_follows_another_weight(table, embedding):
    table.keys()
    embedding.weight = nn.Parameter(embedding.weight.detach() * 2)
    assert table.read(embedding(ALL)).tolist() == WANTED


def test_the_table_is_not_computed_again_for_the_same_weight(table, embedding):
    keys = table.keys()
    # Neither for a row of no token.
    table.read(embedding(ALL) + 1)
    assert table.keys() is keys


def test_works_with_weights_made_under_inference_mode(profile):
    with torch.inference_mode():
        embedding = nn.Embedding(20, 8)
        table = EmbeddingTable(embedding, profile)
        assert table.read(embedding(ALL)).tolist() == WANTED
        embedding.weight[7] += 1
        assert table.read(embedding(ALL)).tolist() == WANTED


# With the special token's id below and above that of the text token, since one of the two is found first.
@pytest.mark.parametrize("special", [0, 12])
@pytest.mark.parametrize("text", [2, 19])
def test_a_row_that_a_special_token_shares_with_a_text_token_is_special(table, embedding, special, text):
    with torch.no_grad():
        embedding.weight[text] = embedding.weight[special]
    assert table.read(embedding(torch.tensor([text, special, 8]))).tolist() == [OTHER, OTHER, TEXT]


def test_a_row_that_text_tokens_share_stays_text(table, embedding):
    with torch.no_grad():
        embedding.weight[9] = embedding.weight[8]
    assert table.read(embedding(torch.tensor([8, 9]))).tolist() == [TEXT, TEXT]


def test_nothing_is_read_from_what_holds_no_token(table, embedding):
    rows = embedding(ALL).detach()
    assert table.holds(rows)
    for other in (rows + 1, rows[..., :4], rows.bfloat16(), rows.double(), rows[0], rows.long()):
        assert table.read(other) is None


def test_rows_of_zeros_are_no_evidence(table, embedding):
    with torch.no_grad():
        embedding.weight[0] = 0
    zeros = torch.zeros(3, 8)
    assert table.read(zeros) is None
    # Beside a token they are what the table says.
    assert table.read(torch.cat([zeros, embedding(torch.tensor([4]))])).tolist() == [OTHER] * 3 + [TEXT]


def test_the_first_value_that_holds_as_many_tokens_is_read(table, embedding):
    rows = embedding(ALL).detach()
    values = [rows + 1, 7, None, rows[:3], rows]
    assert table.read_first(values).tolist() == WANTED[:3]
    assert table.read_first(values, num_tokens=20).tolist() == WANTED
    assert table.read_first(values, num_tokens=19) is None
