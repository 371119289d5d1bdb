"""Times of the Triton lowering on this machine's GPU, beside transformers and the limit of the data sheet.

    python bench/gpu.py                        # everything; half an hour or so, most of it torch.compile
    python bench/gpu.py --quick                # 1, 16 and 4096 tokens, 0 and 88 % skipped, nothing compiled

Prints the table that bench/roofline.py models, and writes it with all percentiles to
bench/results/gpu_NAME.{md,json}. Each case is checked against the reference before it is timed. Calls are
captured in CUDA graphs, take turns, and find the L2 cache full of something else. Exit code 2 without a GPU.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib import metadata
from typing import Any

import torch
from layers import CASES, SKIPS, TOKENS, Case, Layer, make_call, needed, record, versions
from limits import Timing, find_gpu, timing_table
from torch import Tensor

from modes_fx.kernels.masked_moe import Call, masked_moe, reference

OURS = "modes_fx"
MORE_THAN_L2 = 256 << 20  # bytes
MOST_GATHERED = 16 << 30  # bytes of weights that batched_mm may copy

Run = Callable[[], Tensor]


def randomise(call: Call) -> None:
    """Hidden states and weights of experts of a size that keeps outputs near 1."""
    for x in (call.hidden, call.gate_up, call.down):
        x.normal_(std=1.0 if x is call.hidden else x.shape[-1] ** -0.5)


def problem_of(call: Call, got: Tensor) -> str:
    """Empty where `got` is at most twice as far from float64 as the reference in its dtype; else how far."""
    low = reference(**vars(call))
    wide = {name: getattr(call, name).double() for name in ("hidden", "weights", "gate_up", "down")}
    exact = reference(**vars(call) | wide)
    error = float((got.double() - exact).abs().max())
    allowed = 2 * float((low.double() - exact).abs().max())
    allowed += 4 * torch.finfo(got.dtype).eps * float(exact.abs().max())
    # Not `error > allowed`, which NaN is not.
    return "" if error <= allowed else f"off by {error:.2e} from float64, where {allowed:.2e} is allowed"


def make_runs(call: Call, layer: Layer, *, compiled: bool) -> dict[str, Run]:
    """Our op, and what transformers does with all pairs, or with the ids of dropped pairs past the last."""
    runs: dict[str, Run] = {OURS: lambda: masked_moe(**vars(call))}
    try:
        from transformers import Qwen3VLMoeTextConfig
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts
    except ImportError:
        return runs
    config = Qwen3VLMoeTextConfig(
        num_experts=layer.experts, hidden_size=layer.hidden, moe_intermediate_size=layer.intermediate
    )
    weights = call.weights.to(call.hidden.dtype)
    dropped = ~call.keep()
    few_bytes = call.experts.numel() * call.down[0].nbytes * 3 <= MOST_GATHERED
    for name in ("grouped_mm", "grouped_mm, dropped", *(["batched_mm"] if few_bytes else [])):
        with torch.device("meta"):
            module: Any = Qwen3VLMoeTextExperts(config)
        module.gate_up_proj = torch.nn.Parameter(call.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(call.down, requires_grad=False)
        implementation, _, drops = name.partition(", ")
        # Which of the two is looked up at each call, so that no two modules may share a config.
        module.config = type(config)(**config.to_dict())
        module.config._experts_implementation = implementation
        arguments = call.hidden, call.experts, weights
        if drops:
            # How transformers says that ids past the last expert are computed elsewhere.
            module._is_expert_parallel = True
            arguments = call.hidden, call.experts.masked_fill(dropped, layer.experts), weights * ~dropped
        ways = {name: module, f"{name}, compiled": torch.compile(module)} if compiled else {name: module}
        runs |= {way: bind(function, arguments) for way, function in ways.items()}
    return runs


def bind(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Run:
    return lambda: function(*arguments)


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched inside."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    before = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def counting(run: Any) -> Any:
        def count(self: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(self.__name__)
            return run(self, *args, **kwargs)

        return count

    for kind, run in before.items():
        kind.run = counting(run)
    try:
        yield names
    finally:
        for kind, run in before.items():
            kind.run = run


def in_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each timer says, one after the other within a round, so that whatever changes meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return times


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def graph_timer(run: Run, flush: Tensor) -> Callable[[], float]:
    """Microseconds of one replay of `run`, captured, with `flush` in the L2 cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Compiles, and picks what is picked on the first call.
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def time() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU is busy with this while the graph is queued, so that the host's time does not count.
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))

    return time


def measure(case: Case, call: Call, *, compiled: bool, rounds: int) -> tuple[Timing, dict[str, Any]]:
    """Check one case, then time it; the row of the table, and all percentiles."""
    torch._dynamo.reset()
    runs = make_runs(call, case.layer, compiled=compiled)
    with counted_launches() as launches:
        got = runs[OURS]()
    if problem := problem_of(call, got):
        sys.exit(f"{case}: {OURS} is {problem}. Nothing is timed that is wrong.")
    flush = torch.empty(MORE_THAN_L2, dtype=torch.int8, device=call.hidden.device)
    timers = {}
    for name, run in runs.items():
        try:
            timers[name] = graph_timer(run, flush)
        except RuntimeError as error:
            if name == OURS:
                raise
            print(f"{name} cannot be captured here: {str(error).splitlines()[0]}", file=sys.stderr)
    spread = {name: percentiles(times) for name, times in in_turns(timers, rounds).items()}
    low, middle, high = spread[OURS]
    others = {name: us for name, (_, us, _) in spread.items() if name != OURS}
    timing = Timing(case, needed(call), middle, len(launches), (low, high), others=others)
    plain = {
        "model": case.layer.model,
        "tokens": case.tokens,
        "skip": case.skip,
        "pairs": timing.needed.pairs,
        "experts": timing.needed.experts,
        "launches": launches,
        "us": {
            name: dict(zip(("p20", "p50", "p80"), values, strict=True)) for name, values in spread.items()
        },
    }
    return timing, plain


INTRODUCTION = """# Times on {name}

Measured by `python bench/gpu.py` on {day}: torch {torch}, triton {triton}, transformers {transformers}, CUDA
{cuda}, {rounds} rounds. One layer's routed experts, bfloat16, uniform routing, CUDA graphs, L2 cache flushed
before each call. us: median (20th to 80th percentile); others: medians. "dropped": the same pairs dropped by
ids past the last expert.
"""


def transformers_version() -> str:
    try:
        return metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return "not installed"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), choices=TOKENS)
    parser.add_argument("--skip", type=float, nargs="+", default=list(SKIPS), choices=SKIPS)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out what torch.compile makes of others"
    )
    parser.add_argument("--rounds", type=int, default=100, help="times that each is timed")
    parser.add_argument("--quick", action="store_true", help="few cases, nothing compiled")
    options = parser.parse_args(given)
    if options.rounds < 2:
        parser.error("--rounds: two at least, since percentiles are taken.")
    if options.quick:
        options.tokens, options.skip, options.no_compile = [1, 16, 4096], [0.0, 0.88], True
    return options


def measure_all(options: argparse.Namespace, device: str) -> tuple[list[Timing], list[dict[str, Any]]]:
    timings, plain = [], []
    weights: Call | None = None
    for case in CASES:
        if case.tokens not in options.tokens or case.skip not in options.skip:
            continue
        call = make_call(case, device)
        if weights is None or weights.gate_up.shape != call.gate_up.shape:
            randomise(call)
            weights = call
        # The weights of a layer are a gigabyte, so all its cases have the same.
        call = replace(call, gate_up=weights.gate_up, down=weights.down)
        call.hidden.normal_()
        timing, row = measure(case, call, compiled=not options.no_compile, rounds=options.rounds)
        timings.append(timing)
        plain.append(row)
        print(case.layer.model, case.tokens, case.skip, row["us"], flush=True)
    return timings, plain


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        print(
            f"No CUDA GPU here (torch {torch.__version__}), so nothing was measured. Run this on a machine "
            "with one; bench/results/roofline.md has the same table modelled.",
            file=sys.stderr,
        )
        sys.exit(2)
    properties = torch.cuda.get_device_properties(0)
    gpu = find_gpu(properties.name, properties.total_memory)
    if gpu is None:
        print(
            f"No data sheet of {properties.name} in bench/limits.py: times without limits.", file=sys.stderr
        )
    with torch.no_grad():
        timings, plain = measure_all(options, "cuda")
    made = {"name": properties.name, "day": date.today().isoformat(), "rounds": options.rounds}
    made |= {"cuda": torch.version.cuda, "transformers": transformers_version(), **versions()}
    text = INTRODUCTION.format(**made) + "\n" + timing_table(timings, gpu, "us")
    print(text)
    record("gpu_" + re.sub(r"\W+", "_", properties.name), text, {**made, "cases": plain})


if __name__ == "__main__":
    main()
