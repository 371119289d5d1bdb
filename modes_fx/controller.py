"""Hold a skip rate while the traffic drifts: `modes_fx.Controller`.

    skip  = dropped / all pairs of text and vision tokens, counted since the last reading
    place = place + gain * (target - skip), within bounds          tau = path(place), log(tau) linear in place

The path is the ray through the profile's thresholds, unless another is given, so that the ratio of text to
vision stays the profile's; a threshold of zero or infinity stays, and the other one moves alone. Summed over
the readings, the errors are what the place has moved divided by the gain; the place is bounded, so over N
readings that stayed within the bounds the mean skip rate is within `length of the path / (gain * N)` of the
target, whatever the traffic does: the argument of adaptive conformal inference (Gibbs and Candes, arXiv
2106.00170, proposition 4.1). At a bound the place stops, so that nothing has to be unwound when the traffic
comes back. It settles without swinging where gain * slope < 1, the slope being that of the skip rate over
log(tau); `default_gain` has the slope near the target in mind.
"""

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from modes_fx.errors import ProfileError
from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Profile, write_atomically
from modes_fx.skipping import Counts
from modes_fx.thresholds import Thresholds

FORMAT = "modes_fx.controller"
VERSION = 1
_SKIPPED = [TEXT, VISION]


class Adjustable(Protocol):
    """What a controller holds: a `Backend`, or what `attach` returns."""

    profile: Profile
    thresholds: Thresholds | None
    counting: bool

    def counts(self) -> Counts: ...


@dataclass(frozen=True)
class Reading:
    """What one reading of the counts gave.

    Attributes:
        skip: Dropped / all pairs of text and vision tokens since the reading before, 0..1.
        pairs: All of those pairs.
        tau_text, tau_vision: Thresholds from now on.
        at_bound: They are at an end of the path; the target is out of reach of this traffic.
    """

    skip: float
    pairs: int
    tau_text: float
    tau_vision: float
    at_bound: bool


class Controller:
    """Moves the thresholds of a running model so that its measured skip rate stays near a target.

    Call `step()` after each call of the model. Tokens that are never skipped (special ones, padding, those of
    unknown modality) are left out of the skip rate: a graph cannot tell padding from other special tokens.

    Attributes:
        target_skip: May be changed at any time.
        place: Where on the path the thresholds are, from 0 to `length`; in units of log(tau).
        readings: How many there were.
    """

    def __init__(
        self,
        model: Adjustable,
        target_skip: float | None = None,
        *,
        bounds: tuple[float, float] = (0.25, 4.0),
        path: Sequence[tuple[float, float]] | None = None,
        every: int = 8,
        min_pairs: int = 4096,
        gain: float | None = None,
    ) -> None:
        """
        Args:
            model: `modes_fx.backend(profile, adjustable=..., counting=True)`, or what `modes_fx.attach` with
                these arguments returns.
            target_skip: Wanted skip rate over text and vision tokens, 0..1; None takes the profile's target.
            bounds: Least and greatest factor on the profile's thresholds.
            path: Points (tau_text, tau_vision) to move along instead, in order of rising skip rate, at least
                two; for example the frontier of a search. One that changes is finite and above zero.
            every: Calls between two readings. A reading waits for what a GPU has been given.
            min_pairs: A reading that saw fewer pairs is left to the next one.
            gain: Change of log(tau) for an error of 1; None for `default_gain(target_skip)`.
        Raises:
            ValueError: An argument is out of range, or `model` is not adjustable or does not count.
        """
        if model.thresholds is None or not model.counting:
            raise ValueError("Pass adjustable=True and counting=True to modes_fx.backend or modes_fx.attach.")
        if target_skip is None:
            target_skip = model.profile.target_skip
        if target_skip is None or not 0 <= target_skip <= 1:
            raise ValueError(f"target_skip must be from 0 to 1, got {target_skip}.")
        if every < 1 or min_pairs < 1 or not (gain is None or 0 < gain < math.inf):
            raise ValueError(
                f"every, min_pairs and gain must be above zero, got {every}, {min_pairs} and {gain}."
            )
        self.target_skip = target_skip
        self.every, self.min_pairs, self.gain = every, min_pairs, gain
        self.readings = 0
        self._model = model
        self._thresholds = model.thresholds
        self._path = _Path(_ray(model.profile, bounds) if path is None else path, model.thresholds)
        self.place = self._path.nearest((self._thresholds.text, self._thresholds.vision))
        self._calls = 0
        self._seen = self._count()
        self._lock = threading.Lock()

    @property
    def length(self) -> float:
        """Of the path, in units of log(tau)."""
        return self._path.places[-1]

    def step(self) -> Reading | None:
        """Count one call; every so many, read the counts and move the thresholds.

        Until the first reading the thresholds are what they were, to the bit. Any thread may call this.

        Returns:
            The reading, or None where there was none.
        """
        with self._lock:
            self._calls += 1
            if self._calls < self.every:
                return None
            self._calls = 0
            seen = self._count()
            pairs, dropped = (now - before for now, before in zip(seen, self._seen, strict=True))
            if pairs < self.min_pairs:
                return None
            self._seen = seen
            self.readings += 1
            skip = dropped / pairs
            gain = default_gain(self.target_skip) if self.gain is None else self.gain
            self._move_to(self.place + gain * (self.target_skip - skip))
            at_bound = self.place in (0.0, self.length)
            return Reading(skip, pairs, self._thresholds.text, self._thresholds.vision, at_bound)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as JSON, whole or not at all."""
        with self._lock:
            state = {
                "format": FORMAT,
                "version": VERSION,
                "profile": self._model.profile.digest(),
                "tau_text": self._thresholds.text,
                "tau_vision": self._thresholds.vision,
                "readings": self.readings,
            }
        write_atomically(path, json.dumps(state, indent=2) + "\n")

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a saved state: from the place on this controller's path next to the saved thresholds.

        Raises:
            ProfileError: No state of a controller, or one of another profile; nothing is changed.
        """
        taus, readings = _read_state(Path(path), self._model.profile.digest())
        with self._lock:
            self.readings = readings
            self._move_to(self._path.nearest(taus))
            self._calls, self._seen = 0, self._count()

    def _move_to(self, place: float) -> None:
        self.place = min(max(place, 0.0), self.length)
        text, vision = self._path.at(self.place)
        self._thresholds.set(text=text, vision=vision)

    def _count(self) -> tuple[int, int]:
        counts = self._model.counts()
        return int(counts.pairs[:, _SKIPPED].sum()), int(counts.dropped[:, _SKIPPED].sum())


def default_gain(target_skip: float) -> float:
    """A gain for which gain * slope is about a half; at most 4.

    Skip rates over log(tau) are near a logistic curve, of slope `steepness * skip * (1 - skip)`, with a
    steepness of 2 to 3 on the demo model.
    """
    return 0.25 / max(target_skip * (1 - target_skip), 1 / 16)


class _Path:
    """Points (tau_text, tau_vision), joined by straight lines in log(tau).

    Attributes:
        places: Of the points; two of them are as far apart as the threshold that changes more, in log(tau).
    """

    def __init__(self, points: Sequence[tuple[float, float]], thresholds: Thresholds) -> None:
        moves = [len(set(taus)) > 1 for taus in zip(*points, strict=True)]
        moving = [tau for point in points for tau, moved in zip(point, moves, strict=True) if moved]
        if len(points) < 2 or not moving or not all(0 < tau < math.inf for tau in moving):
            raise ValueError(
                "A path needs two points or more, and at least one threshold that changes, whose values are "
                f"all finite and above zero, got {points}. Has the profile been searched?"
            )
        for point in points:
            if not all(low <= tau <= high for tau, (low, high) in zip(point, thresholds.bounds, strict=True)):
                raise ValueError(
                    f"The thresholds {point} are out of the bounds that the model was compiled with, "
                    f"{thresholds.bounds}; give `adjustable` wider factors."
                )
        self.points = [tuple(map(float, point)) for point in points]
        self.moves = torch.tensor(moves)
        # What does not move has a distance of zero from anything.
        self.logs = torch.tensor(points, dtype=torch.float64).log().where(self.moves, 0.0)
        steps = self.logs.diff(dim=0).abs().amax(1)
        if not steps.min() > 0:
            raise ValueError(f"Two points of a path that follow one another must differ, got {points}.")
        self.places = [0.0, *steps.cumsum(0).tolist()]

    def at(self, place: float) -> tuple[float, float]:
        """The thresholds there."""
        after = next(i for i, each in enumerate(self.places) if each >= place)
        if self.places[after] == place:
            # Exactly, for a bound may be there.
            text, vision = self.points[after]
            return text, vision
        start, end = self.places[after - 1 : after + 1]
        logs = torch.lerp(self.logs[after - 1], self.logs[after], (place - start) / (end - start))
        ends = zip(self.points[after - 1], self.points[after], strict=True)
        # No rounding may lead out of the path, and what does not move stays.
        text, vision = (
            min(max(tau, min(pair)), max(pair)) for tau, pair in zip(logs.exp().tolist(), ends, strict=True)
        )
        return text, vision

    def nearest(self, taus: tuple[float, float]) -> float:
        """The place next to these thresholds, in log(tau)."""
        finite = torch.finfo(torch.float64)
        point = torch.tensor(taus, dtype=torch.float64).clamp(finite.tiny, finite.max).log()
        point = point.where(self.moves, 0.0)
        starts, along = self.logs[:-1], self.logs.diff(dim=0)
        shares = (((point - starts) * along).sum(1) / (along * along).sum(1)).clamp(0, 1)
        distances = (starts + shares[:, None] * along - point).norm(dim=1)
        best = int(distances.argmin())
        start, end = self.places[best : best + 2]
        return start + float(shares[best]) * (end - start)


def _ray(profile: Profile, bounds: tuple[float, float]) -> list[tuple[float, float]]:
    low, high = bounds
    if not 0 < low <= 1 <= high < math.inf or low == high:
        raise ValueError(f"bounds must be factors (low, high), 0 < low <= 1 <= high, got {bounds}.")
    text, vision = profile.tau_text, profile.tau_vision
    return [(low * text, low * vision), (high * text, high * vision)]


def _read_state(path: Path, digest: str) -> tuple[tuple[float, float], int]:
    try:
        state: Any = json.loads(path.read_text("utf-8"))
    except ValueError:
        state = None
    if not isinstance(state, dict) or (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise ProfileError(f"{path} holds no state of a controller; pass a file written by Controller.save.")
    if state.get("profile") != digest:
        raise ProfileError(f"{path} is the state of a controller of another profile; start without it.")
    taus, readings = (state.get("tau_text"), state.get("tau_vision")), state.get("readings")
    if not all(isinstance(tau, int | float) and tau >= 0 for tau in taus) or not (
        isinstance(readings, int) and readings >= 0
    ):
        raise ProfileError(f"{path} is damaged; start without it.")
    return (float(taus[0]), float(taus[1])), readings  # type: ignore[arg-type]
