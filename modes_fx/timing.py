"""Time several models side by side on one thread: interleaved, by the thread's own clock, as medians."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on the calling thread alone, so that `time.thread_time` sees all the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved_ms(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time of each run.

    One after the other within a round, so that whatever else the machine does meets all of them alike; and
    the thread's own clock, which stands still while another process has the core. Warm up before.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    with one_thread():
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.thread_time()
                run()
                spent[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def prefill_ms(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], rounds: int
) -> dict[str, float]:
    """Median milliseconds of one forward over a whole prompt."""

    def run(model: nn.Module) -> Callable[[], object]:
        return lambda: model(**inputs)

    with torch.no_grad():
        return interleaved_ms({name: run(model) for name, model in models.items()}, rounds)


def decode_ms(
    models: Mapping[str, Any], prompt: Mapping[str, Tensor], new_tokens: int, rounds: int
) -> dict[str, float]:
    """Median milliseconds per generated token without prefill: (generate(n + 1) - generate(1)) / n."""

    def run(model: Any, count: int) -> Callable[[], object]:
        return lambda: model.generate(**prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    lengths = (1, new_tokens + 1)
    runs = {f"{name} {n}": run(model, n) for name, model in models.items() for n in lengths}
    spent = interleaved_ms(runs, rounds)
    return {
        name: (spent[f"{name} {lengths[1]}"] - spent[f"{name} {lengths[0]}"]) / new_tokens for name in models
    }
