"""tau_text and tau_vision: the two thresholds that reach a wanted skip rate at the least KL (MoDES 5.2).

The paper walks a 100 x 100 grid of thresholds along the frontier where the skip rate just reaches its target.
Here one unskipped pass records every score, so thresholds are placed at *ranks* of the scores, and the skip
rate that fixed routing would give (open loop) is known everywhere. Skipping changes later routing, so every
candidate is then run for real (closed loop) and its vision threshold corrected until the measured rate fits.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modes_fx.blocks import find_blocks
from modes_fx.errors import SearchError
from modes_fx.measure import Batch, Measured, Meter, WeightRecorder
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.profile import Profile
from modes_fx.progress import Bar, progress_bar
from modes_fx.skipping import block_alphas, thresholds

# Text thresholds tried before refining around the best, and closed-loop corrections of each.
_COARSE_LEVELS = 8
_CORRECTIONS = 3

# Powers of alpha that are tried unless told. Raw alpha decides by layer and hardly by expert: on the demo
# model it spans 1:14, the weights 1:4. The best of these had half (at 50 and 67 % skip) to a quarter (at
# 83 %) of the KL of raw alpha on held-out data, and which power is best depends on the rate.
EXPONENTS = (1.0, 0.5, 0.25, 0.0)
# Text thresholds that are enough to tell which power is best.
_COMPARE_GRID = 16


@dataclass(frozen=True)
class Point:
    """Two thresholds and what they measure: skip rates in 0..1, KL per answer token in nats."""

    tau_text: float
    tau_vision: float
    skip: float
    skip_text: float
    skip_vision: float
    kl: float


def search(
    model: nn.Module,
    batches: Iterable[Batch],
    profile: Profile,
    *,
    target_skip: float,
    tolerance: float = 0.01,
    grid: int = 100,
    exponents: Sequence[float] | None = None,
    progress: bool = True,
) -> Profile:
    """Set the thresholds of a calibrated profile so that it skips `target_skip` of all pairs.

    Args:
        model: The model that the profile was calibrated on; a compiled one is unwrapped. Left as it was.
        batches: As for `calibrate`.
        profile: Its alphas are used, its thresholds replaced.
        target_skip: Dropped pairs / all pairs over non-padding tokens, 0..1. Special tokens are never
            dropped and do count.
        tolerance: How far the measured skip rate may lie from the target; at or above it where possible.
        grid: Text thresholds are placed at multiples of 1/grid of the text pairs.
        exponents: Powers of alpha to try; the one of least KL wins and the profile's alphas become that
            power, normalised. 1 is the paper's alpha; 0 is two thresholds on the routing weights alone.
            By default `EXPONENTS`, or 1 alone for a profile whose alphas were tempered before.
        progress: Show a bar.
    Returns:
        The profile with its thresholds, target and what was measured at them on `batches`.
    Raises:
        SearchError: No thresholds come within `tolerance`; the message names the nearest measured rate.
        ModesError: As for `calibrate`; `ProfileError` when the profile is of another model.
    """
    with progress_bar("search", None, enabled=progress) as bar:
        plain = ThresholdSearch(model, batches, profile, bar=bar)
        best = choose_exponent(plain, target_skip, exponents, tolerance=tolerance, grid=grid)
        point = best.find(target_skip, tolerance=tolerance, grid=grid)
    return apply(best.profile, point, target_skip)


def frontier(
    model: nn.Module,
    batches: Iterable[Batch],
    profile: Profile,
    targets: Sequence[float] = (0.5, 0.67, 0.75, 0.83, 0.88),
    *,
    tolerance: float = 0.01,
    grid: int = 16,
    progress: bool = True,
) -> list[Point]:
    """The best point found for each target, measured; for plots. See `search`."""
    with progress_bar("frontier", None, enabled=progress) as bar:
        thresholds_of = ThresholdSearch(model, batches, profile, bar=bar)
        return [thresholds_of.find(target, tolerance=tolerance, grid=grid) for target in targets]


def choose_exponent(
    plain: "ThresholdSearch",
    target: float,
    exponents: Sequence[float] | None = None,
    *,
    tolerance: float = 0.01,
    grid: int = 100,
) -> "ThresholdSearch":
    """The search with the power of alpha whose KL at `target` is least; arguments as for `search`."""
    if exponents is None:
        exponents = (1.0,) if "^" in plain.profile.method else EXPONENTS
    if not exponents:
        raise SearchError("exponents is empty; pass at least one, 1.0 for the paper's alpha.")
    tries = [plain if power == 1 else plain.tempered(power) for power in exponents]
    if len(tries) == 1:
        return tries[0]
    found: list[tuple[float, ThresholdSearch]] = []
    refused: list[SearchError] = []
    for each in tries:
        try:
            point = each.find(target, tolerance=tolerance, grid=min(grid, _COMPARE_GRID))
            found.append((point.kl, each))
        except SearchError as error:
            # Ties that step over the target with one power may not with another.
            refused.append(error)
    if not found:
        raise refused[0]
    return min(found, key=lambda entry: entry[0])[1]


def apply(profile: Profile, point: Point, target_skip: float) -> Profile:
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
    )


def threshold_at_rank(scores: Tensor, rank: int) -> float:
    """The threshold below which about `rank` of the scores lie.

    Between two neighbouring scores where they differ; among equal scores, which stand or fall together, at
    the nearer end of the run.

    Args:
        scores: Ascending, `[pairs]` float32, >= 0.
        rank: Pairs to drop; <= 0 gives 0.0 (none), >= len(scores) gives inf (all).
    """
    count = len(scores)
    if rank <= 0 or count == 0:
        return 0.0
    if rank < count:
        value = scores[rank]
        first = int(torch.searchsorted(scores, value))
        last = int(torch.searchsorted(scores, value, right=True))
        rank = first if rank - first <= last - rank else last
    if rank <= 0:
        return 0.0
    if rank >= count:
        return math.inf
    below, above = scores[rank - 1], scores[rank]
    middle = (below + above) / 2
    return float(middle if middle > below else above)


class ThresholdSearch:
    """Finds thresholds for one model, batches and profile; targets share what has been measured.

    Attributes:
        profile: The profile whose alphas are used.
        points: Everything measured so far, in order.
        meter: What measures it, for comparing other policies on the same batches.
    """

    def __init__(
        self, model: nn.Module, batches: Iterable[Batch], profile: Profile, *, bar: Bar | None = None
    ) -> None:
        block_alphas(profile, find_blocks(model))  # A foreign profile is refused before anything runs.
        recorder = WeightRecorder()
        ids = (profile.visual_token_ids, profile.special_token_ids)
        meter = Meter(model, batches, *ids, observe=recorder, bar=bar)
        self._start(meter, recorder, profile, bar or Bar())

    def _start(self, meter: Meter, recorder: WeightRecorder, profile: Profile, bar: Bar) -> None:
        self.meter, self._recorder, self.profile, self._bar = meter, recorder, profile, bar
        self._alphas = block_alphas(profile, meter.blocks)
        text, vision = zip(*self._alphas, strict=True)
        self._scores = (recorder.scores(TEXT, text), recorder.scores(VISION, vision))
        self._pairs = int(meter.counts.pairs.sum())
        self._other = int(meter.counts.pairs[:, OTHER].sum())
        self._found: dict[tuple[float, float], Point] = {}
        # How much more than predicted was skipped, lately, in pairs: the first guess for the next candidate.
        self._drift = 0.0

    def tempered(self, exponent: float) -> "ThresholdSearch":
        """The same search with alpha**exponent; what the original model answered is not computed again."""
        other = object.__new__(ThresholdSearch)
        other._start(self.meter, self._recorder, self.profile.tempered(exponent), self._bar)
        return other

    @property
    def points(self) -> list[Point]:
        return list(self._found.values())

    @property
    def highest_skip(self) -> float:
        """The skip rate when every pair of a text or vision token is dropped: exact, nothing skips more."""
        return 1 - self._other / self._pairs

    def measure(self, tau_text: float, tau_vision: float) -> Point:
        """Run the model with these thresholds over all batches, once."""
        key = (tau_text, tau_vision)
        if key not in self._found:
            measured = self.meter.measure(thresholds(self._alphas, tau_text, tau_vision), bar=self._bar)
            self._found[key] = _point(key, measured)
            self._bar.note(f"skip {measured.skip:.3f} KL {measured.kl:.5f}")
        return self._found[key]

    def find(self, target: float, *, tolerance: float = 0.01, grid: int = 100) -> Point:
        """The thresholds of least measured KL whose measured skip rate meets `target`; see `search`."""
        if not 0 <= target <= 1:
            raise SearchError(f"target_skip must be from 0 to 1, got {target}.")
        if tolerance <= 0 or grid < 1:
            raise SearchError(f"tolerance and grid must be above 0, got {tolerance} and {grid}.")
        if target > self.highest_skip + tolerance:
            raise SearchError(
                f"A skip rate of {target:.3f} cannot be reached: special tokens are never skipped, and the "
                f"nearest reachable is {self.highest_skip:.3f}, with everything else dropped."
            )
        if target == 0:
            return self.measure(0.0, 0.0)
        self._drift = 0.0
        self._try_edges(target, tolerance)
        self._try_text_levels(target, tolerance, grid)
        best = self._best(target, tolerance)
        if best is None:
            self._try_beside_plateaus(target, tolerance)
            best = self._best(target, tolerance)
        if best is None:
            near = min(self.points, key=lambda point: abs(point.skip - target))
            raise SearchError(
                f"No thresholds give a skip rate within {tolerance:g} of {target:.3f}; "
                f"the nearest reachable found is {near.skip:.3f}."
            )
        return best

    def _try_edges(self, target: float, tolerance: float) -> None:
        """The ends of the frontier, where one modality is skipped entirely or not at all."""
        wanted = target * self._pairs
        if target >= self.highest_skip - tolerance:
            self.measure(math.inf, math.inf)
        if wanted >= len(self._scores[VISION]):
            self._solve(TEXT, math.inf, wanted - len(self._scores[VISION]), target, tolerance)
        if wanted <= len(self._scores[TEXT]):
            self._solve(TEXT, 0.0, wanted, target, tolerance)

    def _try_text_levels(self, target: float, tolerance: float, grid: int) -> None:
        """Text thresholds over the whole frontier, then ever closer around the best one."""
        text, vision = len(self._scores[TEXT]), len(self._scores[VISION])
        wanted = target * self._pairs
        first = max(0, math.ceil(grid * (wanted - vision) / text)) if text else 0
        last = min(grid, math.floor(grid * wanted / text)) if text else 0
        tried: dict[int, Point] = {}

        def try_level(level: int) -> None:
            if level not in tried and first <= level <= last:
                rank = round(level / grid * text)
                tau = threshold_at_rank(self._scores[TEXT], rank)
                tried[level] = self._solve(VISION, tau, wanted - rank, target, tolerance)

        step = max(1, math.ceil((last - first) / _COARSE_LEVELS))
        for level in [*range(first, last + 1, step), last]:
            try_level(level)
        while step > 1 and tried:
            step = (step + 1) // 2 if step > 2 else 1
            near = {lv: p for lv, p in tried.items() if abs(p.skip - target) <= tolerance} or tried
            centre = min(near, key=lambda lv: near[lv].kl)
            try_level(centre - step)
            try_level(centre + step)

    def _try_beside_plateaus(self, target: float, tolerance: float) -> None:
        """Equal scores drop together and can step over the target; fill the gap with text pairs."""
        wanted = target * self._pairs
        for side in (min, max):
            gap = [p for p in self.points if (p.skip < target) == (side is max)]
            if gap:
                tau = side(gap, key=lambda point: point.skip).tau_vision
                vision = float((self._scores[VISION] < tau).sum())
                self._solve(TEXT, tau, wanted - vision, target, tolerance, corrections=4 * _CORRECTIONS)

    def _solve(
        self,
        free: int,
        fixed: float,
        rank: float,
        target: float,
        tolerance: float,
        corrections: int = _CORRECTIONS,
    ) -> Point:
        """Move the threshold of modality `free` from `rank` on until the measured skip rate meets the target.

        A pair more or less in rank is about a pair more or less skipped, so the miss itself is the step; a
        bracket of what was too low and too high catches where that does not hold.
        """
        scores = self._scores[free]
        low, high = 0.0, float(len(scores))
        start = rank
        # A little above the target, for at or above it is what is wanted.
        aim = target + tolerance / 4
        rank += (aim - target) * self._pairs - self._drift
        best: Point | None = None
        for _ in range(1 + corrections):
            tau = threshold_at_rank(scores, round(min(max(rank, low), high)))
            point = self.measure(fixed, tau) if free == VISION else self.measure(tau, fixed)
            if best is None or _miss(point, target) < _miss(best, target):
                best = point
                self._drift = (point.skip - target) * self._pairs - (rank - start)
            if 0 <= point.skip - target <= tolerance / 2:
                break
            low, high = (max(low, rank), high) if point.skip < target else (low, min(high, rank))
            guess = rank + (aim - point.skip) * self._pairs
            rank = guess if low < guess < high else (low + high) / 2
            if high - low < 1:
                break
        assert best is not None
        return best

    def _best(self, target: float, tolerance: float) -> Point | None:
        reached = [p for p in self.points if 0 <= p.skip - target <= tolerance]
        near = [p for p in self.points if abs(p.skip - target) <= tolerance]
        pool = reached or near
        return min(pool, key=lambda point: (point.kl, abs(point.skip - target))) if pool else None


def _miss(point: Point, target: float) -> float:
    """Distance from the target; below it counts double."""
    return point.skip - target if point.skip >= target else 2 * (target - point.skip)


def _point(taus: tuple[float, float], measured: Measured) -> Point:
    return Point(*taus, measured.skip, measured.skip_text, measured.skip_vision, measured.kl)
