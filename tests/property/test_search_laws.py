"""Laws of profiles and thresholds: monotone open loop, zero changes nothing, round trips lose nothing."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modes_fx.blocks import find_blocks
from modes_fx.modality import OTHER, TEXT, VISION, token_modality
from modes_fx.profile import Layer, Profile, normalise
from modes_fx.skipping import Tokens, skip, thresholds
from modes_fx.testing import IMAGE, SPECIAL, VIDEO, tiny_inputs, tiny_qwen3_vl_moe
from modes_fx.threshold_search.grid import threshold_at_rank

alphas = st.floats(0, 1e6, allow_nan=False)
taus = st.one_of(st.floats(0, 10), st.just(math.inf))
nats = st.one_of(st.none(), st.floats(0, 1e3))
rates = st.one_of(st.none(), st.floats(0, 1))
ids = st.lists(st.integers(0, 2**31), max_size=4).map(tuple)


@st.composite
def profiles(draw: Any) -> Profile:
    layers = []
    for i in range(draw(st.integers(1, 3))):
        num_experts = draw(st.integers(1, 256))
        layers.append(
            Layer(
                name=draw(st.text(min_size=1)),
                alpha_text=draw(alphas),
                alpha_vision=draw(alphas),
                num_experts=num_experts,
                top_k=draw(st.integers(1, num_experts)),
                fingerprint=f"{i:064x}",
            )
        )
    return Profile(
        layers=tuple(layers),
        tau_text=draw(taus),
        tau_vision=draw(taus),
        visual_token_ids=draw(ids),
        special_token_ids=draw(ids),
        vocab_size=draw(st.integers(1, 2**20)),
        hidden_size=draw(st.integers(1, 2**14)),
        target_skip=draw(rates),
        measured_skip=draw(rates),
        measured_skip_text=draw(rates),
        measured_skip_vision=draw(rates),
        kl=draw(nats),
        kl_low=draw(nats),
        kl_high=draw(nats),
        num_samples=draw(st.integers(0, 10**9)),
        method=draw(st.text()),
        versions=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2)),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(profile=profiles())
def test_saving_and_loading_is_the_identity(tmp_path, profile):
    path = tmp_path / "p.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert Profile.load(path).digest() == profile.digest()


@st.composite
def routed(draw: Any) -> tuple[torch.Tensor, Tokens]:
    tokens, slots = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    weights = st.lists(st.floats(0, 1, width=32), min_size=tokens * slots, max_size=tokens * slots)
    kinds = st.lists(st.sampled_from([TEXT, VISION, OTHER]), min_size=tokens, max_size=tokens)
    modality = torch.tensor(draw(kinds), dtype=torch.uint8)
    return (
        torch.tensor(draw(weights), dtype=torch.float32).view(tokens, slots),
        Tokens(modality, torch.ones(tokens, dtype=torch.bool)),
    )


@given(
    routed=routed(), alpha=st.tuples(alphas, alphas), low=st.tuples(taus, taus), high=st.tuples(taus, taus)
)
def test_a_higher_threshold_never_drops_fewer_pairs(routed, alpha, low, high):
    weights, tokens = routed
    low, high = tuple(map(min, low, high)), tuple(map(max, low, high))
    fewer = thresholds([alpha], *low)(0, weights, tokens)
    more = thresholds([alpha], *high)(0, weights, tokens)
    assert bool((more | ~fewer).all())


@given(routed=routed(), alpha=st.tuples(alphas, alphas))
def test_zero_drops_nothing_and_infinity_all_but_special_tokens(routed, alpha):
    weights, tokens = routed
    assert not thresholds([alpha], 0.0, 0.0)(0, weights, tokens).any()
    everything = thresholds([alpha], math.inf, math.inf)(0, weights, tokens)
    assert bool((everything == (tokens.modality != OTHER)[:, None]).all())


@given(routed=routed(), alpha=st.tuples(alphas, alphas), tau=st.tuples(taus, taus), data=st.data())
def test_the_order_of_tokens_does_not_matter(routed, alpha, tau, data):
    weights, tokens = routed
    order = torch.tensor(data.draw(st.permutations(range(len(weights)))), dtype=torch.long)
    rule = thresholds([alpha], *tau)
    shuffled = Tokens(tokens.modality[order], tokens.real[order])
    assert torch.equal(rule(0, weights, tokens)[order], rule(0, weights[order], shuffled))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=2)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.integers(1, 12), picture=st.booleans(), seed=st.integers(0, 99))
def test_thresholds_at_zero_change_not_one_bit(model, text, picture, seed):
    inputs = tiny_inputs(text=text, grid=(4, 4) if picture else None, seed=seed)
    nothing = thresholds([(0.5, 0.5)] * 2, 0.0, 0.0)
    with torch.no_grad():
        plain = model(**inputs).logits
        with skip(model, find_blocks(model), nothing, (IMAGE, VIDEO), SPECIAL) as counts:
            skipped = model(**inputs).logits
    assert torch.equal(plain, skipped)
    assert counts.dropped.sum() == 0


scores = st.lists(st.floats(0, 1, width=32, allow_subnormal=False), min_size=1, max_size=30)


@given(scores=scores, rank=st.integers(-2, 33))
def test_a_rank_is_met_to_within_half_a_run_of_equal_scores(scores, rank):
    ordered = torch.tensor(scores, dtype=torch.float32).sort().values
    dropped = int((ordered < threshold_at_rank(ordered, rank)).sum())
    wanted = min(max(rank, 0), len(ordered))
    longest = max(int((ordered == value).sum()) for value in ordered)
    assert abs(dropped - wanted) <= longest // 2


@given(scores=scores, ranks=st.tuples(st.integers(-2, 33), st.integers(-2, 33)))
def test_thresholds_rise_with_the_rank(scores, ranks):
    ordered = torch.tensor(scores, dtype=torch.float32).sort().values
    low, high = sorted(ranks)
    assert threshold_at_rank(ordered, low) <= threshold_at_rank(ordered, high)


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=9))
def test_alphas_are_normalised_to_one_in_their_order(raw):
    done = normalise(raw)
    assert math.fsum(done) == pytest.approx(1)
    assert all(a >= 0 for a in done)
    assert all(done[i] <= done[j] for i in range(len(raw)) for j in range(len(raw)) if raw[i] <= raw[j])


@given(
    token=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    visual=st.sets(st.integers(0, 20)),
    special=st.sets(st.integers(0, 20)),
)
def test_every_token_has_the_modality_of_its_id(token, visual, special):
    kinds = token_modality(torch.tensor(token), sorted(visual), sorted(special)).tolist()
    for t, kind in zip(token, kinds, strict=True):
        assert kind == (VISION if t in visual else OTHER if t in special else TEXT)
