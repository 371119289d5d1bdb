"""Why alpha misleads: what the next pair costs where each policy has put its thresholds.

    python bench/marginal_cost.py [--rate 0.83]

alpha is the KL of losing all experts of a layer. A threshold decides about the pair next to it. Where the
costs of those pairs differ between layers, pairs of dear ones should be kept instead of pairs of cheap ones.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modes_fx import demo
from modes_fx.calibration.calibrate import calibrate
from modes_fx.measure import Meter
from modes_fx.modality import MODALITY_NAMES, TEXT, VISION
from modes_fx.policies.equal_cost import Found, GroupWeights, marginal_costs, tune_marginal
from modes_fx.policies.policy import Bench, PairRecorder, tune
from modes_fx.policies.two_thresholds import dmt, modes
from modes_fx.profile import write_atomically
from modes_fx.skipping import Tokens, block_alphas, keep_all

RESULTS = Path(__file__).parent / "results"


def spread(costs: Any, pairs: Any) -> float:
    """Standard deviation of the costs over their mean, weighted by the pairs that could move."""
    mean = np.average(costs, weights=pairs)
    return float(np.sqrt(np.average((costs - mean) ** 2, weights=pairs)) / mean)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.83)
    parser.add_argument("--calibration", type=int, default=390)
    parser.add_argument("--passes", type=int, default=12)
    parser.add_argument("--record", type=Path, default=RESULTS / "marginal_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = demo.load()
    batches = demo.batches("calibration", args.calibration, batch_size=39)
    few = demo.batches("calibration", min(130, args.calibration), batch_size=26)
    paper = calibrate(model, few, processor=processor, variant="paper", progress=False)
    own = calibrate(model, few, processor=processor, progress=False)
    recorder, weights = PairRecorder(), GroupWeights(len(paper.layers))

    def observe(block: int, each: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        recorder(block, each, tokens)
        weights(block, each, tokens)
        return keep_all(block, each, tokens)

    meter = Meter(model, batches, paper.visual_token_ids, paper.special_token_ids, observe=observe)
    bench, target = Bench(meter, recorder), 0.0
    target = args.rate * bench.most
    alphas = block_alphas(paper, meter.blocks)
    limits: dict[str, torch.Tensor] = {}
    for policy, scale in ((modes(alphas), alphas), (dmt([1.0] * len(alphas)), [(1.0, 1.0)] * len(alphas))):
        found = tune(policy, bench, target, passes=args.passes)
        taus = (math.exp(found.strength + found.shape[0]), math.exp(found.strength))
        limits[policy.name] = torch.tensor(
            [[t / a for a, t in zip(pair, taus, strict=True)] for pair in scale]
        )
    ours: Found = tune_marginal(bench, weights, block_alphas(own, meter.blocks), target, start_passes=8)
    limits["marginal"] = ours.thresholds
    record: dict[str, Any] = {"rate": args.rate, "alpha": [layer.alpha_text for layer in paper.layers]}
    for name, each in limits.items():
        costs = np.mean([marginal_costs(meter, each, i)[0] for i in range(len(meter.original))], axis=0)
        shares = weights.dropped(each)
        movable = weights.sizes * shares * (1 - shares) + 1e-9
        record[name] = {"dropped": shares.tolist(), "cost": costs.tolist(), "spread": spread(costs, movable)}
        print(f"\n{name}: the next pair's cost varies by {record[name]['spread']:.2f} of its mean")
        for modality in (TEXT, VISION):
            cells = (
                f"{s:5.0%} {1e6 * c:7.1f}"
                for s, c in zip(shares[:, modality], costs[:, modality], strict=True)
            )
            print(f"  {MODALITY_NAMES[modality]:6} dropped, 1e-6 nats: " + " | ".join(cells))
    print("\nalpha (paper): " + " ".join(f"{alpha:.3f}" for alpha in record["alpha"]))
    write_atomically(args.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
