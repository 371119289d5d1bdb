"""find_blocks: one match per layer in every graph; what means something else is never rewritten."""

import operator
from typing import Any

import pytest
import torch
from torch import nn

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes import PIPELINE, provide_modality, run_passes, skip_experts
from modes_fx.passes.dataflow import parameter_of
from modes_fx.passes.find_blocks import Declined, Experts, find_blocks

aten = torch.ops.aten


@pytest.fixture(params=["prefill", "embedded", "decode", "dynamic", "bfloat16"])
def traced(request):
    return request.getfixturevalue(request.param)


def test_finds_each_layer_once_in_layer_order(traced, profile):
    unit = traced.unit(profile)
    found = find_blocks(traced.graph)
    assert [unit.layer_of(block.router.weight) for block in found] == list(profile.layers)


def test_reads_sizes_activation_and_layout_off_the_graph(traced):
    for block in find_blocks(traced.graph):
        assert (block.num_experts, block.top_k) == (8, 4)
        assert (block.kind, block.activation) == ("grouped_mm", "silu(gate) * up")
        assert not (block.interleaved or block.is_transposed or block.weights_on_input)
        assert (block.gate_up_bias, block.down_bias) == (None, None)
        assert traced.real(block.gate_up).shape == (8, 32, 32)
        assert traced.real(block.down).shape == (8, 32, 16)


def test_each_match_holds_the_weights_of_its_own_layer(prefill, model):
    layers = model.get_decoder().layers
    for block, layer in zip(find_blocks(prefill.graph), layers, strict=True):
        assert prefill.real(block.gate_up) is layer.mlp.experts.gate_up_proj
        assert prefill.real(block.down) is layer.mlp.experts.down_proj
        assert prefill.real(block.router.weight) is layer.mlp.gate.weight


def test_finding_changes_nothing(traced):
    before = str(traced.graph)
    find_blocks(traced.graph)
    assert str(traced.graph) == before


def test_a_graph_without_experts_gives_nothing(trace):
    mlp = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    (traced,) = trace(lambda x: mlp(x).sum(1), x=torch.randn(3, 8))
    assert traced.count(aten.sum.dim_IntList) == 1
    assert find_blocks(traced.graph) == []


def test_a_router_without_experts_gives_nothing(trace):
    def routing(x: torch.Tensor, w: torch.Tensor) -> Any:
        weights, experts = (x @ w.t()).softmax(-1).topk(2)
        return weights / weights.sum(1, keepdim=True), experts

    (traced,) = trace(routing, x=torch.randn(3, 8), w=torch.randn(4, 8))
    assert find_blocks(traced.graph) == []


def test_the_nodes_of_a_block_end_at_its_inputs(prefill):
    block = prefill.block(1)
    nodes = block.nodes()
    assert nodes[-1] is block.output
    assert not {block.hidden, block.experts, block.weights} & set(nodes)
    assert sum("grouped_mm" in str(node.target) for node in nodes) == 2
    order = {node: i for i, node in enumerate(prefill.graph.nodes)}
    assert [order[node] for node in nodes] == sorted(order[node] for node in nodes)


def test_parameter_of_looks_through_layout_but_not_through_arithmetic(prefill):
    block = prefill.block()
    with prefill.graph.inserting_before(block.output):
        view = prefill.graph.call_function(aten.transpose.int, (block.gate_up, 1, 2))
        copy = prefill.graph.call_function(aten._to_copy.default, (view,), {"dtype": torch.float32})
        double = prefill.graph.call_function(aten.mul.Tensor, (copy, 2))
    assert parameter_of(copy) is block.gate_up
    assert parameter_of(double) is None


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_every_trait_of_a_block(small, implementation, dtype):
    gpt_oss = {"gate": "gpt-oss", "interleaved": True, "transposed": True, "biased": True, "top_k": 2}
    traits = {"transposed": True, "weights_on_input": True} if implementation == "dense" else gpt_oss
    one = small(implementation=implementation, dtype=dtype, **traits)
    (block,) = find_blocks(one.traced.graph)
    assert isinstance(block, Experts)
    assert (block.kind, block.num_experts, block.top_k) == (implementation, 8, one.block.traits.top_k)
    assert block.is_transposed
    assert block.weights_on_input == (implementation == "dense")
    assert one.traced.real(block.gate_up) is one.block.gate_up_proj
    assert one.traced.real(block.down) is one.block.down_proj
    assert one.traced.real(block.router.weight) is one.block.router
    if implementation != "dense":
        assert block.interleaved
        assert one.traced.real(block.gate_up_bias) is one.block.gate_up_proj_bias
        assert one.traced.real(block.down_bias) is one.block.down_proj_bias


def test_an_expert_without_a_gate_is_a_formula_of_its_product(small):
    (block,) = find_blocks(small(gate="relu squared", implementation="batched_mm").traced.graph)
    assert block.activation == "square(relu(x))"


def test_tokens_that_are_an_input_are_not_taken_for_the_router(small):
    # As many rows as experts, and as many columns as the router.
    one = small(8)
    (block,) = find_blocks(one.traced.graph)
    assert one.traced.real(block.router.weight) is one.block.router


# Mutations of the second block. Each gives the graph another meaning; `_nodes` names the parts they cut.


def _nodes(traced: Any, block: Any) -> dict[str, Any]:
    nodes = block.nodes()

    def one(*targets: Any, index: int = 0) -> Any:
        return [node for node in nodes if node.target in targets][index]

    first, second = (node for node in nodes if "grouped_mm" in str(node.target))
    sort = one(aten.sort.default, aten.sort.stable)
    ids, perm = (next(n for n in sort.users if n.args[1] == i) for i in (0, 1))
    return {
        "graph": traced.graph,
        "first": first,
        "second": second,
        "sort": sort,
        "ids": ids,
        "perm": perm,
        "gathered": first.args[0],
        "token": one(aten.floor_divide.default),
        "offsets": first.args[2],
        "counts": one(aten.histc.default),
        "silu": one(aten.silu.default),
        "gated": second.args[0],
        "column": one(aten.unsqueeze.default),
        "weighted": one(aten.mul.Tensor, index=-1),
        "inverse": one(aten.index_put.default),
        "unsorted": one(aten.index.Tensor, index=-1),
        "slots": block.output.args[0],
        "output": block.output,
        "weights": block.weights,
        "halves": [one(operator.getitem, index=-2), one(operator.getitem, index=-1)],
    }


def _insert(before: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    like = next((a for a in args if isinstance(a, torch.fx.Node)), None)
    if like is not None:
        node.meta = dict(like.meta)
    return node


def _after(node: Any, target: Any, *args: Any, **kwargs: Any) -> None:
    """Put an operator on everything that reads `node`."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, (node, *args), kwargs)
    new.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, new)


def an_operator_without_a_formula(n):
    n["silu"].target = aten.sin.default


def a_norm_over_the_row(n):
    _after(n["gated"], aten._softmax.default, -1, False)


def a_learned_constant(n):
    with n["graph"].inserting_before(n["gated"]):
        scale = n["graph"].call_function(aten.select.int, (n["second"].args[1].args[0], 0, 0))
    scale.meta["val"] = n["second"].args[1].args[0].meta["val"][0]
    _after(n["gated"], aten.mul.Tensor, scale)


def activation_on_the_up_half(n):
    gate, up = n["halves"]
    n["silu"].args = (up,)
    n["gated"].args = (n["silu"], gate)


def no_up_half(n):
    n["gated"].args = (n["silu"], n["silu"])


def bias_in_the_gate_region(n):
    _after(n["first"], aten.add.Tensor, 1.0)


def clamp_in_the_gate_region(n):
    _after(n["halves"][0], aten.clamp.default, -1.0, 1.0)


def gate_up_as_it_lies(n):
    n["first"].args = (n["first"].args[0], n["first"].args[1].args[0], *n["first"].args[2:])


def scaled_down_weights(n):
    _after(n["second"].args[1], aten.mul.Tensor, 2.0)


def other_offsets_in_the_second_product(n):
    # Those of other experts: a copy would be the same block.
    offsets = n["offsets"]
    counts = _insert(n["second"], n["counts"].target, n["counts"].args[0], 8, 0, 6)
    copy = _insert(n["second"], offsets.target, counts, *offsets.args[1:], **offsets.kwargs)
    copy.meta = dict(offsets.meta)
    n["second"].args = (*n["second"].args[:2], copy, *n["second"].args[3:])


def counts_of_fewer_experts(n):
    n["counts"].args = (n["counts"].args[0], 8, 0, 6)


def counts_of_the_permutation(n):
    n["counts"].args[0].args = (n["perm"],)


def counts_of_an_input(n):
    n["counts"].args = (next(iter(n["graph"].nodes)), *n["counts"].args[1:])


def sum_over_hidden(n):
    n["output"].args = (n["slots"], [2])


def sum_that_keeps_its_dimension(n):
    n["output"].args = (n["slots"], [1], True)


def unpermuted_by_the_permutation_itself(n):
    n["unsorted"].args = (n["unsorted"].args[0], [n["perm"]])


def inverse_of_something_else(n):
    n["inverse"].args = (n["inverse"].args[0], [n["ids"]], n["inverse"].args[2])


def inverse_counted_backwards(n):
    count = n["inverse"].args[2]
    size = count.meta["val"].shape[0]
    back = _insert(n["inverse"], aten.arange.start_step, size - 1, -1, -1)
    back.meta = dict(count.meta)
    n["inverse"].args = (*n["inverse"].args[:2], back)


def weights_taken_before_the_sort(n):
    flat = n["column"].args[0].args[0]
    n["column"].args = (flat, -1)


def weights_in_another_order(n):
    index = n["column"].args[0]
    index.args = (index.args[0], [n["ids"]])


def weighted_twice(n):
    _after(n["weighted"], aten.mul.Tensor, n["column"])


def weights_squared(n):
    _after(n["column"].args[0], aten.pow.Tensor_Scalar, 2)


def tokens_gathered_by_another_width(n):
    n["token"].args = (n["perm"], 5)


def tokens_gathered_by_remainder(n):
    n["token"].target = aten.remainder.Scalar


def activation_before_the_first_product(n):
    _after(n["gathered"], aten.relu.default)


def scaled_before_the_second_product(n):
    _after(n["gated"], aten.mul.Tensor, 2.0)


def sorted_downwards(n):
    n["sort"].args = (n["sort"].args[0], -1, True)


def counted_without_a_running_sum(n):
    n["offsets"].target = aten.cumprod.default


# What is no formula, or no dispatch, is named.
DECLINED = {
    an_operator_without_a_formula: "no formula for aten.sin",
    a_norm_over_the_row: "no formula for aten._softmax",
    a_learned_constant: "no formula for aten.select.int",
    bias_in_the_gate_region: "no formula for",
    no_up_half: "both halves of the first product",
    gate_up_as_it_lies: "different layouts",
    sum_over_hidden: "sum [T, K, H] over the slots",
    sum_that_keeps_its_dimension: "sum [T, K, H] over the slots",
    weighted_twice: "aten.mul.Tensor on the output of each expert",
    weights_squared: "routing weight of shape [T, K]",
    tokens_gathered_by_remainder: "aten.remainder.Scalar between the block's inputs and its output",
    activation_before_the_first_product: "gathered tokens as rows",
    counted_without_a_running_sum: "aten.cumprod.default between",
}
# The order of pairs is not read but run: these match, or run as something else.
REFUSED = [
    scaled_down_weights,  # no product of experts any more
    other_offsets_in_the_second_product,
    counts_of_fewer_experts,
    counts_of_the_permutation,
    counts_of_an_input,
    unpermuted_by_the_permutation_itself,
    inverse_of_something_else,
    inverse_counted_backwards,
    weights_taken_before_the_sort,
    weights_in_another_order,
    tokens_gathered_by_another_width,
    sorted_downwards,
]
# Another gate, and a formula for it.
MATCHED = {
    activation_on_the_up_half: "silu(up) * gate",
    clamp_in_the_gate_region: "silu(clamp_max(clamp_min(gate, -1.0), 1.0)) * up",
    scaled_before_the_second_product: "(silu(gate) * up) * 2.0",
}


@pytest.mark.parametrize("mutate", DECLINED, ids=lambda mutate: mutate.__name__)
def test_declines_with_a_reason_what_only_looks_like_a_block(prefill, profile, mutate):
    names = _nodes(prefill, prefill.block(1))
    mutate(names)
    first, changed, last = find_blocks(prefill.graph)
    assert isinstance(first, Experts) and isinstance(last, Experts)
    assert isinstance(changed, Declined)
    assert changed.output is names["second"]
    assert DECLINED[mutate] in changed.reason
    assert prefill.unit(profile).layer_of(changed.router) == profile.layers[1]


@pytest.mark.parametrize("mutate", [*DECLINED, *REFUSED], ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("graph", ["prefill", "bfloat16", "dynamic"])
def test_a_change_of_meaning_is_never_rewritten(request, profile, graph, mutate):
    traced = request.getfixturevalue(graph)
    mutate(_nodes(traced, traced.block(1)))
    unit = traced.unit(profile)
    run_passes(traced.gm, unit, [provide_modality, skip_experts])
    assert unit.layers() == [profile.layers[0].name, profile.layers[2].name]
    assert traced.count(masked_moe) == 2
    assert all(report.reason for report in unit.blocks if not report.rewritten)


@pytest.mark.parametrize("mutate", MATCHED, ids=lambda mutate: mutate.__name__)
def test_another_gate_is_rewritten_as_what_it_is(prefill, profile, mutate):
    mutate(_nodes(prefill, prefill.block(1)))
    block = prefill.block(1)
    assert isinstance(block, Experts)
    assert block.activation == MATCHED[mutate]
    keep_all = profile.with_thresholds(tau_text=-1.0, tau_vision=-1.0)
    prefill.gm.recompile()
    with torch.no_grad():
        want = prefill.gm(*prefill.inputs)
    unit = prefill.unit(keep_all)
    run_passes(prefill.gm, unit, PIPELINE)
    assert all(report.rewritten for report in unit.blocks)
    with torch.no_grad():
        *got, _ = prefill.gm(*prefill.inputs)
    torch.testing.assert_close(list(got), list(want), rtol=1e-4, atol=1e-4)
