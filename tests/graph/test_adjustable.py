"""Thresholds as an input of the graph, and counts as an output: the same bits as with constants."""

import math
import sys
from typing import Any

import pytest
import torch

from modes_fx.decisions import decide
from modes_fx.kernels.masked_moe import Call, masked_moe
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.passes import PIPELINE, run_passes
from modes_fx.passes.provide_modality import MODALITY
from modes_fx.testing.small_block import block_profile
from modes_fx.thresholds import Thresholds

NUM_EXPERTS, TOP_K, TOKENS = 8, 4, 30
PICTURES = {"visual_token_ids": (3,), "special_token_ids": (4,)}
ALPHAS = {"alpha_text": 0.9, "alpha_vision": 0.4}
KINDS = (torch.arange(TOKENS) % 3).to(torch.uint8)


@pytest.fixture
def rewrite(small, row_table):
    """Rewrite one block; gives `(run(text, vision), unit, traced)`.

    The modality comes from the wrapper, or with `rows` is read in the graph, see `row_table`.
    """

    def make(
        adjustable: Any = False,
        counting: bool = False,
        traits: Any = None,
        rows: bool = False,
        **constants: Any,
    ) -> Any:
        one = small(TOKENS, num_experts=NUM_EXPERTS, top_k=TOP_K, hidden=NUM_EXPERTS, **(traits or {}))
        profile = block_profile(one.block, **{**ALPHAS, **PICTURES, **constants})
        thresholds = Thresholds(profile, adjustable) if adjustable else None
        known = {"embeds": len(one.traced.inputs) - 1} if rows else {}
        unit = one.traced.unit(profile, thresholds=thresholds, counting=counting, **known)
        run_passes(one.traced.gm, unit, PIPELINE)
        assert unit.blocks[0].rewritten, unit.blocks[0].reason

        # "other" is what special tokens are.
        kinds = KINDS if profile.special_token_ids else KINDS % 2

        def run(**taus: float) -> Any:
            given = {MODALITY: kinds, **row_table(one.traced.inputs[-1])}
            if thresholds is not None:
                thresholds.set(**taus)
                given["thresholds"] = thresholds.on(torch.device("cpu"))
            with torch.no_grad():
                return one.traced.gm(*one.traced.inputs, *(given[name] for name in unit.extra_inputs))

        return run, unit, one.traced

    return make


TAUS = [
    (0.2, 0.05),
    (0.05, 0.2),
    (0.0, 0.0),
    (math.inf, 0.1),
    (0.1, math.inf),
    (math.inf, math.inf),
    (-1.0, 0.3),
]


@pytest.mark.parametrize(
    "traits",
    [{}, {"dtype": torch.bfloat16}, {"implementation": "dense"}, {"implementation": "batched_mm"}],
    ids=str,
)
def test_one_graph_gives_the_bits_of_each_pair_of_constants(rewrite, traits):
    run, unit, _ = rewrite(True, traits=traits)
    assert unit.extra_inputs == [MODALITY, "thresholds"]
    seen = []
    for text, vision in [*TAUS, TAUS[0]]:
        want, _, _ = rewrite(traits=traits, tau_text=text, tau_vision=vision)
        (got,) = run(text=text, vision=vision)
        assert torch.equal(got, want()[0]), (text, vision)
        seen.append(got)
    assert torch.equal(seen[0], seen[-1]) and not torch.equal(seen[0], seen[1])


def test_an_alpha_of_zero_drops_at_every_threshold_above_zero(rewrite):
    run, _, _ = rewrite(True, alpha_text=0.0, alpha_vision=0.0, tau_text=0.0, tau_vision=0.0)
    (kept,) = run(text=0.0, vision=0.0)
    (dropped,) = run(text=1e-30, vision=1e-30)
    assert kept.abs().amax(1).min() > 0
    other = KINDS.eq(OTHER)
    torch.testing.assert_close(dropped[other], kept[other])
    assert dropped[~other].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decisions_are_those_of_the_op(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(300, TOP_K, generator=generator).to(dtype)
    scores[::50] = math.nan
    kinds = (torch.arange(300) % 3).to(torch.uint8)
    some = torch.empty(1)
    # Thresholds that are scores themselves, where a rounding would decide otherwise.
    for tau in [*(0.9 * scores[1:40].float()).flatten().tolist(), 0.0, math.inf, -math.inf]:
        rule = {"alpha_text": 0.9, "alpha_vision": 0.4, "tau_text": tau, "tau_vision": tau / 2}
        want = Call(some, scores, scores, scores, kinds, some, some, **rule).keep()
        got = decide(scores, kinds, torch.tensor([tau, tau / 2]), 0.9, 0.4)
        assert torch.equal(got >= 0, want)
        assert torch.equal(
            decide(scores, None, torch.tensor([tau, 9.0]), 0.9, 0.4)[kinds == 0], got[kinds == 0]
        )


def test_the_graph_shows_the_alphas_and_reads_the_thresholds(rewrite):
    _, _, traced = rewrite(True)
    (node,), (rule,) = traced.all(masked_moe), traced.all(decide)
    assert node.args[1] is rule and node.args[4] is None
    assert rule.args[3:] == (0.9, 0.4)
    assert rule.args[2].op == "placeholder" and rule.args[2].name == "thresholds"


def test_a_model_of_text_alone_reads_no_modality(rewrite):
    constants = {"visual_token_ids": (), "special_token_ids": ()}
    run, unit, traced = rewrite(True, **constants)
    assert unit.blocks[0].specialised == ("no mask",) and unit.extra_inputs == ["thresholds"]
    (rule,) = traced.all(decide)
    assert rule.args[1] is None
    want, _, _ = rewrite(tau_text=0.1, tau_vision=9.0, **constants)
    assert torch.equal(run(text=0.1, vision=9.0)[0], want()[0])


# Bounds: what no threshold within them can keep is left out.


@pytest.mark.parametrize(
    "adjustable, saved",
    [(True, ()), ((0.5, 2.0), ("top 4 -> 3",)), ((0.9, 3.0), ("top 4 -> 1",)), ((1.0, 1.0), ("top 4 -> 1",))],
    ids=str,
)
def test_slots_that_no_threshold_within_the_bounds_keeps_are_left_out(rewrite, adjustable, saved):
    constants = {"special_token_ids": (), "alpha_text": 1.0, "alpha_vision": 0.9, "rows": True}
    run, unit, _ = rewrite(adjustable, tau_text=0.6, tau_vision=0.6, **constants)
    assert unit.blocks[0].specialised == saved
    factors = (0.1, 1.0, 9.0) if adjustable is True else adjustable
    for tau in [0.6 * factor for factor in factors]:
        plain, _, _ = rewrite(True, tau_text=0.6, tau_vision=0.6, **constants)
        assert torch.equal(run(text=tau, vision=tau)[0], plain(text=tau, vision=tau)[0])


def test_experts_that_no_threshold_within_the_bounds_keeps_are_deleted(rewrite):
    constants = {"special_token_ids": (), "tau_text": 3.0, "tau_vision": 3.0}
    run, unit, traced = rewrite((0.5, 2.0), counting=True, rows=True, **constants)
    assert unit.blocks[0].specialised == ("deleted",) and traced.count(masked_moe) == 0
    out, _, counts = run(text=1.5, vision=6.0)
    assert out.abs().max() == 0
    half = TOP_K * TOKENS // 2
    assert counts.tolist() == [[[half, half, 0]] * 2]


# Every rewrite is proved, this one too.


def swapped_alphas(rule):
    rule.update_arg(3, 0.4)
    rule.update_arg(4, 0.9)


def another_alpha(rule):
    rule.update_arg(3, 0.95)


def without_modality(rule):
    rule.update_arg(1, None)


def swapped_thresholds(rule):
    with rule.graph.inserting_before(rule):
        rule.update_arg(2, rule.graph.call_function(torch.ops.aten.flip.default, (rule.args[2], [0])))


def reversed_weights(rule):
    with rule.graph.inserting_before(rule):
        rule.update_arg(0, rule.graph.call_function(torch.ops.aten.flip.default, (rule.args[0], [1])))


@pytest.mark.parametrize(
    "wrong", [swapped_alphas, another_alpha, without_modality, swapped_thresholds, reversed_weights]
)
# The proof must not depend on thresholds that a profile has not got yet.
@pytest.mark.parametrize("taus", [(0.2, 0.05), (0.0, 0.0)], ids=str)
def test_a_wrong_decision_is_refused(small, monkeypatch, wrong, taus):
    module = sys.modules["modes_fx.passes.skip_experts"]
    honest = module.build

    def build(*args: Any) -> Any:
        last = honest(*args)
        wrong(last.args[1])
        return last

    monkeypatch.setattr(module, "build", build)
    one = small(TOKENS, num_experts=NUM_EXPERTS, top_k=TOP_K, hidden=NUM_EXPERTS)
    profile = block_profile(one.block, **ALPHAS, **PICTURES, tau_text=taus[0], tau_vision=taus[1])
    unit = one.traced.unit(profile, thresholds=Thresholds(profile))
    run_passes(one.traced.gm, unit, PIPELINE)
    assert unit.blocks[0].reason.startswith("the rewrite differs from the model: ")
    assert one.traced.count(masked_moe) == 0


# Counts.


@pytest.mark.parametrize("adjustable", [False, True])
@pytest.mark.parametrize("special", [(4,), ()], ids=["special", "no special"])
@pytest.mark.parametrize("tau", [0.0, 0.12, math.inf])
def test_counts_are_those_of_the_rule(rewrite, adjustable, special, tau):
    taus = {"tau_text": tau, "tau_vision": tau / 2}
    run, _, traced = rewrite(adjustable, counting=True, special_token_ids=special, **taus)
    plain, _, _ = rewrite(adjustable, special_token_ids=special, **taus)
    out, counts = run()
    assert torch.equal(out, plain()[0])
    assert counts.shape == (1, 2, 3) and counts.dtype == torch.int64
    kinds = KINDS if special else KINDS % 2
    is_of = [kinds.eq(kind) for kind in (TEXT, VISION, OTHER)]
    assert counts[0, 0].tolist() == [TOP_K * int(each.sum()) for each in is_of]
    some, scores = torch.empty(1), weights_of(traced)
    keep = Call(some, scores, some, some, kinds, some, some, **ALPHAS, **taus).keep()
    assert counts[0, 1].tolist() == [int((~keep[each]).sum()) for each in is_of]
    assert counts[0, 1, 2] == 0


def weights_of(traced: Any) -> torch.Tensor:
    """The routing weights, by the model's own definition: softmax, the largest, divided by their sum."""
    *parameters, x = traced.inputs
    router = next(p for p in parameters if p.shape == (NUM_EXPERTS, NUM_EXPERTS))
    chosen = (x @ router.t()).softmax(-1).topk(TOP_K).values
    return chosen / chosen.sum(-1, keepdim=True)
