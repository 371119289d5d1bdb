"""Policies: what each rule drops on weights worked out by hand, how all are tuned, and the marginal costs."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from modes_fx.blocks import find_blocks
from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter, answer_logits, evaluating, kl_sum
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.policies import Bench, Policy, equal_cost, marginal, tune
from modes_fx.policies.batch_aware import ExpertsRead, batch_aware, token_by_token
from modes_fx.policies.equal_cost import (
    Found,
    GroupWeights,
    as_profile,
    group_rule,
    held_out,
    is_surely_less,
    marginal_costs,
    tune_marginal,
)
from modes_fx.policies.policy import PairRecorder, ranks
from modes_fx.policies.reduce_k import halving, reduced_k
from modes_fx.policies.relative import ser
from modes_fx.policies.tail import diep, expert_similarity, mc_moe, naee, tail_mass
from modes_fx.policies.two_thresholds import dmt, gmlg, modes, plain, tempered
from modes_fx.skipping import Counts, Rule, Tokens, block_alphas, keep_all, simulate, thresholds
from modes_fx.skipping import skip as skipping
from modes_fx.testing import IMAGE, SPECIAL, VIDEO, tiny_inputs, tiny_qwen3_vl_moe

IDS = ((IMAGE, VIDEO), SPECIAL)
WEIGHTS = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])


def tokens(*modality: int, **more: Any) -> Tokens:
    return Tokens(torch.tensor(modality, dtype=torch.uint8), torch.ones(len(modality)).bool(), **more)


ALL_TEXT = tokens(TEXT, TEXT, TEXT)


def labelled(seed: int) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(text=13, batch=3, grid=(8, 8), seed=seed)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [labelled(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def profile(model, batches):
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False)


@pytest.fixture(scope="module")
def bench(model, batches) -> Bench:
    pairs = PairRecorder()
    return Bench(Meter(model, batches, *IDS, observe=pairs), pairs)


def dropped(policy: Policy, strength: float, of: Tokens = ALL_TEXT, shape: tuple[float, ...] = ()) -> Any:
    return policy.rule(shape or policy.shape, strength)(0, WEIGHTS, of)


# Rules


def test_ranks_and_tail_mass_follow_the_weights_not_the_slots():
    assert ranks(WEIGHTS).tolist() == [[0, 1, 2, 3], [2, 0, 3, 1], [0, 1, 2, 3]]
    wanted = [[1.0, 0.5, 0.3, 0.1], [0.2, 1.0, 0.1, 0.4], [1.0, 0.75, 0.5, 0.25]]
    assert torch.allclose(tail_mass(WEIGHTS), torch.tensor(wanted))


def test_naee_is_top_p_inside_the_top_k():
    got = dropped(naee(1), math.log(0.35))
    assert got.tolist() == [
        [False, False, True, True],
        [True, False, True, False],
        [False, False, False, True],
    ]
    everything = dropped(naee(1), 0.0)
    assert (~everything).sum(-1).tolist() == [1, 1, 1]  # the first choice stays at any strength


def test_ser_compares_with_the_first_choice():
    got = dropped(ser(), math.log(0.35))
    assert got.tolist() == [[False, False, False, True], [True, False, True, True], [False] * 4]
    got = dropped(ser(least=2), math.log(0.999))
    assert (~got).sum(-1).tolist() == [2, 2, 4]


def test_mc_moe_protects_the_most_important_tokens():
    hidden = torch.ones(60, 4)
    hidden[7] = 50.0
    many = tokens(*[TEXT] * 60, hidden=hidden, left=torch.full((60,), 9))
    weights = WEIGHTS[:1].expand(60, 4)
    got = mc_moe(1).rule((0.0,), 0.0)(0, weights, many)
    assert got[7].sum() == 0 and (got.sum(-1) == 3).sum() == 59
    # Near the end of the sequence little attention is still to come, so what is there counts more.
    near = Tokens(many.modality, many.real, hidden=torch.ones(60, 4), left=torch.arange(60, 0, -1))
    got = mc_moe(1).rule((0.0,), 0.0)(0, weights, near)
    assert got[-1].sum() == 0 and got[0].sum() == 3


def test_diep_drops_an_expert_sooner_that_does_what_a_kept_one_does():
    alike = torch.ones(5, 5)
    alike[0, 1] = alike[1, 0] = 3.0
    policy = diep([alike])
    weights = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    of = tokens(TEXT, TEXT, experts=torch.tensor([[0, 1], [0, 2]]))
    got = policy.rule((0.0,), math.log(0.2))(0, weights, of)
    assert got.tolist() == [[False, True], [False, False]]


def test_similarity_of_experts_is_one_for_copies(model):
    blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(40, blocks[0].router_weight.shape[1], generator=generator) for _ in blocks]
    with torch.no_grad():
        experts = blocks[0].experts
        kept = experts.gate_up_proj[1].clone(), experts.down_proj[1].clone()
        experts.gate_up_proj[1], experts.down_proj[1] = experts.gate_up_proj[0], 2 * experts.down_proj[0]
        table = expert_similarity(blocks, rows)[0]
        experts.gate_up_proj[1], experts.down_proj[1] = kept
    assert table[0, 1] == pytest.approx(float(table[0, 0]), rel=1e-4)
    assert table[0, 2] < table[0, 1]
    off = table.sum() - table.diagonal().sum()
    assert float(off) / (len(table) * (len(table) - 1)) == pytest.approx(1.0, rel=1e-4)


def test_halving_divides_by_the_mass_of_more_slots_than_it_keeps():
    policy = halving([4])
    as_it_is, half_way, kept_alone = (
        policy.rule((share,), 0.5)(0, WEIGHTS, ALL_TEXT) for share in (1.0, 0.5, 0.0)
    )
    assert as_it_is.tolist() == (~policy.rule((1.0,), 0.5)(0, WEIGHTS, ALL_TEXT).eq(0)).float().tolist()
    assert half_way[0].tolist() == pytest.approx([1 / 0.9, 1 / 0.9, 0, 0])
    assert (WEIGHTS * kept_alone).sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_no_policy_touches_special_tokens():
    of = tokens(TEXT, VISION, OTHER, experts=torch.arange(4).expand(3, 4), hidden=torch.ones(3, 2))
    of = Tokens(of.modality, of.real, None, of.experts, of.hidden, torch.tensor([3, 2, 1]))
    alphas = [(0.3, 0.7)]
    policies = [plain([1.0]), gmlg(alphas), dmt([1.0]), modes(alphas), tempered(alphas), naee(1), ser()]
    policies += [reduced_k([4]), halving([4]), diep([torch.ones(4, 4)]), mc_moe(1)]
    for policy in policies:
        answer = policy.rule(policy.shape, policy.strengths[1])(0, WEIGHTS, of)
        gone = answer == 0 if answer.is_floating_point() else answer
        assert gone[2].sum() == 0, policy.name
        assert gone[:2].any(), policy.name


def test_tempered_at_powers_one_and_zero_is_modes_and_dmt():
    alphas = [(0.3, 0.7), (0.7, 0.3)]
    of = tokens(TEXT, VISION, TEXT)
    for block in (0, 1):
        for power, other in ((1.0, modes(alphas)), (0.0, dmt([1.0, 1.0]))):
            one = tempered(alphas).rule((-0.5, power), -1.5)(block, WEIGHTS, of)
            assert torch.equal(one, other.rule((-0.5,), -1.5)(block, WEIGHTS, of))


# Tuning


def test_all_meet_the_target_on_the_same_bench(bench, profile):
    alphas = block_alphas(profile, bench.meter.blocks)
    target = 0.5 * bench.most
    for policy in (dmt([1.0, 1.0]), tempered(alphas), naee(2), ser(), reduced_k([4, 4], per_block=True)):
        found = tune(policy, bench, target, passes=5, tolerance=0.02)
        again = bench.measure(found.rule, found.renormalise)
        assert again.skip == pytest.approx(target, abs=0.02), policy.name
        assert again.kl == found.measured.kl


def test_more_passes_never_find_a_worse_point(bench):
    target = 0.6 * bench.most
    one, more = (tune(dmt([1.0, 1.0]), bench, target, passes=n, tolerance=0.02) for n in (1, 12))
    assert more.measured.kl <= one.measured.kl
    assert more.passes > one.passes


def test_moving_slots_between_blocks_is_on_calibration_no_worse_than_leaving_them(bench):
    for plain_one in (reduced_k([4, 4]), reduced_k([4, 4]).renormalised()):
        moved = reduced_k([4, 4], per_block=True)
        moved = moved.renormalised() if plain_one.renormalise else moved
        for target in (0.5 * bench.most, 0.75 * bench.most):
            one, two = (tune(each, bench, target, passes=6, tolerance=0.02) for each in (plain_one, moved))
            assert two.measured.kl <= one.measured.kl


def test_a_policy_that_cannot_reach_the_target_says_so(bench):
    with pytest.raises(SearchError, match=r"NAEE does not reach .* nearest it measured is 0\.[67]"):
        tune(naee(2), bench, 0.95 * bench.most, passes=3)  # at most three of four


# Marginal costs


def test_marginal_cost_is_the_slope_of_kl_over_a_factor_on_the_weights(model, batches):
    weights = GroupWeights(2)
    meter = Meter(model, batches, *IDS, observe=weights)
    limits = weights.limits(np.full((2, 2), 0.5))
    costs, skip, answers = marginal_costs(meter, limits, 1)
    assert answers == 9 and 0.3 < skip < 0.7
    assert costs[1, VISION] == 0  # no vision token of the last block reaches an answer
    before = [parameter.requires_grad for parameter in model.parameters()]
    assert all(before)

    # The same pairs by hand: a window of 8 % of the pairs on both sides of the threshold.
    rule, block, modality = group_rule(limits), 0, TEXT
    seen: dict[str, Any] = {}

    def note(index: int, each: torch.Tensor, of: Tokens) -> torch.Tensor:
        if index == block:
            seen.update(weights=each, tokens=of)
        return rule(index, each, of)

    def kl(factor_rule: Rule) -> float:
        with evaluating(model), skipping(model, meter.blocks, factor_rule, *IDS):
            return kl_sum(meter.original[1], answer_logits(model, batches[1]), "")

    kl(note)
    each, of = seen["weights"], seen["tokens"]
    chosen = ((of.modality == modality) & of.real)[:, None].expand_as(each)
    values, order = each[chosen].sort()
    rank, width = int((values < limits[block, modality]).sum()), max(1, round(0.08 * len(values)))
    window = torch.zeros(len(values), dtype=torch.bool)
    window[order[max(0, rank - width) : rank + width]] = True
    beside = torch.zeros_like(chosen)
    beside[chosen] = window

    def moved(by: float) -> Rule:
        def factors(index: int, weights_: torch.Tensor, of_: Tokens) -> torch.Tensor:
            factor = (~rule(index, weights_, of_)).float()
            # Less of each of these pairs is what dropping them begins with.
            return factor - by * beside.float() if index == block else factor

        return factors

    step = 1e-2
    slope = (kl(moved(step)) - kl(moved(-step))) / (2 * step) / int(beside.sum())
    assert costs[block, modality] == pytest.approx(slope, rel=0.05)


def test_marginal_costs_of_some_rows_and_of_the_others_add_up(model, batches):
    weights = GroupWeights(2)
    meter = Meter(model, batches, *IDS, observe=weights)
    limits = weights.limits(np.full((2, 2), 0.5))
    whole, some, others = (
        marginal_costs(meter, limits, 1, rows)[0]
        for rows in (None, np.array([True, False, True]), np.array([False, True, False]))
    )
    # A cost is per pair of the rows that count.
    assert (2 * some + others) / 3 == pytest.approx(whole, rel=1e-3, abs=1e-7)
    assert not np.allclose(some, others, rtol=0.01)


def test_a_third_of_the_samples_that_answer_is_held_out_and_it_is_always_the_same():
    held = held_out([2] * 9)
    assert held.sum() == 3
    assert (held == held_out([5] * 9)).all()
    assert held_out([0, 2, 0, 2, 2, 0])[[1, 3, 4]].sum() == held_out([0, 2, 0, 2, 2, 0]).sum() == 1
    assert not held_out([2, 2]).any()


def test_limits_and_dropped_are_inverse():
    weights = GroupWeights(1)
    generator = torch.Generator().manual_seed(0)
    weights(0, torch.rand(500, 4, generator=generator), tokens(*[TEXT] * 300, *[VISION] * 200))
    shares = np.array([[0.25, 1.0]])
    limits = weights.limits(shares)
    assert limits[0, 1] == math.inf
    assert weights.dropped(limits) == pytest.approx(shares, abs=1e-3)
    assert weights.limits(np.zeros((1, 2))).tolist() == [[0.0, 0.0]]


def test_thresholds_become_a_profile_that_drops_the_same(model, batches, profile, bench):
    limits = torch.tensor([[0.2, math.inf], [0.0, 0.3]])
    found = Found(limits, bench.measure(group_rule(limits), False), np.zeros((2, 2)), 1)
    made = as_profile(profile, found, 0.5)
    rule = thresholds(block_alphas(made, bench.meter.blocks), made.tau_text, made.tau_vision)
    again = bench.measure(rule, False)
    assert again.kl == found.measured.kl
    assert torch.equal(again.counts.dropped, found.measured.counts.dropped)
    with torch.no_grad(), simulate(model, made) as counts:
        model(**{key: value for key, value in batches[0].items() if key != "labels"})
    assert counts.skip_per_block(VISION)[0] == 1 and counts.skip_per_block(TEXT)[1] == 0
    none, all_of_it = torch.zeros(2, 2), torch.full((2, 2), math.inf)
    for kept in (none, all_of_it, torch.stack([none[0], all_of_it[0]])):
        found = Found(kept, bench.measure(group_rule(kept), False), np.zeros((2, 2)), 1)
        made = as_profile(profile, found, 0.5)
        rule = thresholds(block_alphas(made, bench.meter.blocks), made.tau_text, made.tau_vision)
        assert bench.measure(rule, False).skip == found.measured.skip


def measuring(kl_sums: list[float]) -> Measured:
    return Measured(sum(kl_sums), Counts.zero(1), kl_sums=tuple(kl_sums), answer_tokens=(2,) * len(kl_sums))


def test_less_is_only_sure_where_it_holds_sample_by_sample():
    generator = np.random.default_rng(0)
    hard = generator.exponential(1.0, 60)
    one, less = measuring(hard.tolist()), measuring((0.9 * hard).tolist())
    noise = measuring((hard + generator.normal(-0.01, 0.5, 60)).tolist())
    nobody, half = np.zeros(60, dtype=np.bool_), np.arange(60) < 30
    assert is_surely_less(less, one, half) and is_surely_less(less, one, nobody)
    assert not is_surely_less(one, less, half) and not is_surely_less(one, one, half)
    assert not is_surely_less(noise, one, half)
    worse_outside = measuring([*(0.9 * hard[:30]), *(2 * hard[30:])])
    assert is_surely_less(worse_outside, one, half) and not is_surely_less(worse_outside, one, nobody)


def test_marginal_follows_the_costs_only_where_that_is_surely_less(model, batches, profile, monkeypatch):
    pairs, weights = PairRecorder(), GroupWeights(2)

    def observe(block: int, each: torch.Tensor, of: Tokens) -> torch.Tensor:
        pairs(block, each, of)
        return weights(block, each, of)

    bench = Bench(Meter(model, batches, *IDS, observe=observe), pairs)
    target, alphas = 0.6 * bench.most, block_alphas(profile, bench.meter.blocks)
    start, steps = ({"start_passes": 4, "tolerance": 0.02, "steps": steps} for steps in (0, 6))
    first = tune_marginal(bench, weights, alphas, target, **start)
    asked: list[int] = []

    def answer(value: bool) -> Any:
        def answered(one: Measured, other: Measured, held: Any) -> bool:
            asked.append(int(held.sum()))
            return value

        return answered

    monkeypatch.setattr(equal_cost, "is_surely_less", answer(False))
    stayed = tune_marginal(bench, weights, alphas, target, **steps)
    monkeypatch.setattr(equal_cost, "is_surely_less", answer(True))
    followed = tune_marginal(bench, weights, alphas, target, **steps)
    assert (first.mix, stayed.mix) == (0, 0) and followed.mix in (0.5, 1.0)
    assert set(asked) == {3}
    assert weights.dropped(stayed.thresholds) == pytest.approx(weights.dropped(first.thresholds), abs=0.03)
    assert not np.allclose(weights.dropped(followed.thresholds), weights.dropped(first.thresholds), atol=0.03)
    for found in (first, stayed, followed):
        assert found.measured.skip == pytest.approx(target, abs=0.02)


def test_marginal_repeats_itself_and_says_what_it_measured(model, batches, profile, bench):
    target = 0.6 * bench.most
    options: dict[str, Any] = {"start_passes": 4, "tolerance": 0.02, "progress": False}
    one, two = (marginal(model, batches, profile, target, steps=4, **options) for _ in range(2))
    assert one == two
    assert one.measured_skip == pytest.approx(target, abs=0.02)
    assert one.method == "marginal"
    rule = thresholds(block_alphas(one, bench.meter.blocks), one.tau_text, one.tau_vision)
    again = bench.measure(rule, False)
    assert (again.kl, again.skip) == pytest.approx((one.kl, one.measured_skip), rel=1e-3)


# Batches in decode


def test_a_pair_of_an_expert_that_is_read_anyway_is_kept():
    experts = torch.tensor([[0, 1], [0, 2], [3, 2]])
    weights = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    together = tokens(TEXT, TEXT, TEXT, experts=experts, left=torch.ones(3, dtype=torch.int64))
    got = batch_aware("max").rule((), math.log(0.5))(0, weights, together)
    assert got.tolist() == [[False, True], [False, False], [False, False]]
    got = batch_aware("sum").rule((), math.log(1.0))(0, weights, together)
    assert got.tolist() == [[False, True], [False, False], [True, False]]
    apart = tokens(TEXT, TEXT, TEXT, experts=experts, left=torch.tensor([1, 2, 3]))
    got = batch_aware("max").rule((), math.log(0.5))(0, weights, apart)
    assert got.tolist() == [[False, True], [True, False], [False, True]]
    read = ExpertsRead(token_by_token().rule((), math.log(0.5)))
    read(0, weights, together)
    assert read.mean == 3
    read = ExpertsRead(keep_all)
    read(0, weights, apart)
    assert read.mean == 2
