"""skip_experts: one op per block with the constants of its own layer, nothing of the block left."""

import dataclasses
import math

import pytest
import torch

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.find_blocks import find_blocks

aten = torch.ops.aten

BLOCK_OPS = (
    aten.sort.default,
    aten.sort.stable,
    aten.histc.default,
    aten.cumsum.default,
    aten._grouped_mm.default,
    aten.index_put.default,
)


@pytest.fixture(params=["prefill", "embedded", "decode", "dynamic", "bfloat16"])
def traced(request):
    return request.getfixturevalue(request.param)


def rewritten(traced, profile, **known):
    unit = traced.unit(profile, **known)
    run_passes(traced.gm, unit, PIPELINE)
    return unit


def left_of_blocks(traced):
    grouped = [node for node in traced.graph.nodes if "grouped_mm" in str(node.target)]
    # Only these belong to blocks alone; attention and rotary positions use the others too.
    return grouped + traced.all(aten.histc.default) + find_blocks(traced.graph)


def test_each_block_becomes_one_op(traced, profile):
    assert traced.count(masked_moe) == 0
    unit = rewritten(traced, profile)
    assert traced.count(masked_moe) == unit.counts["skip_experts"] == len(profile.layers)
    assert unit.layers() == [layer.name for layer in profile.layers]


def test_nothing_of_the_blocks_is_left(traced, profile):
    before = {target: traced.count(target) for target in BLOCK_OPS}
    in_blocks = [node.target for block in find_blocks(traced.graph) for node in block.nodes()]
    unrelated = {target: count - in_blocks.count(target) for target, count in before.items()}
    rewritten(traced, profile)
    assert {target: traced.count(target) for target in BLOCK_OPS} == unrelated
    assert left_of_blocks(traced) == []


def test_each_op_has_the_constants_of_its_own_layer(traced, profile):
    unit = rewritten(traced, profile)
    for node, layer in zip(traced.all(masked_moe), profile.layers, strict=True):
        assert node.kwargs == {
            "alpha_text": layer.alpha_text,
            "alpha_vision": layer.alpha_vision,
            "tau_text": profile.tau_text,
            "tau_vision": profile.tau_vision,
            "activation": "silu(gate) * up",
            "interleaved": False,
            "is_transposed": False,
            "weights_on_input": False,
            "layer": layer.name,
        }
        assert node.args[4] is unit.modality


def test_each_op_reads_what_its_block_read(prefill, profile):
    blocks = find_blocks(prefill.graph)
    rewritten(prefill, profile)
    for node, block in zip(prefill.all(masked_moe), blocks, strict=True):
        assert node.args[:4] == (block.hidden, block.weights, block.weights, block.experts)
        assert node.args[5:] == (block.gate_up, block.down, None, None)


def test_shape_and_dtype_stay_as_they_were(traced, profile):
    want = [block.output.meta["val"] for block in find_blocks(traced.graph)]
    rewritten(traced, profile)
    got = [node.meta["val"] for node in traced.all(masked_moe)]
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want]


def test_thresholds_of_minus_infinity_leave_the_numbers(prefill, profile, _prefill):
    keep_all = profile.with_thresholds(tau_text=-math.inf, tau_vision=-math.inf)
    rewritten(prefill, keep_all)
    with torch.no_grad():
        want = _prefill.gm(*_prefill.inputs)
        *got, modality = prefill.gm(*prefill.inputs)
    assert modality.shape == (16,)
    torch.testing.assert_close(list(got), list(want), rtol=1e-4, atol=1e-4)


def test_thresholds_of_infinity_change_the_numbers(prefill, profile, _prefill):
    rewritten(prefill, profile.with_thresholds(tau_text=math.inf, tau_vision=math.inf))
    with torch.no_grad():
        want, got = _prefill.gm(*_prefill.inputs), prefill.gm(*prefill.inputs)
    (want,), (got,) = ([x for x in each if x.shape == (1, 16, 32)] for each in (want, got))
    assert (got - want).abs().max() > 0.1


def test_a_second_run_changes_nothing(prefill, profile):
    rewritten(prefill, profile)
    graph = str(prefill.graph)
    again = prefill.unit(profile)
    run_passes(prefill.gm, again, PIPELINE[1:])
    assert set(again.counts.values()) == {0}
    assert again.blocks == []
    assert str(prefill.graph) == graph


def test_a_router_that_the_profile_does_not_know_is_reported_and_left_alone(prefill, profile):
    less = dataclasses.replace(profile, layers=profile.layers[:2])
    unit = rewritten(prefill, less)
    assert prefill.count(masked_moe) == 2
    assert [block.rewritten for block in unit.blocks] == [True, True, False]
    assert unit.blocks[2].layer is None
    assert unit.blocks[2].reason == "its router is not in the profile"
    assert len(find_blocks(prefill.graph)) == 1


@pytest.mark.parametrize("wrong", [{"num_experts": 16}, {"top_k": 2}], ids=str)
def test_another_number_of_experts_than_the_profiles_is_reported_and_left_alone(prefill, profile, wrong):
    # The other layers keep 8 experts, or no tensor would be looked at as a router.
    layers = (dataclasses.replace(profile.layers[0], **wrong), *profile.layers[1:])
    unit = rewritten(prefill, dataclasses.replace(profile, layers=layers))
    assert [block.rewritten for block in unit.blocks] == [False, True, True]
    assert unit.blocks[0].layer == profile.layers[0].name
    assert "the profile has" in unit.blocks[0].reason and "the graph 8, top 4" in unit.blocks[0].reason


def test_without_a_modality_no_block_is_rewritten(prefill, profile):
    unit = prefill.unit(profile)
    run_passes(prefill.gm, unit, PIPELINE, disable=["provide_modality"])
    assert prefill.count(masked_moe) == 0
    assert all("no modality was provided" in block.reason for block in unit.blocks)
    assert len(unit.blocks) == 3


def test_a_declined_block_keeps_its_layer_and_its_reason(prefill, profile):
    silu = next(node for node in prefill.block(1).nodes() if node.target is aten.silu.default)
    silu.target = aten.sin.default
    unit = rewritten(prefill, profile)
    assert prefill.count(masked_moe) == 2
    declined = unit.blocks[1]
    assert (declined.layer, declined.rewritten) == (profile.layers[1].name, False)
    assert "no formula for aten.sin" in declined.reason


def test_a_rewrite_that_the_proof_refuses_is_left_alone(prefill, profile):
    sort = next(node for node in prefill.block(2).nodes() if node.target is aten.sort.default)
    sort.args = (sort.args[0], -1, True)
    unit = rewritten(prefill, profile)
    assert prefill.count(masked_moe) == 2
    assert unit.blocks[2].reason.startswith("the rewrite differs from the model: relative error")
    assert unit.blocks[2].max_error > 0.1


def test_reports_the_error_that_each_proof_saw(prefill, profile):
    unit = rewritten(prefill, profile)
    assert all(block.max_error is not None and block.max_error < 1e-5 for block in unit.blocks)
    assert [(block.num_experts, block.top_k) for block in unit.blocks] == [(8, 4)] * 3
