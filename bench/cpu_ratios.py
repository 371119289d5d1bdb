"""The CPU lowering beside itself: native kernel over torch operators, and time over time without skipping.

    python bench/cpu_ratios.py           # prints the ratios
    python bench/cpu_ratios.py --gate    # exit code 1 where one is above its bound

Times of a shared machine mean nothing, so only ratios of interleaved runs are looked at, against bounds that
noise does not reach: each is about twice what was measured. 128 experts, top-8, hidden 512, intermediate 192,
float32; one thread, medians of 9 passes.
"""

import argparse
import functools
import sys
from typing import Any

import torch
from interleave import Run, interleave, ratios

from modes_fx.kernels import _masked_moe_native
from modes_fx.kernels._masked_moe_torch import masked_moe_torch
from modes_fx.kernels.masked_moe import Call, masked_moe

EXPERTS, SLOTS, HIDDEN, INNER = 128, 8, 512, 192
# By tokens: the most that native may take of torch's time, and a call that drops 88 % of a full one's.
BOUNDS = {1: (0.8, 0.5), 16: (0.9, 0.45), 256: (1.0, 0.85), 1024: (1.0, 0.7)}


def problems(tokens: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """The op's arguments for the same rows, with nothing dropped and with 88 % dropped."""
    scores, experts = torch.rand(tokens, EXPERTS, generator=generator).softmax(-1).topk(SLOTS)
    weights = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    names = ("hidden", "scores", "weights", "experts", "modality", "gate_up", "down")
    tensors = dict(zip(names, (hidden, scores, scores, experts, None, *weights), strict=True))
    # All of a token's pairs but the first, for one token: the quantile of 8 values.
    cut = scores.flatten().quantile(0.88).item()
    return [tensors | dict.fromkeys(("tau_text", "tau_vision"), tau) for tau in (0.0, cut)]


def native(problem: dict[str, Any], _sample: int) -> None:
    masked_moe(**problem)


def on_torch(problem: dict[str, Any], _sample: int) -> None:
    masked_moe_torch(Call(**problem))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", action="store_true", help="fail where a ratio is above its bound")
    arguments = parser.parse_args()
    if _masked_moe_native.operator() is None:
        sys.exit("There is no C++ compiler, so there is no native kernel to compare.")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    one = {"alpha_text": 1.0, "alpha_vision": 1.0, "gate_up_bias": None, "down_bias": None}
    failed = False
    print("tokens | native over torch operators | dropping 88 % over dropping nothing")
    for tokens, bounds in BOUNDS.items():
        full, skipped = (problem | one for problem in problems(tokens, generator))
        torch.testing.assert_close(masked_moe(**full), masked_moe_torch(Call(**full)), rtol=1e-4, atol=1e-2)
        runs = {
            "native": Run(functools.partial(native, full)),
            "torch": Run(functools.partial(on_torch, full)),
            "skipped": Run(functools.partial(native, skipped)),
        }
        interleave(runs, budget_s=0, least=2, most=2)
        spent = interleave(runs, budget_s=0, least=9, most=9)
        shown = []
        for over, under, bound in zip(("native", "skipped"), ("torch", "native"), bounds, strict=True):
            low, median, high = ratios(spent[over], spent[under])
            above = median > bound
            failed |= above
            note = f"above {bound}" if above else f"at most {bound}"
            shown.append(f"{median:.2f} ({low:.2f} to {high:.2f}), {note}")
        print(f"{tokens:6} | {shown[0]:36} | {shown[1]}", flush=True)
    if failed and arguments.gate:
        sys.exit("The CPU kernel became slower; bench/run.py shows where.")


if __name__ == "__main__":
    main()
