"""What decode costs is the experts that a step reads: KL at equal numbers, `python bench/decode_experts.py`.

The text tokens of a batch that are equally far from the end make a step, as if decoded together; vision
tokens keep all their experts. Each policy's strength is set so that a block reads a given share of the
experts that it reads unskipped, by bisection on the test split itself, so the shares are the same for all.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from modes_fx import demo
from modes_fx.calibration.calibrate import token_ids
from modes_fx.measure import Measured, Meter
from modes_fx.policies import Policy
from modes_fx.policies.batch_aware import ExpertsRead, batch_aware, token_by_token
from modes_fx.profile import write_atomically
from modes_fx.skipping import keep_all

RESULTS = Path(__file__).parent / "results"
SHARES = (0.75, 0.5, 0.35)
_PASSES = 7


def at_share(policy: Policy, meter: Meter, wanted: float) -> tuple[float, Measured]:
    """(experts read per block and step, what was measured) where that is nearest to `wanted`."""
    low, high = policy.strengths
    low = max(low, math.log(1e-2))
    best: tuple[float, Measured] | None = None
    for _ in range(_PASSES):
        middle = (low + high) / 2
        read = ExpertsRead(policy.rule((), middle))
        measured = meter.measure(read)
        if best is None or abs(read.mean - wanted) < abs(best[0] - wanted):
            best = (read.mean, measured)
        low, high = (low, middle) if read.mean < wanted else (middle, high)
    assert best is not None
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16, help="sequences decoded together")
    parser.add_argument("--test", type=int, default=208, help="samples")
    parser.add_argument("--record", type=Path, default=RESULTS / "decode_experts.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = demo.load()
    meter = Meter(model, demo.batches("test", args.test, batch_size=args.rows), *token_ids(model, processor))
    unskipped = ExpertsRead(keep_all)
    meter.measure(unskipped)
    print(f"{args.rows} rows: a block reads {unskipped.mean:.1f} experts a step, unskipped")
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        for policy in (token_by_token(), batch_aware("max"), batch_aware("sum")):
            read, measured = at_share(policy, meter, share * unskipped.mean)
            low, high = measured.kl_interval()
            row = {"policy": policy.name, "share": share, "experts": read, "kl": measured.kl}
            rows.append(row | {"kl_low": low, "kl_high": high, "skip_text": measured.skip_text})
            print(
                f"{share:.0%} {policy.name:18} experts {read:.2f} KL {measured.kl:.5f} "
                f"({low:.5f} to {high:.5f}) text pairs dropped {measured.skip_text:.1%}",
                flush=True,
            )
    record = {"rows_together": args.rows, "samples": args.test, "unskipped": unskipped.mean, "rows": rows}
    write_atomically(args.record, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
