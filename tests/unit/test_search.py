"""Search: thresholds on a tiny model, on a frontier known in advance, on plateaus, and its refusals."""

import math
from typing import Any

import pytest
import torch

from modes_fx.blocks import find_blocks
from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import ProfileError, SearchError
from modes_fx.measure import Measured, Meter, WeightRecorder
from modes_fx.modality import OTHER, TEXT, VISION, token_modality
from modes_fx.policies import keep_per_block, reduce_k, reduce_k_rule
from modes_fx.profile import Profile
from modes_fx.progress import Bar
from modes_fx.skipping import Counts, Tokens, keep_all, simulate
from modes_fx.testing import FAMILIES, IMAGE, SPECIAL, VIDEO, tiny_inputs, tiny_qwen3_vl_moe
from modes_fx.threshold_search.grid import Scores
from modes_fx.threshold_search.journal import Journal
from modes_fx.threshold_search.search import ThresholdSearch, frontier, search, threshold_at_rank

IDS = ((IMAGE, VIDEO), SPECIAL)


def labelled(answer: int = 3, **given: Any) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs(**given)
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    return [labelled(text=19, batch=3, grid=(8, 8), seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def calibrated(model, batches) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False)


def oracle(model: Any, batches: list[Any], profile: Profile) -> tuple[float, float]:
    """(skip rate, KL) by replacing the routers' outputs, without modes_fx's hooks or harness."""
    dropped = pairs = tokens = 0
    total = 0.0
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        kinds = token_modality(inputs["input_ids"], *IDS).flatten()
        handles = []
        with torch.no_grad():
            original = model(**inputs).logits
            for layer, entry in zip(model.model.language_model.layers, profile.layers, strict=True):

                def drop(module: Any, args: Any, out: Any, entry: Any = entry, kinds: Any = kinds) -> Any:
                    nonlocal dropped, pairs
                    logits, weights, chosen = out
                    gone = torch.zeros_like(weights, dtype=torch.bool)
                    for row, kind in enumerate(kinds.tolist()):
                        if kind == TEXT:
                            gone[row] = entry.alpha_text * weights[row] < profile.tau_text
                        if kind == VISION:
                            gone[row] = entry.alpha_vision * weights[row] < profile.tau_vision
                    dropped += int(gone.sum())
                    pairs += gone.numel()
                    return logits, torch.where(gone, 0.0, weights), chosen

                handles.append(layer.mlp.gate.register_forward_hook(drop))
            skipped = model(**inputs).logits
        for handle in handles:
            handle.remove()
        answers = batch["labels"][:, 1:] != -100
        log_p = original[:, :-1][answers].double().log_softmax(-1)
        log_q = skipped[:, :-1][answers].double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += int(answers.sum())
    return dropped / pairs, total / tokens


@pytest.mark.parametrize("target", [0.1, 0.5, 0.83, 0.9])
def test_the_measured_skip_meets_the_target_and_is_what_an_oracle_measures(
    model, batches, calibrated, target
):
    found = search(model, batches, calibrated, target_skip=target, exponents=[1.0], progress=False)
    assert found.target_skip == target
    assert abs(found.measured_skip - target) <= 0.01
    skip, kl = oracle(model, batches, found)
    assert skip == pytest.approx(found.measured_skip, abs=1e-4)
    assert kl == pytest.approx(found.kl, rel=1e-3)
    assert found.layers == calibrated.layers


def test_simulate_gives_what_was_measured(model, batches, calibrated):
    found = search(model, batches, calibrated, target_skip=0.6, grid=8, progress=False)
    with torch.no_grad(), simulate(model, found) as counts:
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"})
    assert counts.skip() == found.measured_skip
    assert counts.skip(TEXT) == found.measured_skip_text
    assert counts.skip(VISION) == found.measured_skip_vision


def test_a_target_of_zero_sets_no_threshold(model, batches, calibrated):
    found = search(model, batches, calibrated, target_skip=0.0, progress=False)
    assert (found.tau_text, found.tau_vision) == (0.0, 0.0)
    assert (found.measured_skip, found.kl) == (0.0, 0.0)


def test_everything_but_special_tokens_can_be_skipped_and_no_more(model, batches, calibrated):
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    reachable = 1 - float((token_modality(ids, *IDS) == OTHER).float().mean())
    found = search(model, batches, calibrated, target_skip=reachable, progress=False)
    assert (found.tau_text, found.tau_vision) == (math.inf, math.inf)
    assert found.measured_skip == pytest.approx(reachable)
    assert found.measured_skip_text == found.measured_skip_vision == 1.0
    with pytest.raises(
        SearchError, match=f"A skip rate of 1.000 cannot .* nearest reachable is {reachable:.3f}"
    ):
        search(model, batches, calibrated, target_skip=1.0, progress=False)


@pytest.mark.parametrize("target", [-0.1, 1.1, math.nan])
def test_a_target_outside_zero_to_one_is_refused(model, batches, calibrated, target):
    with pytest.raises(SearchError, match="target_skip must be from 0 to 1, got"):
        search(model, batches, calibrated, target_skip=target, progress=False)


@pytest.mark.parametrize("given", [{"tolerance": 0.0}, {"grid": 0}])
def test_a_tolerance_or_grid_of_zero_is_refused(model, batches, calibrated, given):
    with pytest.raises(SearchError, match="tolerance and grid must be above 0"):
        search(model, batches, calibrated, target_skip=0.5, progress=False, **given)


def test_a_foreign_profile_is_refused(batches, calibrated):
    with pytest.raises(
        ProfileError, match=r"made for another model: model\.language_model\.layers\.0\.mlp is not"
    ):
        search(tiny_qwen3_vl_moe(seed=5), batches, calibrated, target_skip=0.5, progress=False)


def test_search_is_deterministic_and_takes_thirty_passes_at_most(model, batches, calibrated):
    first = ThresholdSearch(model, batches, calibrated)
    best = first.find(0.83)
    assert len(first.points) <= 30
    assert ThresholdSearch(model, batches, calibrated).find(0.83) == best
    assert best.kl == min(p.kl for p in first.points if 0.83 <= p.skip <= 0.84)


def test_a_finer_grid_is_no_worse_than_one_threshold_for_both(model, batches, calibrated):
    """The frontier holds at least the points where only one modality is skipped."""
    searched = ThresholdSearch(model, batches, calibrated)
    best = searched.find(0.4)
    alone = [p for p in searched.points if p.tau_text == 0.0 or p.tau_vision == 0.0]
    assert all(best.kl <= p.kl for p in alone if 0.4 <= p.skip <= 0.41)


def test_the_frontier_holds_the_best_point_of_each_target(model, batches, calibrated):
    found = frontier(model, batches, calibrated, targets=(0.3, 0.6), progress=False)
    for target in (0.3, 0.6):
        near = [point for point in found.points if target <= point.skip <= target + 0.01]
        assert min(near, key=lambda point: point.kl) in found.best
    assert [p.skip for p in found.best] == sorted({p.skip for p in found.best})
    assert [p.kl for p in found.best] == sorted({p.kl for p in found.best})


def test_of_several_exponents_the_one_of_least_kl_wins(model, batches, calibrated):
    def at(*exponents: float) -> Profile:
        given: Any = {"exponents": exponents} if exponents else {}
        return search(model, batches, calibrated, target_skip=0.6, grid=8, progress=False, **given)

    alone = [at(1.0), at(0.5), at(0.0)]
    assert at() == min([*alone, at(0.25)], key=lambda found: found.kl or 0.0)
    assert at(1.0, 0.5, 0.0) == min(alone, key=lambda found: found.kl or 0.0)
    assert [found.method for found in alone] == ["modality", "modality^0.5", "modality^0"]
    assert [layer.alpha_text for layer in alone[2].layers] == pytest.approx([1 / 3] * 3)
    assert oracle(model, batches, alone[1])[1] == pytest.approx(alone[1].kl, rel=1e-3)
    with pytest.raises(SearchError, match="exponents is empty"):
        search(model, batches, calibrated, target_skip=0.6, exponents=[], progress=False)


def test_the_progress_bar_shows_skip_and_kl(model, batches, calibrated, monkeypatch, capsys):
    notes: list[str] = []
    monkeypatch.setattr("modes_fx.progress.Bar.note", lambda self, text: notes.append(text))
    search(model, batches, calibrated, target_skip=0.5, grid=2)
    assert notes and all(note.startswith("skip 0.") and " KL " in note for note in notes)
    assert capsys.readouterr().out == ""


# A frontier known in advance: scores are given, and so is the KL of dropping r text and s vision pairs.


class KnownFrontier(ThresholdSearch):
    """Made-up scores; `kl(text dropped, vision dropped)`; a share `drift` more is skipped than predicted."""

    def __init__(self, text: Any, vision: Any, other: int, kl: Any, drift: float = 0.0) -> None:
        recorder = WeightRecorder()
        for modality, weights in ((TEXT, text), (VISION, vision)):
            kinds = torch.full((len(weights),), modality, dtype=torch.uint8)
            recorder(0, torch.tensor(weights)[:, None], Tokens(kinds, torch.ones_like(kinds).bool()))
        pairs = torch.tensor([[len(text), len(vision), other]])
        counts, none = Counts(pairs, torch.zeros_like(pairs)), Counts.zero(1)
        self.exponent, self._alphas, self._found = 1.0, [(1.0, 1.0)], {}
        self.scores = Scores(recorder, self._alphas, counts, (counts, none))
        self._bar, self._journal = Bar(), Journal(None, {})
        scores = self.scores

        class KnownMeter:
            unskipped = Measured(0.0, counts)

            def measure(self, rule: Any, **_: Any) -> Measured:
                dropped = []
                for modality in (TEXT, VISION):
                    weights = scores.of[modality][:, None]
                    tokens = Tokens(torch.full((len(weights),), modality), torch.ones(len(weights)).bool())
                    gone = int(rule(0, weights, tokens).sum())
                    # The loop: what goes makes a little more go, as long as there is something left.
                    dropped.append(min(len(weights), round(gone * (1 + drift))))
                return Measured(kl(*dropped), Counts(pairs, torch.tensor([[*dropped, 0]])))

        self.meter = KnownMeter()  # type: ignore[assignment]


def spread(count: int, seed: int = 0) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("drift", [0.0, 0.04, -0.06])
@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_finds_the_optimum_of_a_known_frontier(target, drift):
    # KL = t^2 + 3 v^2 with t + v fixed by the target: the optimum has t = 3 v.
    known = KnownFrontier(
        spread(1000, 1), spread(1000, 2), 100, lambda t, v: (t / 1000) ** 2 + 3 * (v / 1000) ** 2, drift
    )
    best = known.find(target)
    assert target <= best.skip <= target + 0.01
    total = target * 2100 / 1000
    text = min(1.0, 3 * total / 4)
    optimum = text**2 + 3 * (total - text) ** 2
    assert best.kl <= optimum * 1.05
    assert len(known.points) <= 30


@pytest.mark.parametrize("free", ["text", "vision"])
def test_finds_an_optimum_at_the_end_of_the_frontier(free):
    cost = (0.0, 1.0) if free == "text" else (1.0, 0.0)
    known = KnownFrontier(spread(600, 1), spread(400, 2), 0, lambda t, v: cost[0] * t + cost[1] * v)
    best = known.find(0.8)
    assert 0.8 <= best.skip <= 0.81
    assert (best.tau_text if free == "text" else best.tau_vision) == math.inf


def test_ties_that_step_over_the_target_are_filled_from_the_other_modality():
    # Half of the vision pairs score exactly zero: they go together or not at all.
    vision = [0.0] * 500 + [0.5 + s for s in spread(500)]
    known = KnownFrontier(spread(500, 1), vision, 0, lambda t, v: (10 * t + v) / 1000)
    best = known.find(0.2)
    assert 0.2 <= best.skip <= 0.21
    assert best.tau_vision == 0.0
    assert 0.4 <= known.find(0.4).skip <= 0.41


def test_a_target_between_plateaus_of_both_names_the_nearest_reachable():
    known = KnownFrontier([0.5] * 500, [0.25] * 500, 0, lambda t, v: float(t + v))
    with pytest.raises(
        SearchError, match=r"No thresholds .* of skip 0\.300; the nearest reachable found is 0\.500"
    ):
        known.find(0.3)
    assert known.find(0.5).skip == 0.5


def test_a_model_without_vision_tokens_is_searched_on_text_alone():
    known = KnownFrontier(spread(1000), [], 10, lambda t, v: float(t))
    assert 0.5 <= known.find(0.5).skip <= 0.51


def test_threshold_at_rank_drops_what_it_says():
    scores = torch.tensor([0.0, 0.1, 0.1, 0.1, 0.2, 0.3])
    taus = [threshold_at_rank(scores, rank) for rank in range(-1, 8)]
    assert [int((scores < tau).sum()) for tau in taus] == [0, 0, 1, 1, 4, 4, 5, 6, 6]
    assert taus[:2] == [0.0, 0.0] and taus[-1] == math.inf
    close = torch.tensor([0.1, float(torch.nextafter(torch.tensor(0.1), torch.tensor(1.0)))])
    assert int((close < threshold_at_rank(close, 1)).sum()) == 1
    assert threshold_at_rank(torch.tensor([]), 3) == 0.0


def test_reduce_k_keeps_the_strongest_and_counts_every_token(model, batches):
    meter = Meter(model, batches, *IDS)
    reduced = reduce_k(meter, 0.5)
    assert reduced.keep == (2, 2, 2)
    assert reduced.measured.skip == 0.5
    assert reduced.measured.counts.skip(OTHER) == 0.5
    assert reduced.measured.kl > 0
    weights = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    tokens = Tokens(torch.zeros(2), torch.ones(2).bool())
    dropped = reduce_k_rule((2,))(0, weights, tokens)
    assert dropped.tolist() == [[True, False, False, True], [False, False, True, True]]


def test_reduce_k_with_renormalising_is_a_smaller_top_k_in_the_configuration(model, batches):
    meter = Meter(model, batches, *IDS)
    simulated = reduce_k(meter, 0.5, renormalise=True).measured.kl
    smaller = tiny_qwen3_vl_moe()
    for layer in smaller.model.language_model.layers:
        layer.mlp.gate.top_k = 2
    other = Meter(smaller, batches, *IDS)
    total = 0.0
    for one, two in zip(meter.original, other.original, strict=True):
        log_p, log_q = one.double().log_softmax(-1), two.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    assert simulated == pytest.approx(total / meter.num_tokens, rel=1e-3)


def test_reduce_k_refuses_a_target_outside_zero_to_one(model, batches):
    with pytest.raises(SearchError, match="from 0 to 1, got 2"):
        reduce_k(Meter(model, batches, *IDS), 2)


@pytest.mark.parametrize(
    ("target", "keep"),
    [
        (0.0, (8,) * 6),
        (0.67, (3, 3, 3, 3, 2, 2)),
        (0.83, (2, 2, 1, 1, 1, 1)),
        (0.875, (1,) * 6),
        (1.0, (0,) * 6),
    ],
)
def test_experts_are_kept_evenly_and_the_earlier_blocks_take_the_rest(target, keep):
    assert keep_per_block([8] * 6, target) == keep


def test_an_unskipped_meter_measures_nothing_lost(model, batches):
    measured = Meter(model, batches, *IDS).measure(keep_all)
    assert (measured.kl, measured.skip) == (0.0, 0.0)
    assert len(find_blocks(model)) == len(measured.counts.pairs)


def test_a_profile_searched_for_one_target_can_be_searched_again(model, batches, calibrated):
    once = search(model, batches, calibrated, target_skip=0.7, grid=8, exponents=[0.5], progress=False)
    again = search(model, batches, once, target_skip=0.5, grid=8, progress=False)
    # Its alphas stay what the first search made them, and are not tempered twice.
    assert again.layers == once.layers and again.method == once.method
    assert again.measured_skip == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ["kimi_k25+deepseek_v3", "gemma4", "mixtral", "deepseek_v2"])
def test_other_families_are_calibrated_and_searched(name):
    family = FAMILIES[name]
    model = family.build()
    batches = []
    for kind in family.kinds[:3]:
        for seed in (0, 1):
            inputs = family.inputs(kind, seed=seed)
            labels = inputs["input_ids"].clone()
            labels[:, :-3] = -100
            batches.append({**inputs, "labels": labels})
    profile = calibrate(model, batches, special_token_ids=SPECIAL, progress=False)
    assert [layer.name for layer in profile.layers] == [block.name for block in find_blocks(model)]
    assert {layer.weight_scale for layer in profile.layers} == {family.weight_scale}
    assert sum(layer.alpha_text for layer in profile.layers) == pytest.approx(1)
    assert min(layer.alpha_text for layer in profile.layers) > 0
    assert all(layer.alpha_vision > 0 for layer in profile.layers[:-1]) or not family.picture

    found = search(model, batches, profile, target_skip=0.4, tolerance=0.03, grid=10, progress=False)
    assert found.measured_skip == pytest.approx(0.4, abs=0.03)
    assert found.kl is not None and found.kl > 0
    assert {layer.weight_scale for layer in found.layers} == {family.weight_scale}
    with torch.no_grad(), simulate(model, found) as counts:
        for batch in batches:
            model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    assert counts.skip() == pytest.approx(found.measured_skip)


def test_thresholds_compare_scores_before_the_folded_factor():
    family = FAMILIES["kimi_k25+deepseek_v3"]
    inputs = family.inputs("batch")
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    profiles, skips = [], []
    for factor in (1.0, 2.5):
        model = family.build(routed_scaling_factor=factor)
        profile = calibrate(model, [{**inputs, "labels": labels}], special_token_ids=SPECIAL, progress=False)
        flat = profile.tempered(0).with_thresholds(tau_text=0.15, tau_vision=0.15)
        with torch.no_grad(), simulate(model, flat) as counts:
            model(**inputs, use_cache=False)
        profiles.append(profile)
        # The first block's routing does not depend on the factor.
        skips.append(counts.skip_per_block()[0])
    assert [profile.layers[0].weight_scale for profile in profiles] == [1.0, 2.5]
    assert skips[0] == skips[1]
    assert 0.1 < skips[0] < 0.9
