"""A model of the Triton lowering's time on GPUs, from its exact counts. Nothing here was measured on a GPU.

    python bench/roofline.py             # H100, A100, B200; some minutes of counting
    python bench/roofline.py --gpus "H100 SXM" --tokens 1 16 --record

The assumptions are `Assumptions` below; the text of the report says the same. Measured: bench/gpu.py.
"""

import argparse
from dataclasses import dataclass

from counting import Launch
from layers import CASES, LAYERS, TOKENS, Case, markdown, record, versions
from limits import A100, A100_PCIE, B200, GPUS, H100, Gpu, Timing, timing_table
from work import Counts, count  # before anything that imports Triton


@dataclass(frozen=True)
class Assumptions:
    """What the counts do not say."""

    # Of peak; a fused grouped GEMM of bfloat16 on H100 has been quoted with 480 of 989 TFLOP/s (SonicMoE).
    products: float = 0.49
    # Of the data sheet's bandwidth; 2.85 of 3.35 TB/s fit vLLM's published times for this shape.
    dram: float = 0.85
    # One launch of a CUDA graph: of vLLM's times bytes leave 29.4 us, for about eight launches.
    launch_us: float = 3.7
    # What one program alone can stream: about 48 KiB in flight, 0.8 us of latency.
    stream: float = 60e9


ASSUMED = Assumptions()


def launch_parts(launch: Launch, gpu: Gpu, assumed: Assumptions = ASSUMED) -> dict[str, float]:
    """Microseconds that a launch would take if only one thing took time, by that thing."""
    busy = min(1.0, launch.working / gpu.multiprocessors)
    distinct = launch.distinct_loaded.total() + launch.distinct_stored.total()
    moved = launch.loaded.total() + launch.stored.total()
    dram = min(gpu.dram * assumed.dram, max(1, launch.working) * assumed.stream)
    return {
        "DRAM": 1e6 * distinct / dram,
        "L2": 1e6 * moved / gpu.l2,
        "tensor cores": 1e6 * launch.flops / (gpu.flops * assumed.products * busy) if launch.flops else 0.0,
    }


def modelled(counts: Counts, gpu: Gpu, assumed: Assumptions = ASSUMED) -> Timing:
    """The sum over launches of a fixed time and of the part that takes longest."""
    spent = {"launches": assumed.launch_us * len(counts.launches)}
    for launch in counts.launches:
        parts = launch_parts(launch, gpu, assumed)
        worst = max(parts, key=lambda name: parts[name])
        spent[worst] = spent.get(worst, 0.0) + parts[worst]
    bound = max(spent, key=lambda name: spent[name])
    return Timing(counts.case, counts.needed, sum(spent.values()), len(counts.launches), bound=bound)


# (GPU, tokens, us): vLLM's fused_moe of this shape in bfloat16, uniform routing; pull requests 19049, 31448.
PUBLISHED = (
    (A100_PCIE, 1, 109.0),
    (A100_PCIE, 8, 403.0),
    (A100_PCIE, 64, 917.0),
    (B200, 1, 39.6),
    (B200, 2, 51.9),
    (B200, 4, 73.2),
)


def comparison(counts: dict[tuple[int, Case], Counts]) -> str:
    """The model without skipping beside what vLLM, which does not skip, has published."""
    rows = []
    for tokens in (1, 4, 8, 16, 256):
        counted = counts.get((H100.arch, Case(LAYERS[0], tokens, 0.0)))
        if counted:
            t = modelled(counted, H100)
            fit = 29.4 + 1e6 * counted.needed.bytes / 2.85e12
            rows.append([H100.name, tokens, f"{fit:.0f} (fit)", f"{t.us:.0f}", f"{t.us / fit:.2f}"])
    for gpu, tokens, published in PUBLISHED:
        us = modelled(count(Case(LAYERS[0], tokens, 0.0), gpu.arch), gpu).us
        rows.append([gpu.name, tokens, f"{published:g}", f"{us:.0f}", f"{us / published:.2f}"])
    return markdown(["GPU", "tokens", "vLLM us", "modelled us", "ratio"], rows)


INTRODUCTION = f"""# Roofline of the Triton lowering

**Modelled from exact counts (bench/work.py). Nothing here was measured on a GPU.** `python bench/gpu.py`
prints the same table measured. bfloat16, uniform routing, weights in DRAM, one layer's routed experts.

- limit: the needed products at peak, or the needed bytes at full bandwidth of DRAM, whichever takes
  longer. No implementation is faster.
- modelled: the sum over launches of {ASSUMED.launch_us} us and the longest of three: its distinct bytes
  at {100 * ASSUMED.dram:.0f} % of DRAM's bandwidth, or at {ASSUMED.stream / 1e9:.0f} GB/s for each
  working program where these are few; all bytes under its masks at L2's bandwidth; its FLOPs at
  {100 * ASSUMED.products:.0f} % of peak, less where programs are fewer than multiprocessors. Assumed, not
  counted: that what is read again comes from L2. Not modelled: the last wave of programs, and the
  bandwidth of shared memory.
- gain: over the same kernels without skipping. "gain of limit" is what skipping can bring at best, to an
  implementation that is at the limit before and after.
"""
COMPARISON = """## Against published times

vLLM's fused_moe for the Qwen3 shape, which skips nothing, against the model at 0 % skip. On H100 only
times of fp8 are public; they fit 29.4 us + bytes / 2.85 TB/s, which is taken at the bytes of bfloat16
here. The model has 2 or 6 launches where vLLM has about 8, so it should be below at few tokens, and near
1 where bytes dominate.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [gpu.name for gpu in GPUS]
    default = [gpu.name for gpu in (H100, A100, B200)]
    parser.add_argument("--gpus", nargs="+", default=default, choices=names, metavar="NAME")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), choices=TOKENS)
    parser.add_argument("--record", action="store_true", help="write bench/results/roofline.{md,json}")
    options = parser.parse_args()
    counts: dict[tuple[int, Case], Counts] = {}
    parts, plain = [INTRODUCTION], []
    for gpu in (gpu for gpu in GPUS if gpu.name in options.gpus):
        timings = []
        for case in (case for case in CASES if case.tokens in options.tokens):
            key = gpu.arch, case
            counts[key] = counts.get(key) or count(case, gpu.arch)
            timings.append(modelled(counts[key], gpu))
            plain.append(
                {
                    "gpu": gpu.name,
                    "model": case.layer.model,
                    "tokens": case.tokens,
                    "skip": case.skip,
                    "limit_us": round(gpu.limit_us(counts[key].needed), 2),
                    "modelled_us": round(timings[-1].us, 2),
                    "bound": timings[-1].bound,
                    "launches": timings[-1].launches,
                }
            )
        sheet = f"{gpu.flops / 1e12:.0f} TFLOP/s, DRAM {gpu.dram / 1e12:g} TB/s, L2 {gpu.l2 / 1e12:g} TB/s"
        parts += [f"## {gpu.name}\n\n{sheet}; tiles for sm_{gpu.arch}.\n"]
        parts += [timing_table(timings, gpu, "modelled us")]
        print("\n".join(parts[-2:]), flush=True)
    parts += [COMPARISON, comparison(counts)]
    print("\n".join(parts[-2:]))
    if options.record:
        data = {"versions": versions(), "assumptions": vars(ASSUMED), "times": plain}
        record("roofline", "\n".join(parts), data)


if __name__ == "__main__":
    main()
