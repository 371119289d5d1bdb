"""Around rewritten graphs: the modality of a call, layers that did not run, the embedding table."""

import threading
import warnings

import pytest
import torch
from torch import nn

from modes_fx.errors import RewriteError
from modes_fx.kernels.rows_modality import row_keys
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.profile import Layer, Profile
from modes_fx.runtime import EmbeddingTable, Run


@pytest.fixture
def profile():
    layers = tuple(
        Layer(
            name=f"layers.{i}.mlp",
            alpha_text=0.5,
            alpha_vision=0.5,
            num_experts=8,
            top_k=4,
            fingerprint=f"{i:064x}",
        )
        for i in range(4)
    )
    return Profile(
        layers=layers,
        tau_text=0.1,
        tau_vision=0.1,
        visual_token_ids=(5,),
        special_token_ids=(0, 12),
        vocab_size=20,
        hidden_size=8,
    )


@pytest.fixture
def run(profile):
    return Run(profile, strict=True)


@pytest.fixture
def lenient(profile):
    return Run(profile, strict=False)


@pytest.fixture
def mask():
    return torch.tensor([OTHER, VISION, TEXT], dtype=torch.uint8)


def test_nothing_is_known_before_a_graph_gives_it(run):
    assert not run.modality_is_known()
    assert run.take([0], 3) is None


def test_each_layer_takes_the_modality_of_its_call(run, mask):
    run.give(mask)
    assert all(run.take([layer], 3) is mask for layer in range(4))


def test_a_graph_of_several_layers_takes_it_for_all_of_them(run, mask):
    run.give(mask)
    assert run.take([0, 1], 3) is mask
    assert run.take([1, 2], 3) is None


def test_a_layer_that_comes_again_belongs_to_another_call(run, mask):
    run.give(mask)
    run.take([0], 3)
    assert run.take([0], 3) is None
    # Nor do the layers after it get the old one.
    assert run.take([1], 3) is None
    assert not run.modality_is_known()


def test_the_modality_of_a_finished_call_is_not_known_to_the_next(run, mask):
    run.give(mask)
    assert run.modality_is_known()
    run.take([0, 1, 2, 3], 3)
    assert not run.modality_is_known()


def test_a_modality_of_another_length_is_not_taken(run, mask):
    run.give(mask)
    assert run.take([0], 4) is None
    assert run.take([0], 3) is None


def test_a_new_call_replaces_the_modality_of_the_last(run, mask):
    run.give(mask)
    run.take([0, 1], 3)
    newer = mask.flip(0)
    run.give(newer)
    assert run.take([0], 3) is newer


def test_another_thread_sees_nothing_of_this_one(run, mask):
    run.give(mask)
    run.ran([0, 1])
    seen = []

    def look():
        seen.extend([run.modality_is_known(), run.take([0], 3), run.last, list(run.executed)])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [False, None, -1, [0, 0, 0, 0]]
    assert run.take([0], 3) is mask
    assert run.executed == [1, 1, 0, 0]


def test_whole_calls_are_no_complaint_however_they_are_cut(run):
    for graphs in ([[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1], [2, 3]]) * 2:
        for layers in graphs:
            run.ran(layers)
    assert run.executed == [6, 6, 6, 6]


def test_graphs_without_experts_do_not_end_a_call(run):
    for layers in ([], [0, 1], [], [2], [3], []):
        run.ran(layers)
    assert run.executed == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "graphs, missing", [([[0], [2]], "layers.1.mlp"), ([[3]], "layers.0.mlp, layers.1.mlp, ")]
)
def test_a_gap_is_an_error_that_names_the_layers(run, graphs, missing):
    with pytest.raises(RewriteError, match=f"^{missing}.*ran outside the compiled graphs"):
        for layers in graphs:
            run.ran(layers)


def test_a_gap_at_the_start_of_a_later_call_is_an_error_too(run):
    run.ran([0, 1, 2, 3])
    with pytest.raises(RewriteError, match=r"^layers\.0\.mlp ran outside"):
        run.ran([1])


def test_after_an_error_the_next_call_starts_afresh(run):
    with pytest.raises(RewriteError):
        run.ran([1])
    run.ran([0, 1, 2, 3])
    run.ran([0, 1, 2, 3])


def test_without_strict_a_gap_warns_once(lenient):
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp ran outside"):
        lenient.ran([0, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lenient.ran([0, 2])
    assert lenient.executed == [2, 0, 2, 0]


def test_a_missing_tail_is_tolerated_once_as_an_exception_makes_one(run):
    run.ran([0, 1])
    run.ran([0, 1, 2, 3])
    run.ran([0])
    run.ran([0, 1, 2, 3])
    run.ran([0, 1, 2, 3])


def test_a_missing_tail_is_an_error_the_second_time_in_a_row(run):
    run.ran([0, 1])
    run.ran([0, 1])
    with pytest.raises(RewriteError, match=r"^layers\.2\.mlp, layers\.3\.mlp ran outside"):
        run.ran([0, 1])


def test_an_unknown_modality_warns_once(run):
    with pytest.warns(UserWarning, match="nothing is skipped.*input_ids"):
        run.warn_unknown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.warn_unknown()


def test_an_unknown_modality_does_not_silence_a_gap(lenient):
    with pytest.warns(UserWarning, match="nothing is skipped"):
        lenient.warn_unknown()
    with pytest.warns(UserWarning, match="ran outside the compiled graphs"):
        lenient.ran([1])


# The embedding table.


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))


def modality_of(table, rows):
    keys = table.keys()
    position = torch.searchsorted(keys, row_keys(rows))
    assert torch.equal(keys[position], row_keys(rows))
    return table.modality()[position].tolist()


def test_the_table_is_sorted_and_knows_each_token(weight, profile):
    table = EmbeddingTable(weight, profile)
    keys = table.keys()
    assert (keys.dtype, table.modality().dtype) == (torch.int64, torch.uint8)
    assert torch.equal(keys, keys.sort().values)
    want = [OTHER, *[TEXT] * 4, VISION, *[TEXT] * 6, OTHER, *[TEXT] * 7]
    assert modality_of(table, weight.detach()) == want


def test_the_table_follows_the_weight_in_place(weight, profile):
    table = EmbeddingTable(weight, profile)
    before = table.keys()
    with torch.no_grad():
        weight[7] += 1
    assert not torch.equal(table.keys(), before)
    assert torch.isin(row_keys(weight)[7], table.keys())


def test_the_table_is_not_computed_again_for_the_same_weight(weight, profile):
    table = EmbeddingTable(weight, profile)
    assert table.keys() is table.keys()


# With the special token's id below and above that of the text token, since one of the two is found first.
@pytest.mark.parametrize("special", [0, 12])
@pytest.mark.parametrize("text", [2, 19])
def test_a_row_that_a_special_token_shares_with_a_text_token_is_special(weight, profile, special, text):
    with torch.no_grad():
        weight[text] = weight[special]
    assert modality_of(EmbeddingTable(weight, profile), weight[[text, special, 8]]) == [OTHER, OTHER, TEXT]


def test_a_row_that_text_tokens_share_stays_text(weight, profile):
    with torch.no_grad():
        weight[9] = weight[8]
    assert modality_of(EmbeddingTable(weight, profile), weight[[8, 9]]) == [TEXT, TEXT]


def test_holds_rows_of_the_table_and_nothing_else(weight, profile):
    table = EmbeddingTable(weight, profile)
    rows = weight.detach()[torch.tensor([[3, 4, 7]])]
    mixed = torch.cat([torch.zeros(1, 5, 8), rows[:, :1]], dim=1)
    assert table.holds(rows) and table.holds(mixed)
    assert not table.holds(rows + 1)
    assert not table.holds(rows[..., :4])
    assert not table.holds(rows.to(torch.bfloat16))
    assert not table.holds(rows[0, 0])
