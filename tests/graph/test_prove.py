"""prove: no deliberately wrong rewrite holds; every right one does, in each dtype and at awkward scales."""

import dataclasses
import sys
from typing import Any

import pytest
import torch

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes import provide_modality, run_passes, skip_experts
from modes_fx.passes.prove import Constants, Proof, prove
from modes_fx.passes.unit import Unit
from modes_fx.profile import Profile
from modes_fx.testing.small_block import GATED, UNGATED, SmallBlock, Traits, block_profile, trace_block

aten = torch.ops.aten

DTYPES = [torch.float32, torch.bfloat16]
CONSTANTS = {
    "alpha_text": 0.9,
    "alpha_vision": 0.4,
    "tau_text": 0.25,
    "tau_vision": 0.2,
    "visual_token_ids": (3,),
    "special_token_ids": (4,),
}


@pytest.fixture
def attempt(monkeypatch):
    """Rewrite a graph with `mutate(node, layer)` let loose on each new node; the blocks' reports."""

    def run(traced: Any, profile: Profile, mutate: Any = lambda node: None) -> Any:
        # The package's attribute of that name is the pass.
        module = sys.modules["modes_fx.passes.skip_experts"]
        honest = module.build

        def build(*args: Any) -> Any:
            last = honest(*args)
            mutate(last if last.target is masked_moe else last.args[0])
            return last

        monkeypatch.setattr(module, "build", build)
        unit = traced.unit(profile)
        changed = run_passes(traced.gm, unit, [provide_modality, skip_experts])["skip_experts"]
        assert changed == traced.count(masked_moe) == sum(report.rewritten for report in unit.blocks)
        return unit.blocks

    return run


def assert_refused(report: Any) -> None:
    assert not report.rewritten
    assert report.reason.startswith("the rewrite differs from the model: ")


def setting(**changes: Any) -> Any:
    def mutate(node: Any) -> None:
        node.kwargs = {**node.kwargs, **changes}

    return mutate


def flipping(name: str) -> Any:
    def mutate(node: Any) -> None:
        node.kwargs = {**node.kwargs, name: not node.kwargs.get(name, False)}

    return mutate


def swapping(one: str, other: str) -> Any:
    def mutate(node: Any) -> None:
        node.kwargs = {**node.kwargs, one: node.kwargs[other], other: node.kwargs[one]}

    return mutate


def scaling(name: str, factor: float) -> Any:
    def mutate(node: Any) -> None:
        node.kwargs = {**node.kwargs, name: factor * node.kwargs[name]}

    return mutate


HIDDEN, SCORES, WEIGHTS, EXPERTS, MODALITY, GATE_UP, DOWN, GATE_UP_BIAS, DOWN_BIAS = range(9)


def argument(position: int, target: Any, *more: Any) -> Any:
    """Another operator on one argument of the op."""

    def mutate(node: Any) -> None:
        with node.graph.inserting_before(node):
            node.update_arg(position, node.graph.call_function(target, (node.args[position], *more)))

    return mutate


def without(position: int) -> Any:
    return lambda node: node.update_arg(position, None)


ACTIVATIONS = {
    "gelu for silu": setting(activation="gelu(gate) * up"),
    "relu for silu": setting(activation="relu(gate) * up"),
    "sigmoid for silu": setting(activation="sigmoid(gate) * up"),
    "gate and up swapped": setting(activation="silu(up) * gate"),
    "no up": setting(activation="silu(gate)"),
    "a limit that is none of the model's": setting(activation="silu(clamp_max(gate, 7.0)) * up"),
}
LAYOUT = {
    "interleaved": flipping("interleaved"),
    "transposed": flipping("is_transposed"),
    "weights on the input": flipping("weights_on_input"),
    "renormalised": flipping("renormalise"),
}
TENSORS = {
    "weights in another order": argument(WEIGHTS, aten.flip.default, [1]),
    "weights doubled": argument(WEIGHTS, aten.mul.Tensor, 2.0),
    "experts in another order": argument(EXPERTS, aten.flip.default, [1]),
    "the next expert": argument(EXPERTS, aten.sub.Tensor, 1),
    "the next expert, past the last": argument(EXPERTS, aten.add.Tensor, 1),
    "the next expert, around": lambda node: (
        argument(EXPERTS, aten.add.Tensor, 1)(node),
        argument(EXPERTS, aten.remainder.Scalar, 8)(node),
    ),
    "tokens in another order": argument(HIDDEN, aten.roll.default, [1], [0]),
    "an activation on the input": argument(HIDDEN, aten.relu.default),
    "gate_up of another expert": argument(GATE_UP, aten.roll.default, [1], [0]),
    "down of another expert": argument(DOWN, aten.roll.default, [1], [0]),
    "scores for weights, and weights for scores": argument(SCORES, aten.mul.Tensor, 0.5),
    "scores in another order": argument(SCORES, aten.mul.Tensor, 1.05),
}
BIASES = {
    "no bias of gate_up": without(GATE_UP_BIAS),
    "no bias of down": without(DOWN_BIAS),
    "bias of gate_up of another expert": argument(GATE_UP_BIAS, aten.roll.default, [1], [0]),
    "bias of down of another expert": argument(DOWN_BIAS, aten.roll.default, [1], [0]),
}
RULE = {
    "alphas swapped": swapping("alpha_text", "alpha_vision"),
    "thresholds swapped": swapping("tau_text", "tau_vision"),
    "text tokens as vision": lambda node: (
        setting(alpha_text=node.kwargs["alpha_vision"])(node),
        setting(tau_text=node.kwargs["tau_vision"])(node),
    ),
    "nearly alpha of text": scaling("alpha_text", 0.95),
    "nearly alpha of vision": scaling("alpha_vision", 1.05),
    "nearly tau of text": scaling("tau_text", 1.05),
    "nearly tau of vision": scaling("tau_vision", 0.95),
    "alpha of text zero": setting(alpha_text=0.0),
    "nothing dropped": setting(tau_text=0.0, tau_vision=0.0),
    "everything dropped": setting(tau_text=float("inf"), tau_vision=float("inf")),
    "every token text": without(MODALITY),
    "the other modality": argument(MODALITY, aten.bitwise_xor.Scalar, 1),
    "special tokens as text": argument(MODALITY, aten.remainder.Scalar, 2),
}


def named(table: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("mutate", table.values(), ids=[name.replace(" ", "-") for name in table])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named({**ACTIVATIONS, **LAYOUT, **TENSORS})
def test_refuses_another_computation(small, attempt, mutate, dtype):
    one = small(dtype=dtype)
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS), mutate)
    assert_refused(report)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(ACTIVATIONS)
def test_refuses_another_activation_whatever_the_size_of_the_weights(small, attempt, mutate, dtype, scale):
    one = small(dtype=dtype, scale=scale)
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS), mutate)
    assert_refused(report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named({**LAYOUT, **TENSORS, **BIASES})
def test_refuses_another_layout_where_every_shape_fits(small, attempt, mutate, dtype):
    # Without a gate and with I = H both products are square. Of an ungated product the halves cannot be
    # swapped, so `interleaved` says nothing.
    if mutate is LAYOUT["interleaved"]:
        return
    traits = {"dtype": dtype, "gate": "gelu of all", "biased": True, "hidden": 16, "intermediate": 16}
    one = small(**traits)
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS), mutate)
    assert_refused(report)


@pytest.mark.parametrize(
    "tokens, top_k, dtype",
    [(40, 2, torch.float32), (1, 1, torch.bfloat16), (1, 3, torch.float32), (2, 1, torch.bfloat16)],
)
@named(RULE)
def test_refuses_other_constants_however_few_the_tokens(small, attempt, mutate, tokens, top_k, dtype):
    one = small(tokens, dtype=dtype, top_k=top_k)
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS), mutate)
    assert_refused(report)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "gate, wrong",
    [
        ("limits", "silu(gate) * clamp_max(clamp_min(up, -7.0), 7.0)"),
        ("limits", "silu(clamp_max(gate, 7.0)) * up"),
        ("limits", "silu(clamp_max(gate, 8.0)) * clamp_max(clamp_min(up, -7.0), 7.0)"),
        ("softcaps", "silu(gate) * up"),
        ("tanh", "gate * up"),
        ("relu squared", "square(x)"),
        ("relu squared", "relu(x)"),
        ("gelu of all", "silu(x)"),
    ],
)
def test_refuses_a_limit_or_an_activation_that_is_overlooked(small, attempt, gate, wrong, dtype):
    one = small(gate=gate, dtype=dtype)
    (report,) = attempt(one.traced, block_profile(one.block), setting(activation=wrong))
    assert_refused(report)


def test_tells_the_two_gelus_apart_in_float32(small, attempt):
    # In bfloat16 they differ by less than a rounding, and either passes.
    one = small(gate="gelu")
    (report,) = attempt(one.traced, block_profile(one.block), setting(activation="gelu_tanh(gate) * up"))
    assert_refused(report)


@pytest.mark.parametrize("graph", ["prefill", "dynamic", "bfloat16", "decode"])
@pytest.mark.parametrize("position", [GATE_UP, DOWN], ids=["gate_up", "down"])
def test_refuses_the_weights_of_another_layer(request, attempt, profile, graph, position):
    traced = request.getfixturevalue(graph)
    others = [traced.block(i).parameters()[position - GATE_UP] for i in (1, 2, 0)]
    turn = iter(others)
    for report in attempt(traced, profile, lambda node: node.update_arg(position, next(turn))):
        assert_refused(report)
        assert "no input of the block" in report.reason


@pytest.mark.parametrize("graph", ["prefill", "dynamic", "bfloat16", "decode"])
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_refuses_alpha_of_another_layer(request, attempt, profile, graph, kind):
    traced = request.getfixturevalue(graph)
    alphas = [getattr(layer, f"alpha_{kind}") for layer in profile.layers]
    turn = iter([*alphas[1:], alphas[0]])
    for report in attempt(traced, profile, lambda node: setting(**{f"alpha_{kind}": next(turn)})(node)):
        assert_refused(report)


@pytest.mark.parametrize("part", ["hidden", "experts", "weights"])
def test_refuses_an_input_of_another_layer(prefill, attempt, profile, part):
    others = [getattr(prefill.block(i), part) for i in (1, 2)]
    turn = iter(others)
    position = {"hidden": HIDDEN, "experts": EXPERTS, "weights": WEIGHTS}[part]
    last = next(reversed(prefill.graph.find_nodes(op="output")))

    def mutate(node):
        # A node of a later layer has to come first to be read.
        other = next(turn, None)
        if other is not None:
            last.prepend(node)
            node.update_arg(position, other)

    reports = attempt(prefill, profile, mutate)
    assert [report.rewritten for report in reports] == [False, False, True]
    for report in reports[:2]:
        assert_refused(report)


AWKWARD = {
    "one token": {"tokens": 1},
    "one token, one slot": {"tokens": 1, "top_k": 1},
    "two thousand tokens": {"tokens": 2000},
    "as many tokens as every other size": {"tokens": 16, "num_experts": 16, "intermediate": 16, "top_k": 1},
    "one expert": {"num_experts": 1, "top_k": 1},
    "every expert chosen": {"top_k": 8},
    "small weights": {"scale": 1e-3},
    "large weights": {"scale": 30.0},
    "small biases beside large weights": {"scale": 30.0, "biased": True},
    "odd sizes": {"hidden": 13, "intermediate": 7, "implementation": "batched_mm"},
    "width one": {"hidden": 1, "intermediate": 1, "implementation": "batched_mm"},
    "narrow": {"hidden": 2, "intermediate": 1, "implementation": "batched_mm"},
    "wide": {"hidden": 512, "intermediate": 384, "top_k": 2},
    "symbolic": {"dynamic": True},
    "dense": {"implementation": "dense"},
    "dense, weights on the input": {"implementation": "dense", "weights_on_input": True, "tokens": 1},
    **{gate: {"gate": gate, "scale": 30.0} for gate in (*GATED, *UNGATED)},
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("traits", AWKWARD.values(), ids=[name.replace(" ", "-") for name in AWKWARD])
def test_a_right_rewrite_holds(small, attempt, traits, dtype):
    one = small(dtype=dtype, **traits)
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS))
    assert report.rewritten, report.reason


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(
    "constants",
    [
        {"alpha_text": 0.0},
        {"alpha_text": 1e-9},
        {"alpha_text": 1e9, "alpha_vision": 1e-30},
        {"tau_text": float("inf"), "tau_vision": float("inf")},
        {"tau_text": float("-inf"), "tau_vision": 0.0},
        {"tau_text": -0.1},
        {"weight_scale": 2.5},
    ],
    ids=str,
)
def test_a_right_rewrite_holds_whatever_the_constants(small, attempt, constants, dtype):
    one = small(dtype=dtype)
    (report,) = attempt(one.traced, block_profile(one.block, **{**CONSTANTS, **constants}))
    assert report.rewritten, report.reason


def test_a_graph_of_no_tokens_is_rewritten(small, attempt):
    one = small(0, implementation="batched_mm")
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS))
    assert report.rewritten, report.reason


def test_refuses_dense_experts_that_give_something_for_nothing():
    # Of a token with weight zero too, which a choice of experts leaves out.
    class Leaky(SmallBlock):
        def _apply_gate(self, y):
            gate, up = y.chunk(2, dim=-1)
            return torch.sigmoid(gate) * (up + 1)

    block = Leaky(Traits(implementation="dense", weights_on_input=True))
    gm, inputs = trace_block(block, torch.randn(9, 16))
    unit = Unit(block_profile(block, **CONSTANTS), inputs)
    assert run_passes(gm, unit, [provide_modality, skip_experts])["skip_experts"] == 0
    assert_refused(unit.blocks[0])
    assert "matched nodes" in unit.blocks[0].reason


def test_refuses_a_number_of_tokens_that_depends_on_data(small, attempt):
    one = small(dynamic=True)
    hidden = one.traced.block().hidden
    value = hidden.meta["val"]
    some = value.fake_mode.shape_env.create_unbacked_symint()
    with value.fake_mode:
        hidden.meta["val"] = torch.empty(some, 16)
    (report,) = attempt(one.traced, block_profile(one.block, **CONSTANTS))
    assert_refused(report)
    assert "depends on data" in report.reason


@pytest.mark.parametrize("broken", ["gate_up", "down"])
def test_does_not_hold_where_weights_are_not_numbers(prefill, profile, broken):
    block = prefill.block()
    real = {parameter: prefill.real(parameter) for parameter in block.parameters()}
    parameter = getattr(block, broken)
    real[parameter] = torch.full_like(real[parameter], float("nan"))
    proof = proved(prefill, block, real)
    assert not proof.holds


@pytest.mark.parametrize("swap", [("gate_up", "down"), ("hidden", "weights")], ids="-".join)
def test_a_match_with_two_parts_swapped_does_not_hold(prefill, swap):
    block = prefill.block()
    one, other = swap
    swapped = dataclasses.replace(block, **{one: getattr(block, other), other: getattr(block, one)})
    real = {parameter: prefill.real(parameter) for parameter in block.parameters()}
    proof = proved(prefill, swapped, real)
    assert not proof.holds
    assert "it does not run" in str(proof)


def test_leaves_the_random_numbers_of_the_caller_alone(prefill):
    block = prefill.block()
    real = {parameter: prefill.real(parameter) for parameter in block.parameters()}
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    assert proved(prefill, block, real).holds
    assert torch.equal(torch.rand(2), want)


def test_says_how_far_apart_and_how_far_is_allowed():
    proof = Proof(0.25, 1e-6, "matched nodes")
    assert not proof.holds
    assert str(proof) == "relative error of the matched nodes 0.25, allowed 1e-06"
    assert not Proof(float("nan"), 1.0).holds


def proved(traced: Any, block: Any, real: Any) -> Proof:
    """Of the block against itself: nothing was rewritten."""
    nothing = Constants(1.0, 1.0, 0.0, 0.0)
    return prove(block, block.output, next(iter(traced.graph.nodes)), real, nothing)
