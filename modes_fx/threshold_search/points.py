"""What a search measured: points, and which of them no other one beats."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modes_fx.errors import SearchError
from modes_fx.measure import Measured
from modes_fx.profile import write_atomically

FORMAT = "modes_fx.frontier"
VERSION = 1

# Skip rates that a target can ask for; `Measured` and `Point` have an attribute of each name.
RATES = ("skip", "skip_text", "skip_vision", "skip_prefill", "skip_decode")


@dataclass(frozen=True)
class Point:
    """Two thresholds and what they measure on the batches of a search.

    Attributes:
        tau_text, tau_vision: The thresholds.
        skip: Dropped pairs / all pairs over non-padding tokens, 0..1.
        skip_text, skip_vision, skip_prefill, skip_decode: The same over the tokens of one modality or phase.
        kl: KL(original || skipped), mean over answer tokens, nats.
        kl_low, kl_high: 95 % confidence interval of `kl` by bootstrap over samples.
        accuracy: Per task that the batches name, the share of right answers.
        exponent: The power of the profile's alpha that the thresholds belong to.
    """

    tau_text: float
    tau_vision: float
    skip: float
    skip_text: float
    skip_vision: float
    kl: float
    kl_low: float = 0.0
    kl_high: float = math.inf
    skip_prefill: float = 0.0
    skip_decode: float = 0.0
    accuracy: Mapping[str, float] = field(default_factory=dict, hash=False)
    exponent: float = 1.0

    @classmethod
    def of(cls, taus: tuple[float, float], measured: Measured, exponent: float = 1.0) -> "Point":
        low, high = measured.kl_interval() if measured.kl_sums else (0.0, math.inf)
        rates: dict[str, Any] = {name: getattr(measured, name) for name in RATES}
        return cls(
            tau_text=taus[0],
            tau_vision=taus[1],
            **rates,
            kl=measured.kl,
            kl_low=low,
            kl_high=high,
            accuracy=measured.accuracy,
            exponent=exponent,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: what is infinite becomes the string "inf"."""
        plain = dataclasses.asdict(self)
        return {key: str(value) if value == math.inf else value for key, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Point":
        """The inverse of `to_dict`."""
        fields: dict[str, Any] = {key: math.inf if value == "inf" else value for key, value in plain.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Frontier:
    """Every point that a search measured, in order."""

    points: tuple[Point, ...]

    @property
    def best(self) -> tuple[Point, ...]:
        """The points that no other one beats in skip rate and KL both, by rising skip rate."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda point: (-point.skip, point.kl)):
            if not found or point.kl < found[-1].kl:
                found.append(point)
        return tuple(reversed(found))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all points as JSON, those of `best` marked; another process sees a whole file."""
        best = set(map(id, self.best))
        points = [{**point.to_dict(), "best": id(point) in best} for point in self.points]
        plain = {"format": FORMAT, "version": VERSION, "points": points}
        write_atomically(path, json.dumps(plain, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Frontier":
        """The inverse of `save`."""
        try:
            plain = json.loads(Path(path).read_bytes())
            if (plain["format"], plain["version"]) != (FORMAT, VERSION):
                raise ValueError
            points = [{key: value for key, value in p.items() if key != "best"} for p in plain["points"]]
            return cls(tuple(map(Point.from_dict, points)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SearchError(f"{os.fspath(path)} is not a file that Frontier.save wrote.") from None
