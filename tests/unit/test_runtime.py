"""Around rewritten graphs: the modality of a call and of no other, and layers that did not run."""

import threading
import warnings

import pytest
import torch
from torch import nn

from modes_fx.embeddings import EmbeddingTable
from modes_fx.errors import RewriteError
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.profile import Layer, Profile, fingerprint
from modes_fx.runtime import Run


class Model(nn.Module):
    """Four routers, and a forward that does what it is told."""

    def __init__(self):
        super().__init__()
        self.routers = nn.ParameterList(torch.randn(8, 8, generator=GENERATOR) for _ in range(4))
        self.part = Part()

    def forward(self, do, *args):
        return do(*args)


class Part(nn.Module):
    def forward(self, do, *args):
        return do(*args)


GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def profile(model):
    layers = tuple(
        Layer(
            name=f"layers.{i}.mlp",
            alpha_text=0.5,
            alpha_vision=0.5,
            num_experts=8,
            top_k=4,
            fingerprint=fingerprint(router),
        )
        for i, router in enumerate(model.routers)
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


def test_nothing_is_known_before_a_graph_gives_it(run, model):
    assert model(run.modality_is_known) is False
    assert model(run.take, [0], 3) is None


def give_and_take(run, mask, *takes):
    """What each of `takes`, (layers, number of tokens), gets in the call that `mask` is given in."""
    run.give(mask)
    return [run.take(*take) for take in takes]


def test_each_layer_takes_the_modality_of_its_call(run, model, mask):
    got = model(give_and_take, run, mask, *(([layer], 3) for layer in range(4)))
    assert all(each is mask for each in got)


def test_a_graph_of_several_layers_takes_it_for_all_of_them(run, model, mask):
    first, second = model(give_and_take, run, mask, ([0, 1], 3), ([1, 2], 3))
    assert first is mask and second is None


def test_a_layer_that_comes_again_gets_nothing(run, model, mask):
    # Nor do the layers after it get the old one.
    got = model(give_and_take, run, mask, ([0], 3), ([0], 3), ([1], 3))
    assert got[0] is mask and got[1:] == [None, None]


def test_a_modality_of_another_length_is_not_taken(run, model, mask):
    assert model(give_and_take, run, mask, ([0], 4), ([0], 3)) == [None, None]


def test_a_new_modality_replaces_the_last(run, model, mask):
    def both():
        give_and_take(run, mask, ([0, 1], 3))
        return give_and_take(run, newer, ([0], 3))

    newer = mask.flip(0)
    assert model(both)[0] is newer


def test_the_modality_of_a_call_that_returned_is_gone(run, model, mask):
    model(run.give, mask)
    assert model(run.modality_is_known) is False
    assert model(run.take, [0], 3) is None


def test_the_modality_of_a_call_that_raised_is_gone(run, model, mask):
    def fail():
        run.give(mask)
        raise KeyError

    with pytest.raises(KeyError) as raised:
        model(fail)
    # The traceback still holds the frame of the call; it is not on the stack.
    assert raised.traceback
    assert model(run.modality_is_known) is False
    assert model(run.take, [0], 3) is None


def test_what_a_part_gives_is_known_to_the_whole_call_and_ends_with_it(run, model, mask):
    def forward():
        model.part(run.give, mask)
        return model.part(run.take, [0], 3)

    assert model(forward) is mask
    assert model(run.take, [1], 3) is None


def test_a_module_around_two_calls_does_not_join_them(run, model, mask):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            self.model(run.give, mask)
            return self.model(run.take, [0], 3)

    assert Around()() is None


def test_a_call_inside_a_call_does_not_lend_its_modality(run, model, mask):
    def outer():
        run.give(mask)
        model(run.give, mask.flip(0))
        return run.take([0], 3)

    assert model(outer) is None


def test_outside_of_any_call_of_the_model_nothing_is_kept(run, model, mask):
    assert give_and_take(run, mask, ([0], 3)) == [None]
    assert model.part(give_and_take, run, mask, ([0], 3)) == [None]


def test_the_call_of_a_method_counts_where_torch_compile_makes_it(run, model, mask):
    # Dynamo finds nothing to compile in it, and runs it.
    compiled = torch.compile(model.forward, backend="eager")
    assert compiled(torch.compiler.disable(give_and_take), run, mask, ([0], 3))[0] is mask
    torch._dynamo.reset()


# What the modules of a call were called with.


@pytest.fixture
def table(profile):
    embedding = nn.Embedding(20, 8, _weight=torch.randn(20, 8, generator=torch.Generator().manual_seed(1)))
    return EmbeddingTable(embedding, profile)


class Caller(nn.Module):
    """A model around the model: called with anything, it calls the model with something."""

    def __init__(self, model, run, table):
        super().__init__()
        self.model = model
        self.read = lambda: run.read_arguments(table, 4)

    def forward(self, *_, inner=None, **__):
        return self.model(lambda embeds: self.read(), inner)


@pytest.fixture
def caller(model, run, table):
    return Caller(model, run, table)


IDS = torch.tensor([[0, 5, 5, 7]])
WANTED = [OTHER, VISION, VISION, TEXT]


@pytest.fixture
def embeds(table):
    rows = table.embedding(IDS).detach()
    rows[0, 1:3] += 1
    return rows


def test_the_ids_that_the_model_was_called_with_are_read(caller):
    assert caller(input_ids=IDS).tolist() == caller(IDS).tolist() == WANTED


def test_so_are_embedded_tokens(caller, embeds):
    assert caller(inner=embeds).tolist() == WANTED


def test_ids_around_embedded_tokens_of_theirs_win(caller, table, embeds):
    # The third is a token whose row was overwritten, as by the features of a sound.
    ids = torch.tensor([[0, 5, 9, 7]])
    assert caller(input_ids=ids, inner=embeds).tolist() == [OTHER, VISION, TEXT, TEXT]


def test_ids_around_embedded_tokens_of_others_do_not(caller, embeds):
    assert caller(input_ids=torch.tensor([[7, 5, 5, 0]]), inner=embeds).tolist() == WANTED
    assert caller(input_ids=IDS, inner=torch.randn(1, 4, 8)) is None


@pytest.mark.parametrize("inputs", [{}, {"input_ids": IDS[:, :3]}, {"input_ids": torch.randn(1, 4)}])
def test_nothing_is_read_from_other_arguments(caller, inputs):
    assert caller(**inputs) is None


def test_nothing_is_read_from_calls_of_parts(run, model, table):
    assert model.part(lambda ids: run.read_arguments(table, 4), IDS) is None


def test_two_runs_in_one_call_are_apart(run, lenient, model, mask):
    def forward():
        run.give(mask)
        lenient.give(mask.flip(0))
        return run.take([0], 3)

    assert model(forward) is mask


def test_another_thread_sees_nothing_of_this_one(run, model, mask):
    seen = []

    def look():
        seen.extend([run.modality_is_known(), run.take([0], 3), run.last, list(run.executed)])

    def forward():
        run.give(mask)
        run.ran([0, 1])
        thread = threading.Thread(target=model, args=(look,))
        thread.start()
        thread.join()
        return run.take([0], 3)

    assert model(forward) is mask
    assert seen == [False, None, -1, [0, 0, 0, 0]]
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


def test_layers_that_run_without_taking_the_modality_are_no_complaint(run, model, mask):
    for _ in range(4):
        model(run.give, mask)
        run.ran([0, 1, 2, 3])


def test_calls_in_which_no_layer_runs_are_an_error_the_third_time(run, model, mask):
    for _ in range(2):
        model(run.give, mask)
    with pytest.raises(RewriteError, match=r"^layers\.0\.mlp, .*, layers\.3\.mlp ran outside"):
        model(run.give, mask)


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
