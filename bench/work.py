"""What the Triton lowering executes, loads, stores and launches, over what has to be: exact counts, no times.

    python bench/work.py                        # all models, decode and prefill, 0 to 88 % skipped; 3 minutes
    python bench/work.py --tokens 4096 --skip 0.88 --arguments

Widths are the models' own; nothing is computed, see counting.py.
"""

import argparse
import functools
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from counting import Launch, counting  # before anything that imports Triton
from layers import CASES, LAYERS, SKIPS, TOKENS, Case, Needed, make_call, markdown, needed, record, versions

from modes_fx.kernels import _masked_moe_triton as lowering


@dataclass(frozen=True)
class Counts:
    """One call of the op."""

    case: Case
    needed: Needed
    launches: list[Launch]

    @property
    def total(self) -> Launch:
        total = Launch("all")
        for launch in self.launches:
            total.add(launch)
        return total

    @property
    def flop_ratio(self) -> float:
        return self.total.flops / self.needed.flops

    @property
    def byte_ratio(self) -> float:
        """Bytes under the masks of all loads and stores, as if no cache held anything, over the needed."""
        total = self.total
        return (total.loaded.total() + total.stored.total()) / self.needed.bytes

    @property
    def distinct_ratio(self) -> float:
        """The same with each byte once a launch: traffic of DRAM if caches hold what is read again."""
        total = self.total
        return (total.distinct_loaded.total() + total.distinct_stored.total()) / self.needed.bytes


@functools.cache
def count(case: Case, arch: int = 90) -> Counts:
    """Counts with the tiles of one architecture."""
    call = make_call(case)
    # The launcher asks the device which architecture it is, and here is none.
    with patch.object(lowering, "architecture", lambda device: arch), counting() as launches:
        lowering.masked_moe_triton(call)
    return Counts(case, needed(call), launches)


HEADER = ["tokens", "skip", "pairs kept", "experts", "FLOPs", "bytes", "bytes, cached", "programs", "idle"]
HEADER += ["launches"]


def row(counts: Counts) -> list[str]:
    total = counts.total
    return [
        str(counts.case.tokens),
        f"{100 * counts.case.skip:.0f} %",
        str(counts.needed.pairs),
        str(counts.needed.experts),
        f"{counts.flop_ratio:.2f}",
        f"{counts.byte_ratio:.2f}",
        f"{counts.distinct_ratio:.3f}",
        f"{total.programs} / {total.working}",
        f"{100 * (1 - total.working / total.programs):.0f} %",
        str(len(counts.launches)),
    ]


INTRODUCTION = """# Work of the Triton lowering

Exact counts (`python bench/work.py --record`), not times; bfloat16, uniform routing, the models' own widths.

- FLOPs: executed by `tl.dot`, over 6 H I for each kept pair.
- bytes: loaded and stored under the masks of all programs, so between the SMs and L2, over the minimum:
  weights of each expert with a kept pair, rows of tokens with one, routing tensors and the result, each once.
- bytes, cached: the same with each 32-byte sector counted once a launch, so of DRAM if caches hold what is
  read again; what is passed from launch to launch counts as stored and loaded.
- programs: launched / with something to store. The grid is sized by the static bound, so that nothing waits
  for the host; idle programs read the experts' counts and return.
"""


def report(all_counts: list[Counts]) -> str:
    parts = [INTRODUCTION]
    for layer in LAYERS:
        rows = [row(counts) for counts in all_counts if counts.case.layer == layer]
        if rows:
            sizes = f"hidden {layer.hidden}, intermediate {layer.intermediate}"
            parts += [f"## {layer.model}\n\n{sizes}, {layer.experts} experts, top-{layer.slots}\n"]
            parts += [markdown(HEADER, rows)]
    return "\n".join(parts)


def by_argument(counts: Counts) -> str:
    """Where the bytes of one call go."""
    rows = []
    for launch in counts.launches:
        name = f"{launch.kernel}, {launch.working} of {launch.programs} programs, {launch.flops:.3g} FLOPs"
        for kind in ("loaded", "stored"):
            once = getattr(launch, f"distinct_{kind}")
            moved = getattr(launch, kind).most_common()
            rows += [[name, f"{kind} {argument}", size, once[argument]] for argument, size in moved]
    return markdown(["kernel", "argument", "bytes", "cached"], rows)


def plain(counts: Counts) -> dict[str, Any]:
    layer, tokens, skip = counts.case
    ratios = {name: getattr(counts, name) for name in ("flop_ratio", "byte_ratio", "distinct_ratio")}
    launches = [vars(launch) for launch in counts.launches]
    return {
        "model": layer.model,
        "tokens": tokens,
        "skip": skip,
        "needed": vars(counts.needed),
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "launches": launches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), choices=TOKENS)
    parser.add_argument("--skip", type=float, nargs="+", default=list(SKIPS), choices=SKIPS)
    parser.add_argument("--arguments", action="store_true", help="bytes by kernel and argument")
    parser.add_argument("--record", action="store_true", help="write bench/results/work.{md,json}")
    options = parser.parse_args()
    all_counts = []
    for case in CASES:
        if case.tokens in options.tokens and case.skip in options.skip:
            counts = count(case)
            all_counts.append(counts)
            print(case.layer.model, *row(counts), sep="  ", flush=True)
            if options.arguments:
                print(by_argument(counts))
    text = report(all_counts)
    print(text)
    if options.record:
        record("work", text, {"versions": versions(), "calls": [plain(counts) for counts in all_counts]})


if __name__ == "__main__":
    main()
