"""drop_modality, delete_experts, narrow_slots: what the constants allow to leave out changes no bit."""

import math
from typing import Any

import pytest
import torch

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.provide_modality import MODALITY
from modes_fx.testing.small_block import block_profile

aten = torch.ops.aten

SPECIALISE = ["drop_modality", "delete_experts", "narrow_slots"]
NUM_EXPERTS, TOP_K = 8, 6
ROUTERS: dict[str, dict[str, Any]] = {
    "renormalised": {},
    "not renormalised": {"renormalise": None},
    "over the chosen": {"score": "chosen", "renormalise": None},
    "scaled": {"factor": 2.5},
    "halved, not renormalised": {"factor": 0.5, "renormalise": None},
    "renormalised with eps": {"renormalise": "eps"},
}
DTYPES = [torch.float32, torch.bfloat16]


def third(towards: float) -> float:
    return torch.nextafter(torch.tensor(1 / 3), torch.tensor(towards)).item()


# Thresholds in units of the largest weight: on 1/j, a rounding beside it, and past one.
THETAS = [0.05, 1 / 6, 1 / 5, 0.25, third(0), 1 / 3, third(1), 0.4, 0.4999999, 0.5, 0.5000001, 0.75]
THETAS += [0.9999, 1.0, 1.00005, 1.02, 1.05, 3.0]


@pytest.fixture
def specialised(small, row_table):
    """Rewrite one block and run it: `(output, unit, graph)`.

    The modality comes from the wrapper, or with `rows` is read in the graph, see `row_table`.
    """

    def run(disable=(), tokens=None, traits=None, *, rows=False, **constants) -> Any:
        one = small(40, num_experts=NUM_EXPERTS, top_k=TOP_K, hidden=NUM_EXPERTS, **(traits or {}))
        # The router is the identity, so that the rows say what the logits are.
        router, x = torch.eye(NUM_EXPERTS, dtype=one.block.traits.dtype), adversarial(one.block.traits.dtype)
        one.block.router.data.copy_(router)
        *parameters, _ = one.traced.inputs
        known = {"embeds": len(parameters)} if rows else {}
        unit = one.traced.unit(block_profile(one.block, **constants), **known)
        run_passes(one.traced.gm, unit, PIPELINE, disable=disable)
        given = {MODALITY: torch.zeros(40, dtype=torch.uint8) if tokens is None else tokens, **row_table(x)}
        with torch.no_grad():
            out = one.traced.gm(*parameters, x, *(given[name] for name in unit.extra_inputs))[0]
        assert unit.blocks[0].rewritten, unit.blocks[0].reason
        return out, unit, one.traced

    return run


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """Tokens whose weights are `1/j` on `j` experts, exactly or nearly, or anything: `[40, E]`."""
    exact = [[0.0] * j + [-60.0] * (NUM_EXPERTS - j) for j in range(1, NUM_EXPERTS + 1)]
    generator = torch.Generator().manual_seed(0)
    near = torch.tensor(exact) + 1e-3 * torch.randn(NUM_EXPERTS, NUM_EXPERTS, generator=generator)
    some = torch.randn(40 - 3 * NUM_EXPERTS, NUM_EXPERTS, generator=generator) * 3
    turned = torch.tensor(exact).flip(1) + 2.0
    return torch.cat([torch.tensor(exact), near, turned, some]).to(dtype)


@pytest.mark.parametrize("dtype, alpha", [(torch.float32, 0.37), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("router", ROUTERS)
def test_bit_equal_to_the_rewrite_without_it(specialised, router, dtype, alpha):
    traits = {**ROUTERS[router], "dtype": dtype}
    seen = set()
    for theta in THETAS:
        constants = {"alpha_text": alpha, "tau_text": alpha * theta * traits.get("factor", 1.0)}
        want, plain, _ = specialised(SPECIALISE, traits=traits, **constants)
        got, unit, _ = specialised(traits=traits, **constants)
        assert plain.blocks[0].specialised == ()
        assert torch.equal(got, want), (theta, unit.blocks[0].specialised)
        seen.update(unit.blocks[0].specialised)
    assert {"no mask", "deleted", "top 6 -> 1", "top 6 -> 2", "top 6 -> 3", "top 6 -> 4"} <= seen


@pytest.mark.parametrize("name", SPECIALISE)
@pytest.mark.parametrize("theta", [0.4, 1.5])
def test_each_is_exact_alone(specialised, name, theta):
    others = [each for each in SPECIALISE if each != name]
    got, unit, _ = specialised(others, tau_text=theta, visual_token_ids=())
    want, _, _ = specialised(SPECIALISE, tau_text=theta)
    assert torch.equal(got, want)
    if name == "delete_experts" and theta < 1:
        assert unit.counts[name] == 0


TWO_THRESHOLDS = {
    "tau_text": 0.9,
    "alpha_text": 1.0,
    "tau_vision": 0.45,
    "alpha_vision": 1.0,
    "visual_token_ids": (3,),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "traits", [{"factor": 2.5}, {"shared": True}, {"implementation": "batched_mm"}], ids=str
)
def test_the_larger_of_the_two_modalities_decides(specialised, traits, dtype):
    scale = {"weight_scale": traits.get("factor", 1.0)}
    traits = {**traits, "dtype": dtype}
    got, unit, _ = specialised(traits=traits, rows=True, **TWO_THRESHOLDS, **scale)
    want, _, _ = specialised(SPECIALISE, traits=traits, rows=True, **TWO_THRESHOLDS, **scale)
    assert unit.blocks[0].specialised == ("top 6 -> 2",)
    assert torch.equal(got, want)


@pytest.mark.parametrize("tau", [0.45, 1.5])
def test_a_call_whose_modality_may_be_unknown_keeps_every_slot(specialised, tau):
    # The wrapper then gives OTHER for every token, of which nothing is dropped.
    unknown = torch.full((40,), 2, dtype=torch.uint8)
    got, unit, _ = specialised(tokens=unknown, **{**TWO_THRESHOLDS, "tau_vision": tau, "tau_text": tau + 0.1})
    assert unit.blocks[0].specialised == ()
    everything, _, _ = specialised(tau_text=0.0)
    assert torch.equal(got, everything)


@pytest.mark.parametrize(
    "theta, saved",
    [
        (0.0, ("no mask",)),
        (0.1, ("no mask",)),
        (0.18, ("no mask", "top 6 -> 5")),
        (0.3, ("no mask", "top 6 -> 3")),
        (0.9, ("no mask", "top 6 -> 1")),
        (1.1, ("no mask", "deleted")),
        (math.inf, ("no mask", "deleted")),
        (-math.inf, ("no mask",)),
    ],
)
def test_the_report_says_what_was_saved(specialised, theta, saved):
    _, unit, traced = specialised(tau_text=theta)
    assert unit.blocks[0].specialised == saved
    for node in traced.all(masked_moe):
        slots = {tuple(node.args[i].meta["val"].shape) for i in (1, 2, 3)}
        assert slots == {(40, next((int(how[9:]) for how in saved if "->" in how), 6))}


@pytest.mark.parametrize(
    "traits",
    [
        {"is_sorted": False},
        {"score": "sigmoid", "renormalise": None},
        {"choice_bias": True},
        {"groups": 4},
        {"per_expert_scale": True},
        {"score": "sigmoid", "choice_bias": True, "groups": 2},
        {"implementation": "dense"},
    ],
    ids=str,
)
@pytest.mark.parametrize("theta", [0.3, 0.9])
def test_never_narrowed_where_the_weights_may_not_be_in_order_or_of_bounded_sum(specialised, traits, theta):
    got, unit, traced = specialised(traits=traits, tau_text=theta)
    assert unit.blocks[0].specialised == ("no mask",)
    assert traced.count(masked_moe) == 1
    want, _, _ = specialised(SPECIALISE, traits=traits, tau_text=theta)
    assert torch.equal(got, want)


@pytest.mark.parametrize("traits", [{"per_expert_scale": True}, {"implementation": "dense"}], ids=str)
def test_never_deleted_where_a_weight_may_be_of_any_size(specialised, traits):
    _, unit, traced = specialised(traits=traits, tau_text=5.0)
    assert unit.blocks[0].specialised == ("no mask",)
    assert traced.count(masked_moe) == 1


@pytest.mark.parametrize("traits", [{"is_sorted": False}, {"score": "sigmoid", "renormalise": None}], ids=str)
def test_deleted_without_order_or_sum(specialised, traits):
    got, unit, _ = specialised(traits=traits, tau_text=1.01)
    assert unit.blocks[0].specialised == ("no mask", "deleted")
    assert torch.equal(got, specialised(SPECIALISE, traits=traits, tau_text=1.01)[0])


@pytest.mark.parametrize("theta", [0.4, 1.5])
def test_special_tokens_keep_every_slot(specialised, theta):
    tokens = (torch.arange(40) % 3).to(torch.uint8)
    constants = {"tau_text": theta, "tau_vision": theta, "special_token_ids": (4,), "visual_token_ids": (3,)}
    got, unit, traced = specialised(tokens=tokens, **constants)
    assert unit.blocks[0].specialised == ()
    assert traced.count(masked_moe) == 1
    assert unit.extra_inputs == [MODALITY]
    assert torch.equal(got, specialised(SPECIALISE, tokens, **constants)[0])
    assert got[2].abs().max() > 0


def test_without_visual_and_special_tokens_there_is_no_mask(specialised):
    _, unit, traced = specialised(tau_text=0.05)
    assert unit.extra_inputs == []
    assert [node.args[4] for node in traced.all(masked_moe)] == [None]
    # Vision has other constants, which nothing reads.
    _, unit, _ = specialised(tau_text=0.05, tau_vision=9.0, alpha_vision=0.1)
    assert unit.blocks[0].specialised == ("no mask",)


def test_with_equal_constants_there_is_no_mask(specialised):
    tokens = (torch.arange(40) % 2).to(torch.uint8)
    constants = {"tau_text": 0.12, "tau_vision": 0.12, "visual_token_ids": (3,)}
    got, unit, _ = specialised(tokens=tokens, **constants)
    assert unit.blocks[0].specialised == ("no mask",)
    assert torch.equal(got, specialised(SPECIALISE, tokens, **constants)[0])
    _, unit, _ = specialised(tokens=tokens, **{**constants, "tau_vision": 0.13})
    assert unit.extra_inputs == [MODALITY]


@pytest.mark.parametrize("tau", [0.0, -0.5])
def test_with_nothing_to_drop_there_is_no_mask_even_for_special_tokens(specialised, tau):
    tokens = (torch.arange(40) % 3).to(torch.uint8)
    constants = {"tau_text": tau, "tau_vision": tau, "special_token_ids": (4,), "visual_token_ids": (3,)}
    got, unit, _ = specialised(tokens=tokens, **constants)
    assert unit.blocks[0].specialised == ("no mask",)
    assert torch.equal(got, specialised(SPECIALISE, tokens, **constants)[0])


def test_deleted_experts_take_the_router_with_them_and_leave_the_shared_expert(specialised, small):
    got, unit, traced = specialised(traits={"shared": True}, tau_text=1.5)
    assert unit.blocks[0].specialised == ("no mask", "deleted")
    assert traced.count(masked_moe, aten.topk.default, aten._softmax.default) == 0
    # The one product that is left is the shared expert's.
    assert traced.count(aten.mm.default) == 1
    shared = small(40, num_experts=8, top_k=6, hidden=8, shared=True).block.shared
    assert torch.equal(got, adversarial(torch.float32) @ shared.t())


def test_an_importance_of_zero_deletes_at_any_threshold_above_zero(specialised):
    got, unit, _ = specialised(alpha_text=0.0, tau_text=1e-9)
    assert unit.blocks[0].specialised == ("no mask", "deleted")
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("tokens", [1, 3])
def test_specialised_for_any_number_of_tokens(small, tokens):
    one = small(40, num_experts=8, top_k=6, hidden=8, dynamic=True)
    unit = one.traced.unit(block_profile(one.block, tau_text=0.4))
    run_passes(one.traced.gm, unit, PIPELINE)
    assert unit.blocks[0].specialised == ("no mask", "top 6 -> 2")
    *parameters, x = one.traced.inputs
    with torch.no_grad():
        whole, part = one.traced.gm(*parameters, x)[0], one.traced.gm(*parameters, x[:tokens])[0]
    torch.testing.assert_close(part, whole[:tokens])
