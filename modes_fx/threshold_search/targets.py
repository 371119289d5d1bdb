"""What a search is to reach: skip rates, of all tokens or of some, a KL budget, floors of accuracy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from modes_fx.batches import Survey
from modes_fx.errors import SearchError
from modes_fx.threshold_search.points import RATES, Point


@dataclass(frozen=True)
class Target:
    """What thresholds are to reach, by what the batches of the search measure.

    With `skip`, or with rates of parts alone, the search takes the least KL that reaches every rate. With a
    KL budget or floors of accuracy and no `skip`, it takes the most skip that stays within them and reaches
    the rates of parts.

    Attributes:
        skip: Least skip rate over all tokens, 0..1; special tokens count, and are never skipped.
        skip_text, skip_vision: Least skip rate over the tokens of one modality.
        skip_prefill, skip_decode: Least skip rate over the tokens of the prompt, or over those that
            generation computes one at a time, see `modes_fx.batches.token_phase`.
        kl: Most KL(original || skipped), nats per answer token.
        kl_bound: What must stay under `kl`: the `mean` over the answer tokens, or the `upper` end of its 95 %
            confidence interval.
        task_floors: Least accuracy of each task as a share of what the original model has on it, 0..1: one
            share for every task that the batches name, or one per task, by name.
    Raises:
        SearchError: It asks for nothing, for two things at once, or for what no rate or share can be.
    """

    skip: float | None = None
    skip_text: float | None = None
    skip_vision: float | None = None
    skip_prefill: float | None = None
    skip_decode: float | None = None
    kl: float | None = None
    kl_bound: Literal["mean", "upper"] = "mean"
    task_floors: float | Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, rate in self.rates.items():
            if not 0 <= rate <= 1:
                raise SearchError(f"target_{name} must be from 0 to 1, got {rate}.")
        if self.kl is not None and not 0 <= self.kl < math.inf:
            raise SearchError(f"A KL budget must be a finite number of nats >= 0, got {self.kl}.")
        if self.kl_bound not in ("mean", "upper"):
            raise SearchError(f"kl_bound must be mean or upper, got {self.kl_bound!r}.")
        floors = self.task_floors
        shares = floors.values() if isinstance(floors, Mapping) else () if floors is None else (floors,)
        if any(not 0 <= share <= 1 for share in shares) or floors == {}:
            raise SearchError(
                f"task_floors must be shares of the unskipped accuracy from 0 to 1, got {floors!r}."
            )
        if not self.rates and self.kl is None and floors is None:
            raise SearchError("The target asks for nothing; give a skip rate, a KL budget or task_floors.")
        if self.skip is not None and self.kl is not None:
            raise SearchError(
                "A skip rate asks for the least KL there, and a KL budget for the most skip within it: give "
                "one of them. Rates of a modality or a phase go with either."
            )

    @property
    def rates(self) -> dict[str, float]:
        """The skip rates that must be reached, by name."""
        given = {name: getattr(self, name) for name in RATES}
        return {name: rate for name, rate in given.items() if rate is not None}

    @property
    def wants_most_skip(self) -> bool:
        """Whether skip is to be the most that losses allow, rather than KL the least that rates allow."""
        return self.skip is None and (self.kl is not None or self.task_floors is not None)

    def check_batches(self, found: Survey) -> None:
        """Refuse batches that hold nothing of what the target is about, before the model runs on them."""
        if self.skip_vision and not found.tokens[1]:
            raise SearchError(
                "A skip rate of vision tokens is asked for, and no batch has any; add batches with pictures."
            )
        if self.skip_decode and not found.decode_tokens:
            raise SearchError(
                "A skip rate of the decode is asked for, and every answer has one token, which is generated "
                "by the prefill; add batches with longer answers."
            )
        if self.task_floors is not None:
            tasks = sorted({task for task in found.tasks if task})
            if not tasks:
                raise SearchError('task_floors need batches that name their tasks: batch["task"] = "name".')
            if isinstance(self.task_floors, Mapping):
                for task in self.task_floors:
                    if task not in tasks:
                        raise SearchError(f"task_floors: no batch is of task {task}; there are {tasks}.")

    def least_accuracy(self, unskipped: Mapping[str, float]) -> dict[str, float]:
        """The accuracy that each task must keep, given what the original model has."""
        if self.task_floors is None:
            return {}
        if isinstance(self.task_floors, Mapping):
            return {task: share * unskipped[task] for task, share in self.task_floors.items()}
        return {task: self.task_floors * accuracy for task, accuracy in unskipped.items()}

    def cost(self, point: Point) -> float:
        """What is to be least among the points that are allowed."""
        return -point.skip if self.wants_most_skip else point.kl

    def excess(self, point: Point) -> float:
        """By how much the point exceeds the rate that it exceeds least; below zero it misses one."""
        return min((getattr(point, name) - rate for name, rate in self.rates.items()), default=math.inf)

    def losses(self, point: Point, least_accuracy: Mapping[str, float]) -> list[float]:
        """What must not be above zero: log(KL / budget), and the worst loss of accuracy under its floor."""
        found = []
        if self.kl is not None:
            kl = point.kl if self.kl_bound == "mean" else point.kl_high
            # Half a hair, so that a KL of zero meets a budget of zero.
            found.append(math.log((kl + 1e-12) / (self.kl + 1e-12)))
        if least_accuracy:
            # Half a hair, as floors are products of floats.
            found.append(max(least - point.accuracy[t] for t, least in least_accuracy.items()) - 1e-9)
        return found

    def __str__(self) -> str:
        parts = [f"{name} {rate:.3f}" for name, rate in self.rates.items()]
        parts += [f"KL {self.kl:g}"] if self.kl is not None else []
        parts += ["task floors"] if self.task_floors is not None else []
        return ", ".join(parts)
