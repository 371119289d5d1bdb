"""Where the lowering on torch operators switches from a loop over experts to torch's grouped product.

    python bench/grouped_product.py

Prints loop time / grouped time for one product, by kept pairs per expert; above 1 the grouped product wins.
One thread, CPU time, both in one process and interleaved, medians of 15 rounds and the range of the ratio.
"""

import statistics
import time

import torch

from modes_fx.kernels._masked_moe_torch import _grouped_mm, _loop


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; loop / grouped: median (lowest to highest of 15)")
    for experts, width, inner in ((32, 128, 64), (128, 512, 384), (128, 2048, 1536)):
        weights = torch.randn(experts, inner, width).transpose(1, 2)
        for pairs in (experts // 16, experts // 4, experts // 2, experts, 4 * experts):
            ids = torch.randint(experts, (pairs,)).sort().values
            rows = torch.randn(pairs, width)
            ratios = []
            for _ in range(15):
                times = []
                for product in (_loop, _grouped_mm):
                    start = time.thread_time()
                    product(rows, weights, ids)
                    times.append(time.thread_time() - start)
                ratios.append(times[0] / times[1])
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"E={experts} [{width}, {inner}]  pairs / E = {pairs / experts:<6g} {spread}")


if __name__ == "__main__":
    main()
