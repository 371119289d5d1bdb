"""tau_text and tau_vision: the two thresholds that reach a target at the least loss (MoDES 5.2).

The paper walks a 100 x 100 grid of thresholds along the frontier where the skip rate just reaches its
target. Here one unskipped pass records every score, which predicts the skip rate over the whole grid; passes
are spent where the best point is expected, every point is measured, and thresholds then leave the grid.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import nn

from modes_fx.batches import Batch, survey
from modes_fx.blocks import find_blocks, unwrap
from modes_fx.errors import SearchError
from modes_fx.measure import Meter, Pass, WeightRecorder, model_digest
from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Profile
from modes_fx.progress import Bar, progress_bar
from modes_fx.skipping import block_alphas, thresholds
from modes_fx.threshold_search.grid import Scores, Spacing
from modes_fx.threshold_search.grid import threshold_at_rank as threshold_at_rank
from modes_fx.threshold_search.journal import Journal
from modes_fx.threshold_search.methods import Problem, exhaustive, guided, refine, staircase
from modes_fx.threshold_search.points import Frontier, Point
from modes_fx.threshold_search.targets import Target

Method = Literal["guided", "staircase", "exhaustive"]

# Passes of a guided search, and those of them that are for what lies between the points of the grid.
EVALUATIONS = 30
_REFINING = 6
# Powers of alpha that are tried unless told. Raw alpha decides by layer and hardly by expert: on the demo
# model it spans 1:14, the weights 1:4. The best of these had half (at 50 and 67 % skip) to a quarter (at
# 83 %) of the KL of raw alpha on held-out data, and which power is best depends on the rate.
EXPONENTS = (1.0, 0.5, 0.25, 0.0)
# Passes that are enough to tell which power is best.
_COMPARING = 12


def search(
    model: nn.Module,
    batches: Iterable[Batch],
    profile: Profile,
    *,
    target_skip: float | None = None,
    target: Target | None = None,
    tolerance: float = 0.01,
    method: Method = "guided",
    grid: int = 100,
    spacing: Spacing = "rank",
    exponents: Sequence[float] | None = None,
    resume: str | os.PathLike[str] | None = None,
    save_frontier: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Profile:
    """Set the thresholds of a calibrated profile so that they reach a target.

    Args:
        model: The model that the profile was calibrated on; a compiled one is unwrapped. Left as it was.
        batches: As for `calibrate`; `task` names the task of each row where the target has floors of tasks.
        profile: Its alphas are used, its thresholds replaced.
        target_skip: Dropped pairs / all pairs over non-padding tokens, 0..1; short for `Target(skip=...)`.
            Special tokens are never dropped and do count.
        target: Any other target, in place of `target_skip`.
        tolerance: How far the measured skip rate may lie from the target; at or above it where possible.
        method: `guided` measures where a model of what was measured expects the best point, at most
            `EVALUATIONS` times; `staircase` is the paper's walk, about two passes per step of the grid;
            `exhaustive` measures the whole grid.
        grid: Thresholds of the grid per modality.
        spacing: `rank` spaces them evenly over the recorded scores; `exp` and `linear` are those of the
            paper's code, whatever the scores are.
        exponents: Powers of alpha to try; the best one wins and the profile's alphas become that power,
            normalised. 1 is the paper's alpha; 0 is two thresholds on the routing weights alone. By default
            `EXPONENTS`, or 1 alone for a profile whose alphas were tempered before.
        resume: File to keep what is measured in. A killed search that is started again with it measures
            nothing twice but the unskipped pass, and gives the same profile to the byte.
        save_frontier: File to write every measured point to, see `Frontier`.
        progress: Show a bar.
    Returns:
        The profile with its thresholds, target and what was measured at them on `batches`.
    Raises:
        SearchError: The target contradicts itself or the batches, or no thresholds come within `tolerance`
            of it; the message names the nearest that was measured.
        ModesError: As for `calibrate`; `ProfileError` when the profile is of another model.
    """
    wanted = _one_target(target_skip, target)
    options: dict[str, Any] = {"tolerance": tolerance, "grid": grid, "method": method, "spacing": spacing}
    _check_options(**options)
    powers = _exponents(profile, exponents)
    with progress_bar("search", None, enabled=progress) as bar:
        plain = ThresholdSearch(model, batches, profile, target=wanted, bar=bar, resume=resume)
        pass_steps = plain.meter.survey.num_batches
        passes = {"guided": EVALUATIONS, "staircase": 2 * grid + 1, "exhaustive": grid**2}[method]
        bar.expect(pass_steps * (passes + (_COMPARING * len(powers) if len(powers) > 1 else 0)))
        best = choose_exponent(plain, wanted, powers, **options)
        bar.expect(pass_steps * passes)
        point = best.find(wanted, **options)
    if save_frontier is not None:
        best.frontier.save(save_frontier)
    return apply(best.profile, point, wanted.skip)


def frontier(
    model: nn.Module,
    batches: Iterable[Batch],
    profile: Profile,
    targets: Sequence[float | Target] = (0.5, 0.67, 0.75, 0.83, 0.88),
    *,
    tolerance: float = 0.01,
    grid: int = 100,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Frontier:
    """Everything measured while searching each target in turn, with the profile's alphas as they are."""
    with progress_bar("frontier", None, enabled=progress) as bar:
        thresholds_of = ThresholdSearch(model, batches, profile, bar=bar, resume=resume)
        for target in targets:
            thresholds_of.find(target, tolerance=tolerance, grid=grid)
        return thresholds_of.frontier


def choose_exponent(
    plain: "ThresholdSearch",
    target: float | Target,
    exponents: Sequence[float] | None = None,
    **options: Any,
) -> "ThresholdSearch":
    """The search with the power of alpha that is best at `target`; options as for `ThresholdSearch.find`."""
    target = _as_target(target)
    tries = [plain if power == 1 else plain.tempered(power) for power in _exponents(plain.profile, exponents)]
    if len(tries) == 1:
        return tries[0]
    found: list[tuple[float, ThresholdSearch]] = []
    refused: list[SearchError] = []
    for each in tries:
        try:
            point = each.find(target, **{**options, "method": "guided", "evaluations": _COMPARING})
            found.append((target.cost(point), each))
        except SearchError as error:
            # Ties that step over the target with one power may not with another.
            refused.append(error)
    if not found:
        raise refused[0]
    return min(found, key=lambda entry: entry[0])[1]


def apply(profile: Profile, point: Point, target_skip: float | None) -> Profile:
    """The profile with a point's thresholds and what was measured there."""
    return dataclasses.replace(
        profile,
        tau_text=point.tau_text,
        tau_vision=point.tau_vision,
        target_skip=target_skip,
        measured_skip=point.skip,
        measured_skip_text=point.skip_text,
        measured_skip_vision=point.skip_vision,
        kl=point.kl,
        kl_low=point.kl_low,
        kl_high=point.kl_high,
    )


class ThresholdSearch:
    """Finds thresholds for one model, batches and profile; targets share what has been measured.

    Args:
        model, batches, profile: As for `search`.
        target: Batches that hold nothing of what it is about are refused before the model runs.
        resume: As for `search`.
    Attributes:
        profile: The profile whose alphas are used.
        exponent: The power of the given profile's alphas that these are.
        meter: What measures, for comparing other policies on the same batches.
        scores: The recorded scores, and the skip rates that they predict.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        profile: Profile,
        *,
        target: Target | None = None,
        bar: Bar | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> None:
        model = unwrap(model)
        block_alphas(profile, find_blocks(model))  # A foreign profile is refused before anything runs.
        ids = (profile.visual_token_ids, profile.special_token_ids)
        surveyed = survey(batches, *ids, profile.vocab_size)
        if target is not None:
            target.check_batches(surveyed)
        cleared = profile.with_thresholds(tau_text=0.0, tau_vision=0.0)
        key = {"profile": cleared.digest(), "model": model_digest(model)} if resume is not None else {}
        journal = Journal(resume, key)
        journal.check_batches(list(surveyed.digests))
        recorder = WeightRecorder()
        meter = Meter(model, batches, *ids, surveyed=surveyed, observe=recorder, bar=bar)
        self._start(meter, recorder, profile, bar or Bar(), journal, 1.0)

    def _start(
        self,
        meter: Meter,
        recorder: WeightRecorder,
        profile: Profile,
        bar: Bar,
        journal: Journal,
        exponent: float,
    ) -> None:
        self.meter, self.profile, self.exponent = meter, profile, exponent
        self._recorder, self._bar, self._journal = recorder, bar, journal
        self._alphas = block_alphas(profile, meter.blocks)
        assert meter.unskipped.phases is not None
        self.scores = Scores(recorder, self._alphas, meter.counts, meter.unskipped.phases)
        self._found: dict[tuple[float, float], Point] = {}

    def tempered(self, exponent: float) -> "ThresholdSearch":
        """The same search with alpha**exponent; what the original model answered is not computed again."""
        other = object.__new__(ThresholdSearch)
        profile = self.profile if exponent == 1 else self.profile.tempered(exponent)
        power = self.exponent * exponent
        other._start(self.meter, self._recorder, profile, self._bar, self._journal, power)
        return other

    @property
    def points(self) -> list[Point]:
        """Everything measured with these alphas, in order."""
        return list(self._found.values())

    @property
    def frontier(self) -> Frontier:
        """Everything measured, with these alphas and other powers of them."""
        return Frontier(self._journal.points)

    @property
    def highest_skip(self) -> float:
        """The skip rate when every pair of a text or vision token is dropped: exact, nothing skips more."""
        return self.scores.highest("skip")

    def measure(self, tau_text: float, tau_vision: float) -> Point:
        """Run the model with these thresholds over all batches, once."""
        taus = (tau_text, tau_vision)
        if taus not in self._found:
            self._found[taus] = self._journal.find(self.exponent, taus) or self._run(taus)
            point = self._found[taus]
            self._bar.note(f"skip {point.skip:.3f} KL {point.kl:.5f}")
        return self._found[taus]

    def _run(self, taus: tuple[float, float]) -> Point:
        def keep(done: Pass) -> None:
            self._journal.keep_pass(self.exponent, taus, done)

        done = self._journal.under_way(self.exponent, taus)
        rule = thresholds(self._alphas, *taus)
        measured = self.meter.measure(rule, bar=self._bar, done=done, after_batch=keep)
        point = Point.of(taus, measured, self.exponent)
        self._journal.keep(point)
        return point

    def find(
        self,
        target: float | Target,
        *,
        tolerance: float = 0.01,
        grid: int = 100,
        method: Method = "guided",
        spacing: Spacing = "rank",
        evaluations: int = EVALUATIONS,
        leave_grid: bool = True,
    ) -> Point:
        """The best measured thresholds for a target, see `search`.

        Args:
            evaluations: Passes that a guided search may take; more only where ties step over the target.
            leave_grid: Whether to go on between the points of the grid.
        """
        target = _as_target(target)
        _check_options(tolerance, grid, method, spacing)
        for name, rate in target.rates.items():
            if rate > self.scores.highest(name) + tolerance:
                raise SearchError(
                    f"A {_spoken(name)} of {rate:.3f} cannot be reached: special tokens are never skipped, "
                    f"and the nearest reachable is {self.scores.highest(name):.3f}, with everything else "
                    "dropped."
                )
        if not target.wants_most_skip and not any(target.rates.values()):
            return self.measure(0.0, 0.0)
        problem = Problem(
            self.scores,
            self.scores.grid(TEXT, grid, spacing),
            self.scores.grid(VISION, grid, spacing),
            target,
            target.least_accuracy(self.meter.unskipped.accuracy),
            self.measure,
            lambda: self.points,
        )
        if method == "guided":
            guided(problem, evaluations - _REFINING if leave_grid else evaluations)
        else:
            {"staircase": staircase, "exhaustive": exhaustive}[method](problem)
        if leave_grid:
            refine(problem, tolerance)
        return self._best(problem, tolerance if leave_grid else 1.0)

    def _best(self, problem: Problem, tolerance: float) -> Point:
        target = problem.target

        def pool(least: float) -> list[Point]:
            within = [p for p in self.points if least <= target.excess(p) <= tolerance]
            return [p for p in within if all(loss <= 0 for loss in target.losses(p, problem.least_accuracy))]

        if target.wants_most_skip:
            found = [p for p in self.points if problem.allowed(p)]
        else:
            found = pool(0.0) or pool(-tolerance)
        if found:
            return min(found, key=lambda point: (target.cost(point), abs(target.excess(point))))
        near = min(self.points, key=lambda point: abs(target.excess(point)))
        if target.kl is not None or problem.least_accuracy:
            raise SearchError(
                f"No thresholds were found for {target}; at {near} the losses are above what they may be."
            )
        raise SearchError(
            f"No thresholds give a skip rate within {tolerance:g} of {target}; "
            f"the nearest reachable found is {near.skip:.3f}."
        )


def _check_options(tolerance: float, grid: int, method: str, spacing: str) -> None:
    if not tolerance > 0 or grid < 1:
        raise SearchError(f"tolerance and grid must be above 0, got {tolerance} and {grid}.")
    for name, value, known in (("method", method, Method), ("spacing", spacing, Spacing)):
        if value not in get_args(known):
            raise SearchError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}.")


def _exponents(profile: Profile, exponents: Sequence[float] | None) -> Sequence[float]:
    if exponents is None:
        return (1.0,) if "^" in profile.method else EXPONENTS
    if not exponents:
        raise SearchError("exponents is empty; pass at least one, 1.0 for the paper's alpha.")
    return exponents


def _one_target(target_skip: float | None, target: Target | None) -> Target:
    if (target_skip is None) == (target is None):
        raise SearchError("Give target_skip, or target=Target(...) for any other target, and not both.")
    return Target(skip=target_skip) if target is None else target


def _as_target(target: float | Target) -> Target:
    return target if isinstance(target, Target) else Target(skip=target)


def _spoken(rate: str) -> str:
    return " ".join(["skip rate", *(["of", part] if (part := rate.removeprefix("skip").strip("_")) else [])])
