"""Where a search measures: guided, staircase and whole grid on known landscapes; grids; surfaces."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from modes_fx.errors import SearchError
from modes_fx.measure import WeightRecorder
from modes_fx.modality import TEXT, VISION
from modes_fx.skipping import DECODE, NO_PHASE, PREFILL, Counts, Tokens, thresholds
from modes_fx.threshold_search.grid import Scores, paper_thresholds
from modes_fx.threshold_search.methods import Problem, exhaustive, guided, refine, staircase
from modes_fx.threshold_search.points import Point
from modes_fx.threshold_search.surface import Surface, expected_improvement
from modes_fx.threshold_search.targets import Target

PAIRS = {TEXT: 3000, VISION: 7000}


def recorded(seed: int = 0) -> WeightRecorder:
    """Weights of three tokens of ten, in one block of one expert."""
    generator = torch.Generator().manual_seed(seed)
    recorder = WeightRecorder()
    for modality, pairs in PAIRS.items():
        kinds = torch.full((pairs,), modality, dtype=torch.uint8)
        recorder(0, torch.rand(pairs, 1, generator=generator), Tokens(kinds, torch.ones(pairs).bool()))
    return recorder


def problem(
    target: Target,
    kl: Callable[[float, float], float],
    *,
    drift: Callable[[float, float], float] = lambda t, v: 0.0,
    grid: int = 100,
    other: int = 500,
) -> Problem:
    """A search whose measured skip and KL are functions of the shares of text and vision pairs dropped."""
    pairs = torch.tensor([[*PAIRS.values(), other]])
    counts = Counts(pairs, torch.zeros_like(pairs))
    scores = Scores(recorded(), [(1.0, 1.0)], counts, (counts, Counts.zero(1)))
    known: dict[tuple[float, float], Point] = {}

    @cache
    def share(modality: int, tau: float) -> float:
        return float(scores.share(modality, torch.tensor(tau, dtype=torch.float64)))

    def measure(tau_text: float, tau_vision: float) -> Point:
        taus = (tau_text, tau_vision)
        if taus not in known:
            text, vision = share(TEXT, tau_text), share(VISION, tau_vision)
            dropped = text * PAIRS[TEXT] + vision * PAIRS[VISION]
            skip = dropped / int(pairs.sum()) + drift(text, vision)
            known[taus] = Point(*taus, skip, text, vision, kl(text, vision))
        return known[taus]

    text_taus, vision_taus = (scores.grid(modality, grid, "rank") for modality in (TEXT, VISION))
    return Problem(scores, text_taus, vision_taus, target, {}, measure, lambda: list(known.values()))


def interior(text: float, vision: float) -> float:
    """Both modalities cost, so the best point lies within the frontier."""
    return 0.02 * (math.expm1(3 * text) ** 1.5 + 1.2 * math.expm1(2 * vision) ** 2)


def wavy(text: float, vision: float) -> float:
    """What is skipped beyond the prediction: not monotone, as in a model."""
    return 0.01 * math.sin(9 * text) + 0.008 * math.sin(7 * vision + 2) - 0.01 * text


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.67, 0.83])
@pytest.mark.parametrize("drift", [lambda t, v: 0.0, wavy], ids=["as predicted", "drifting"])
def test_guided_comes_within_a_hundredth_of_the_whole_grid_in_thirty_passes(rate, drift):
    whole, walked, led = (problem(Target(skip=rate), interior, drift=drift) for _ in range(3))
    exhaustive(whole)
    staircase(walked)
    guided(led, 30)
    best = whole.best()
    assert best is not None and len(whole.known()) == 10_000
    found = led.best()
    assert found is not None and found.kl <= 1.01 * best.kl
    assert len(led.known()) <= 30
    step = walked.best()
    assert step is not None and step.kl <= 1.01 * best.kl
    assert 100 < len(walked.known()) <= 301


def test_guided_finds_the_most_skip_within_a_budget():
    target = Target(kl=0.05)
    whole, led = problem(target, interior, drift=wavy), problem(target, interior, drift=wavy)
    exhaustive(whole)
    guided(led, 30)
    best, found = whole.best(), led.best()
    assert best is not None and found is not None
    assert found.kl <= 0.05 and found.skip >= best.skip - 0.005
    refine(led, 0.01)
    left = led.best()
    assert left is not None and left.kl <= 0.05 and left.skip >= found.skip
    assert len(led.known()) <= 36


def test_a_place_that_was_measured_long_ago_is_not_tried_forever(monkeypatch):
    """As by an earlier search for another target, with more points since than the surfaces are made of."""
    monkeypatch.setattr("modes_fx.threshold_search.methods._MEMORY", 3)
    whole = problem(Target(kl=0.05), interior, grid=10)
    for place in reversed(range(len(whole.text) * len(whole.vision))):
        whole.at(*divmod(place, len(whole.vision)))
    asked: list[Point] = []

    def counted(tau_text: float, tau_vision: float) -> Point:
        asked.append(whole.measure(tau_text, tau_vision))
        assert len(asked) < 50, "it goes round in a circle"
        return asked[-1]

    guided(replace(whole, measure=counted), 5)
    assert len(whole.known()) == len(whole.text) * len(whole.vision)


def dip(text: float, vision: float) -> float:
    """Past half of the text pairs, dropping more of them makes later routing drop fewer elsewhere."""
    return -0.1 if 0.5 < text < 0.6 else 0.0


def test_the_pointer_of_the_staircase_walks_up_where_the_rate_falls():
    target = Target(skip=0.6)

    def best_of_paper(walk: Problem) -> Point:
        """The paper's code, to the letter: the point after the pointer is taken, whatever its rate."""
        taken, pointer = [], len(walk.vision) - 1
        for text in range(len(walk.text)):
            while pointer >= 0 and walk.at(text, pointer).skip >= 0.6:
                pointer -= 1
            if pointer + 1 < len(walk.vision):
                taken.append(walk.at(text, pointer + 1))
        return min(taken, key=lambda point: point.kl)

    def cost(text: float, vision: float) -> float:
        return 10 * (text - 0.55) ** 2 + 0.1 * vision

    assert best_of_paper(problem(target, cost, drift=dip)).skip < 0.6
    walked, whole = (problem(target, cost, drift=dip) for _ in range(2))
    staircase(walked)
    exhaustive(whole)
    found, best = walked.best(), whole.best()
    assert found is not None and found.skip >= 0.6
    assert found == best


def test_the_staircase_needs_a_rate_to_walk_along():
    with pytest.raises(SearchError, match="walks where a skip rate is just reached; give the target one"):
        staircase(problem(Target(kl=0.1), interior))


def test_off_the_grid_the_rate_is_met_closer_than_by_the_grid():
    coarse = problem(Target(skip=0.6), interior, drift=wavy, grid=8)
    guided(coarse, 30)
    on_grid = coarse.best()
    refine(coarse, 0.01)
    best = coarse.best()
    assert on_grid is not None and best is not None
    assert on_grid.skip > 0.61
    assert 0.6 <= best.skip <= 0.6025
    assert best.kl < on_grid.kl


def test_the_grid_of_the_paper_is_its_codes():
    text, vision = (paper_thresholds(modality, 100, "exp") for modality in (TEXT, VISION))
    assert text[0] == vision[0] == pytest.approx(9.08e-5, rel=1e-3)
    assert text[-1] == pytest.approx(0.1043, rel=1e-3) and vision[-1] == pytest.approx(0.03597, rel=1e-3)
    assert all(1.05 < high / low < 1.08 for low, high in pairwise(vision))
    assert paper_thresholds(TEXT, 100, "linear")[-1] == pytest.approx(0.71)


def test_rank_grids_drop_even_shares_and_name_no_threshold_twice():
    scores = problem(Target(skip=0.5), interior).scores
    for modality, pairs in PAIRS.items():
        taus = scores.grid(modality, 100, "rank")
        assert scores.dropped(modality, taus).tolist() == [round(step / 99 * pairs) for step in range(100)]
    ties = WeightRecorder()
    for modality in (TEXT, VISION):
        ties(0, torch.full((9, 1), 0.5), Tokens(torch.full((9,), modality), torch.ones(9).bool()))
    counts = Counts(torch.tensor([[9, 9, 0]]), torch.zeros(1, 3))
    assert Scores(ties, [(1.0, 1.0)], counts, (counts, counts)).grid(TEXT, 100, "rank").tolist() == [
        0,
        math.inf,
    ]


def test_predicted_rates_are_what_the_rule_drops_of_what_was_recorded():
    generator = torch.Generator().manual_seed(5)
    modality = torch.randint(0, 3, (200,), generator=generator)
    real = torch.rand(200, generator=generator) < 0.9
    phase = torch.randint(0, 3, (200,), generator=generator)
    tokens = Tokens(modality, real, phase)
    recorder, alphas = WeightRecorder(), [(0.7, 0.2), (0.1, 0.9)]
    pairs = {name: Counts.zero(2) for name in ("all", PREFILL, DECODE, NO_PHASE)}
    dropped = {name: Counts.zero(2) for name in pairs}
    taus = (0.11, 0.23)
    for block in range(2):
        weights = torch.rand(200, 4, generator=generator)
        recorder(block, weights, tokens)
        gone = thresholds(alphas, *taus)(block, weights, tokens)
        for name in pairs:
            part = real if name == "all" else real & (phase == name)
            pairs[name].add(block, torch.zeros_like(gone), Tokens(modality, part))
            dropped[name].add(block, gone, Tokens(modality, part))
    scores = Scores(recorder, alphas, pairs["all"], (pairs[PREFILL], pairs[DECODE]))
    places = [torch.tensor(tau, dtype=torch.float64) for tau in taus]
    expected = {
        "skip": dropped["all"].skip(),
        "skip_text": dropped["all"].skip(TEXT),
        "skip_vision": dropped["all"].skip(VISION),
        "skip_prefill": dropped[PREFILL].skip(),
        "skip_decode": dropped[DECODE].skip(),
    }
    assert {name: float(scores.predict(name, *places)) for name in expected} == pytest.approx(expected)
    infinite = torch.tensor(math.inf, dtype=torch.float64)
    for name in expected:
        assert scores.highest(name) == float(scores.predict(name, infinite, infinite))


def test_a_surface_goes_through_a_smooth_function_and_is_unsure_where_it_was_not_measured():
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(25, 2, generator=generator, dtype=torch.float64) * torch.tensor([0.5, 1.0])

    def smooth(at: torch.Tensor) -> torch.Tensor:
        return 3 + 2 * at[:, 0] + torch.sin(4 * at[:, 1])

    surface = Surface(places, smooth(places))
    within = torch.rand(50, 2, generator=generator, dtype=torch.float64) * torch.tensor([0.4, 0.8]) + 0.05
    expected, deviation = surface.at(within)
    assert (expected - smooth(within)).abs().max() < 0.02
    _, far = surface.at(torch.tensor([[1.0, 1.0]], dtype=torch.float64))
    assert float(far) > 3 * float(deviation.mean())


def test_a_surface_does_not_chase_roughness():
    generator = torch.Generator().manual_seed(2)
    places = torch.rand(30, 2, generator=generator, dtype=torch.float64)
    rough = places[:, 0] + 0.05 * torch.randn(30, generator=generator, dtype=torch.float64)
    expected, deviation = Surface(places, rough).at(places)
    assert 0.02 < float((expected - rough).square().mean().sqrt()) < 0.06
    assert 0.02 < float(deviation.mean()) < 0.1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_surface_of_equal_values_is_flat(count):
    places = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, deviation = Surface(places, torch.full((count,), 7.0, dtype=torch.float64)).at(places)
    assert expected == pytest.approx([7.0] * count) and float(deviation.max()) < 1e-6


def test_expected_improvement_is_the_mean_of_what_falls_below_the_best():
    mean, deviation = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.5, 0.1]).double()
    drawn = mean + deviation * torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = (1.2 - drawn).clamp_min(0).mean(0)
    assert expected_improvement(1.2, mean, deviation) == pytest.approx(expected, abs=2e-3)
