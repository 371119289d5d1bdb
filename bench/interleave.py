"""Runs side by side, A B C C B A, by the CPU time of the threads that do the work."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Clock = Callable[[], float]


@dataclass(frozen=True)
class Run:
    """Something to be timed.

    Attributes:
        call: Takes the number of the sample.
        prepare: Called before it and not timed; takes the same.
        clock: Seconds of CPU time; the calling thread's own, unless the work is done by another.
        best_of: The least of so many calls is one sample: for threads that spin while they wait for one
            another, which on a busy machine takes as long as the scheduler likes.
    """

    call: Callable[[int], Any]
    prepare: Callable[[int], Any] = lambda sample: None
    clock: Clock = time.thread_time
    best_of: int = 1

    def time(self, sample: int) -> float:
        """Seconds."""
        times = []
        for _ in range(self.best_of):
            self.prepare(sample)
            start = self.clock()
            self.call(sample)
            times.append(self.clock() - start)
        return min(times)


def interleave(
    runs: Mapping[str, Run], *, budget_s: float, least: int = 4, most: int = 40
) -> dict[str, list[float]]:
    """Milliseconds of each run, sample by sample: entry `i` of every list was taken in the same pass.

    Passes go forth and back in turns, so that a drift of the machine meets all alike. All runs must be warm.

    Args:
        budget_s: Passes end when this much time is gone, by the wall clock, but
        least, most: Passes are at least and at most so many.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + budget_s
    order = list(runs.items())
    for sample in range(most):
        if sample >= least and time.perf_counter() > end:
            break
        for name, run in order:
            spent[name].append(1e3 * run.time(sample))
        order.reverse()
    return spent


def spread(values: Sequence[float]) -> list[float]:
    """[20th percentile, median, 80th percentile]."""
    if len(values) == 1:
        return [values[0]] * 3
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return [fifths[0], statistics.median(values), fifths[3]]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """`spread` of over / under, pass by pass."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
