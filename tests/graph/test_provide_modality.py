"""provide_modality: where the modality comes from, and what a graph gains for it."""

import dataclasses

import pytest
import torch

from modes_fx.embeddings import EmbeddingTable
from modes_fx.kernels.rows_modality import rows_modality
from modes_fx.modality import token_modality
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.provide_modality import find_token_ids, provide_modality
from modes_fx.passes.unit import FROM_EMBEDDINGS, FROM_OTHER_GRAPH, FROM_TOKEN_IDS, UNKNOWN
from modes_fx.testing import tiny_inputs


def placeholders(traced):
    return traced.graph.find_nodes(op="placeholder")


def outputs(traced):
    return traced.graph.output_node().args[0]


@pytest.fixture
def embeds(embedded):
    """Index of the embedded tokens among the inputs."""
    return embedded.input_of_shape(1, 16, 32)


@pytest.fixture
def want(input_ids, profile):
    return token_modality(input_ids, profile.visual_token_ids, profile.special_token_ids).reshape(-1)


def test_token_ids_in_the_graph_give_one_more_output_and_no_input(prefill, profile):
    num_inputs, old = len(placeholders(prefill)), outputs(prefill)
    unit = prefill.unit(profile)
    assert provide_modality(prefill.gm, unit) == 1
    assert unit.modality_source == FROM_TOKEN_IDS
    assert (unit.extra_inputs, unit.gives_modality) == ([], True)
    assert len(placeholders(prefill)) == num_inputs
    assert outputs(prefill) == (*old, unit.modality)


def test_token_ids_in_the_graph_win_over_every_other_source(prefill, profile):
    unit = prefill.unit(profile, modality_elsewhere=FROM_OTHER_GRAPH)
    provide_modality(prefill.gm, unit)
    assert unit.modality_source == FROM_TOKEN_IDS


@pytest.mark.parametrize("dynamic_shapes", [False, True])
def test_the_output_is_the_modality_of_the_token_ids(request, profile, want, dynamic_shapes):
    traced = request.getfixturevalue("dynamic" if dynamic_shapes else "prefill")
    run_passes(traced.gm, traced.unit(profile), PIPELINE)
    with torch.no_grad():
        *_, got = traced.gm(*traced.inputs)
    assert got.dtype == torch.uint8
    assert torch.equal(got, want)
    assert set(want.tolist()) == {0, 1, 2}


def test_a_graph_with_token_ids_but_no_experts_gives_the_modality(trace, model, input_ids, profile, want):
    embedding = model.get_input_embeddings()
    (traced,) = trace(lambda ids: embedding(ids) * 2, ids=input_ids)
    unit = traced.unit(profile)
    run_passes(traced.gm, unit, PIPELINE)
    assert unit.gives_modality
    with torch.no_grad():
        doubled, got = traced.gm(*traced.inputs)
    assert torch.equal(got, want)
    assert torch.equal(doubled, 2 * embedding(input_ids))


@pytest.mark.parametrize("source", [FROM_OTHER_GRAPH, FROM_EMBEDDINGS, UNKNOWN])
def test_without_token_ids_the_modality_is_one_more_input(embedded, profile, source):
    num_inputs, old = len(placeholders(embedded)), outputs(embedded)
    unit = embedded.unit(profile, modality_elsewhere=source)
    assert provide_modality(embedded.gm, unit) == 1
    assert unit.modality_source == source
    assert (unit.extra_inputs, unit.gives_modality) == (["modality"], False)
    assert placeholders(embedded)[num_inputs:] == [unit.modality]
    assert outputs(embedded) == old
    value = unit.modality.meta["val"]
    assert (tuple(value.shape), value.dtype) == ((16,), torch.uint8)


def test_embedded_tokens_give_two_inputs_and_one_output(embedded, profile, embeds):
    num_inputs, old = len(placeholders(embedded)), outputs(embedded)
    unit = embedded.unit(profile, embeds=embeds)
    assert provide_modality(embedded.gm, unit) == 1
    assert unit.modality_source == FROM_EMBEDDINGS
    assert (unit.extra_inputs, unit.gives_modality) == (["table_keys", "table_modality"], True)
    assert [node.name for node in placeholders(embedded)[num_inputs:]] == ["table_keys", "table_modality"]
    assert outputs(embedded) == (*old, unit.modality)
    assert unit.modality.target is rows_modality
    assert unit.modality.args[0] is placeholders(embedded)[embeds]


def test_embedded_tokens_are_told_apart_by_their_rows(embedded, profile, embeds, model, input_ids):
    run_passes(embedded.gm, embedded.unit(profile, embeds=embeds), PIPELINE)
    table = EmbeddingTable(model.get_input_embeddings(), profile)
    inputs = list(embedded.inputs)
    inputs[embeds] = inputs[embeds].clone()
    inputs[embeds][0, 9] += 1  # a row of no token, as the vision encoder writes them
    with torch.no_grad():
        *_, got = embedded.gm(*inputs, table.keys(), table.modality())
    expected = token_modality(input_ids, profile.visual_token_ids, profile.special_token_ids).reshape(-1)
    expected[9] = 1
    assert torch.equal(got, expected)


def test_an_output_head_of_the_embeddings_shape_is_not_an_embedding(embedded, profile, table_shape):
    heads = [node for node in placeholders(embedded) if tuple(embedded.real(node).shape) == table_shape]
    assert len(heads) == 1
    assert find_token_ids(embedded.graph, embedded.unit(profile)) == []


def test_an_embedding_of_another_shape_is_not_the_token_embedding(prefill, profile):
    other = dataclasses.replace(profile, vocab_size=profile.vocab_size + 1)
    assert len(find_token_ids(prefill.graph, prefill.unit(profile))) == 1
    assert find_token_ids(prefill.graph, prefill.unit(other)) == []


def test_a_graph_without_experts_and_tokens_stays(trace, profile):
    (traced,) = trace(lambda x: x * 2, x=torch.randn(1, 16, 32))
    before = str(traced.graph)
    assert provide_modality(traced.gm, traced.unit(profile, modality_elsewhere=FROM_OTHER_GRAPH)) == 0
    assert str(traced.graph) == before


def test_the_added_input_follows_a_symbolic_length(trace, model, profile):
    embeds = model.get_input_embeddings()(tiny_inputs()["input_ids"]).detach()
    (traced,) = trace(lambda e: model.get_decoder()(inputs_embeds=e)[0], dynamic=True, e=embeds)
    unit = traced.unit(profile)
    provide_modality(traced.gm, unit)
    assert unit.modality.meta["val"].shape[0] == traced.block().hidden.meta["val"].shape[0]
    assert isinstance(unit.modality.meta["val"].shape[0], torch.SymInt)


@pytest.mark.parametrize("graph", ["prefill", "embedded"])
def test_graphs_stay_pure(request, profile, graph):
    traced = request.getfixturevalue(graph)
    constants = len(traced.graph.find_nodes(op="get_attr"))
    run_passes(traced.gm, traced.unit(profile), PIPELINE)
    assert len(traced.graph.find_nodes(op="get_attr")) <= constants
    for node in traced.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
