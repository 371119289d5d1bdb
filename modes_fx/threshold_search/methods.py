"""Where to measure next: guided by what was measured, along the paper's staircase, or everywhere.

Each works on the points of one grid and says nothing about which of them is best; that is decided from what
was measured, by the target alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from modes_fx.errors import SearchError
from modes_fx.modality import TEXT, VISION
from modes_fx.threshold_search.grid import Scores
from modes_fx.threshold_search.points import Point
from modes_fx.threshold_search.surface import Surface, expected_improvement
from modes_fx.threshold_search.targets import Target

# First points of the guided search: along the predicted frontier, or over the whole square.
_STARTS = 5
_SPREAD = (0.35, 0.65, 0.95)
# Gains that are not worth another pass: a part of KL, and of all pairs.
_WORTH_KL, _WORTH_SKIP = 2e-3, 5e-4
# Points that surfaces go through: the last ones, for their cost grows with the third power.
_MEMORY = 100
# Passes that a bisection may take: beside a point of the grid, and where the grid steps over the target.
_STEPS = 3
_STEPS_IN_GAP = 12
# KL is zero where nothing is dropped, and its logarithm is wanted.
_NO_KL = 1e-9


@dataclass
class Problem:
    """One target on one grid.

    Attributes:
        scores: What predicts skip rates.
        text, vision: Thresholds of the grid, ascending, float64.
        target: What to reach.
        least_accuracy: Per task, see `Target.least_accuracy`.
        measure: Runs the model with two thresholds.
        known: Every point measured so far, with these alphas.
    """

    scores: Scores
    text: Tensor
    vision: Tensor
    target: Target
    least_accuracy: dict[str, float]
    measure: Callable[[float, float], Point]
    known: Callable[[], list[Point]]

    def at(self, text: int, vision: int) -> Point:
        """Measure the point of the grid with these indices."""
        return self.measure(float(self.text[text]), float(self.vision[vision]))

    def allowed(self, point: Point) -> bool:
        """Whether the point reaches every rate and stays within every bound on losses."""
        losses = self.target.losses(point, self.least_accuracy)
        return self.target.excess(point) >= 0 and all(loss <= 0 for loss in losses)

    def best(self) -> Point | None:
        """The allowed point of least cost among all measured."""
        allowed = [point for point in self.known() if self.allowed(point)]
        return min(allowed, key=self.target.cost, default=None)


def exhaustive(problem: Problem) -> None:
    """Measure the whole grid."""
    for text in range(len(problem.text)):
        for vision in range(len(problem.vision)):
            problem.at(text, vision)


def staircase(problem: Problem) -> None:
    """The paper's walk along the frontier (MoDES Algorithm 1): the text threshold rises, and a pointer to the
    vision threshold falls as long as the rates are reached.

    The rate is not monotone once skipping changes later routing, and the pointer may then stand where a row
    does not reach it; the paper's code takes that point unseen. Here it is checked, and the pointer walks up.
    """
    if problem.target.wants_most_skip:
        raise SearchError("method='staircase' walks where a skip rate is just reached; give the target one.")
    reached = lambda text, vision: problem.target.excess(problem.at(text, vision)) >= 0  # noqa: E731
    last = len(problem.vision) - 1
    if not reached(len(problem.text) - 1, last):
        return
    pointer = last
    for text in range(len(problem.text)):
        while pointer >= 0 and reached(text, pointer):
            pointer -= 1
        while pointer < last and not reached(text, pointer + 1):
            pointer += 1


def guided(problem: Problem, evaluations: int) -> None:
    """Measure where the model of what was measured expects the best point, at most `evaluations` times.

    The skip rates are predicted up to a drift that is smooth over the grid, and the logarithm of KL is smooth
    too; surfaces through both say which point of the grid is likely to be allowed and better than the best.
    Bayesian optimisation with constraints (Gardner et al., ICML 2014), with the grid as its candidates.
    """
    search = _Guided(problem)
    for text, vision in search.starts(evaluations):
        problem.at(text, vision)
    while search.count < evaluations:
        place = search.next()
        if place is None:
            break
        problem.at(*place)


class _Guided:
    """One guided search: what is predicted of every place of the grid, and what was measured since."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._before = len(problem.known())
        scores = problem.scores
        self._shares = (scores.share(TEXT, problem.text), scores.share(VISION, problem.vision))
        across = (len(problem.text), len(problem.vision))
        self._places = torch.stack(
            [self._shares[0][:, None].expand(across), self._shares[1][None].expand(across)], -1
        ).flatten(0, 1)
        self._predicted = {
            rate: scores.predict(rate, problem.text[:, None], problem.vision[None]).flatten()
            for rate in {*problem.target.rates, "skip"}
        }

    @property
    def count(self) -> int:
        """Passes so far."""
        return len(self._problem.known()) - self._before

    def starts(self, evaluations: int) -> list[tuple[int, int]]:
        """Places to begin with: spread along the frontier that is predicted, or over the whole square."""
        if self._problem.target.wants_most_skip:
            text, vision = (
                [int((share - wanted).abs().argmin()) for wanted in _SPREAD] for share in self._shares
            )
            found = list(product(text, vision))
        else:
            frontier = self._frontier()
            number = min(_STARTS, len(frontier))
            found = [frontier[i * (len(frontier) - 1) // max(1, number - 1)] for i in range(number)]
        return list(dict.fromkeys(found))[:evaluations]

    def _frontier(self) -> list[tuple[int, int]]:
        """For each text threshold the lowest vision threshold that is predicted to reach every rate."""
        reached = torch.ones(len(self._problem.text), len(self._problem.vision), dtype=torch.bool)
        for rate, least in self._problem.target.rates.items():
            reached &= self._predicted[rate].view(reached.shape) >= least
        rows = [(text, int(row.int().argmax())) for text, row in enumerate(reached) if row.any()]
        if not rows:
            return [(len(self._problem.text) - 1, len(self._problem.vision) - 1)]
        # Past the first row that needs no vision threshold, more text pairs go for nothing.
        lowest = min(vision for _, vision in rows)
        end = next(i for i, (_, vision) in enumerate(rows) if vision == lowest)
        return rows[: end + 1]

    def next(self) -> tuple[int, int] | None:
        """The place of the grid with the highest expected gain; None where none is worth a pass."""
        problem, target = self._problem, self._problem.target
        points = problem.known()[-_MEMORY:]
        likely = torch.ones(len(self._places), dtype=torch.float64)
        for rate, least in target.rates.items():
            expected, deviation = self._expect_rate(rate, points)
            likely *= torch.special.ndtr((expected - least) / deviation)
        for losses in zip(*(target.losses(point, problem.least_accuracy) for point in points), strict=True):
            expected, deviation = self._expect(losses, points)
            likely *= torch.special.ndtr(-expected / deviation)
        # While nothing is allowed, whatever may be is compared with no skip at all, or with the worst KL.
        if target.wants_most_skip:
            costs = [-point.skip for point in points]
            expected, deviation = self._expect_rate("skip", points)
            expected, worst, worth = -expected, 0.0, _WORTH_SKIP
        else:
            costs = [math.log(point.kl + _NO_KL) for point in points]
            expected, deviation = self._expect(costs, points)
            worst, worth = max(costs), _WORTH_KL
        allowed = (cost for point, cost in zip(points, costs, strict=True) if problem.allowed(point))
        gain = likely * expected_improvement(min(allowed, default=worst), expected, deviation)
        # All of them, also those too old for the surfaces: measuring one again would tell nothing, forever.
        square = gain.view(len(problem.text), len(problem.vision))
        for point in problem.known():
            # Equal scores give equal thresholds, so a point can have several places.
            square[(problem.text == point.tau_text).outer(problem.vision == point.tau_vision)] = 0.0
        place = int(gain.argmax())
        return divmod(place, len(problem.vision)) if gain[place] > worth else None

    def _expect(self, values: Sequence[float], points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """What is expected at every place of the grid of what was measured at the points, and how surely."""
        shares = [self._problem.scores.share(*of) for of in zip((TEXT, VISION), _taus(points), strict=True)]
        surface = Surface(torch.stack(shares, -1), torch.tensor(values, dtype=torch.float64))
        return surface.at(self._places)

    def _expect_rate(self, rate: str, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """The same of a skip rate: its prediction, and the drift from that."""
        predicted = self._problem.scores.predict(rate, *_taus(points)).tolist()
        drift = [getattr(point, rate) - guess for point, guess in zip(points, predicted, strict=True)]
        expected, deviation = self._expect(drift, points)
        return self._predicted[rate] + expected, deviation


def _taus(points: Sequence[Point]) -> tuple[Tensor, Tensor]:
    text = torch.tensor([point.tau_text for point in points], dtype=torch.float64)
    return text, torch.tensor([point.tau_vision for point in points], dtype=torch.float64)


def refine(problem: Problem, tolerance: float) -> None:
    """Leave the grid: move one threshold at a time by bisection, until the point is within `tolerance` of the
    rates (or, where skip is to be the most, until a bound on losses is met)."""
    if problem.target.wants_most_skip:
        _raise_thresholds(problem)
        return
    best = problem.best()
    if best is not None and problem.target.excess(best) > tolerance / 4:
        for free in (VISION, TEXT):
            low, high = _rank_below(problem, best, free), _rank(problem, best, free)
            _bisect(problem, best, free, low, high, tolerance, _STEPS)
    if not _within(problem, tolerance):
        _fill_gap(problem, tolerance)


def _within(problem: Problem, tolerance: float) -> bool:
    return any(p for p in problem.known() if problem.allowed(p) and problem.target.excess(p) <= tolerance)


def _fill_gap(problem: Problem, tolerance: float) -> None:
    """Equal scores go together and can step over the target; fill up with pairs of the other modality."""
    excess = problem.target.excess
    below = [point for point in problem.known() if excess(point) < 0]
    above = [point for point in problem.known() if excess(point) >= 0]
    bases = ([max(below, key=excess)] if below else []) + ([min(above, key=excess)] if above else [])
    for base in bases:
        for free in (TEXT, VISION):
            low, high = _rank(problem, base, free), _rank(problem, base, free)
            low, high = (low, len(problem.scores.of[free])) if excess(base) < 0 else (0, high)
            _bisect(problem, base, free, low, high, tolerance, _STEPS_IN_GAP)
            if _within(problem, tolerance):
                return


def _bisect(
    problem: Problem, base: Point, free: int, low: int, high: int, tolerance: float, steps: int
) -> None:
    """Move the threshold of modality `free` away from `base` until the rates are just reached.

    Between rank `low`, where they are not, and `high`, where they are. A pair more or less in rank is about a
    pair more or less skipped, so the miss itself is the step; the bracket catches where that does not hold.
    """
    aim = tolerance / 8
    excess = problem.target.excess(base)
    rank: float = _rank(problem, base, free)
    for _ in range(steps):
        rank -= (excess - aim) * problem.scores.num_pairs
        if not low < rank < high:
            rank = (low + high) / 2
        if high - low < 2:
            return
        point = _moved(problem, base, free, round(rank))
        excess = problem.target.excess(point)
        if 0 <= excess <= tolerance / 4:
            return
        low, high = (low, round(rank)) if excess >= 0 else (round(rank), high)


def _raise_thresholds(problem: Problem) -> None:
    """From the best point of the grid towards the next thresholds up, as long as losses stay in bounds."""
    if problem.best() is None:
        problem.measure(0.0, 0.0)
    for free in (VISION, TEXT):
        base = problem.best()
        if base is None:
            return
        low, high = _rank(problem, base, free), _rank_above(problem, base, free)
        for _ in range(_STEPS):
            middle = (low + high) // 2
            if middle in (low, high):
                break
            allowed = problem.allowed(_moved(problem, base, free, middle))
            low, high = (middle, high) if allowed else (low, middle)


def _moved(problem: Problem, base: Point, free: int, rank: int) -> Point:
    tau = problem.scores.threshold(free, rank)
    return problem.measure(tau, base.tau_vision) if free == TEXT else problem.measure(base.tau_text, tau)


def _rank(problem: Problem, point: Point, modality: int) -> int:
    tau = point.tau_text if modality == TEXT else point.tau_vision
    return int(problem.scores.dropped(modality, torch.tensor(tau, dtype=torch.float64)))


def _rank_below(problem: Problem, point: Point, modality: int) -> int:
    """The rank of the next lower threshold of the grid; 0 below the lowest."""
    rank = _rank(problem, point, modality)
    return max((other for other in _grid_ranks(problem, modality) if other < rank), default=0)


def _rank_above(problem: Problem, point: Point, modality: int) -> int:
    """The rank of the next higher threshold of the grid; all pairs above the highest."""
    rank = _rank(problem, point, modality)
    scores = problem.scores.of[modality]
    return min((other for other in _grid_ranks(problem, modality) if other > rank), default=len(scores))


def _grid_ranks(problem: Problem, modality: int) -> list[int]:
    taus = problem.text if modality == TEXT else problem.vision
    return [int(rank) for rank in problem.scores.dropped(modality, taus)]
