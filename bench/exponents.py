"""What alpha is worth on the demo model: KL at one measured skip rate, by power of alpha.

    python bench/exponents.py [--target 0.83]

1 is the paper's alpha (one per layer and modality), 0 two thresholds on the routing weights alone, but for
alphas of zero, which stay zero. Searched on the calibration split, measured on the test split.
"""

import argparse

from modes_fx import calibrate, demo
from modes_fx.measure import Meter
from modes_fx.skipping import block_alphas, thresholds
from modes_fx.threshold_search.search import EXPONENTS, ThresholdSearch


def main() -> None:
    parser = argparse.ArgumentParser(description="KL by power of alpha, on the demo model.")
    parser.add_argument("--target", type=float, default=0.83)
    target = parser.parse_args().target
    model, processor = demo.load()
    batches = demo.batches("calibration", 130)
    profile = calibrate(model, batches, processor=processor)
    search = ThresholdSearch(model, batches, profile)
    meter = Meter(model, demo.batches("test", 1300), profile.visual_token_ids, profile.special_token_ids)
    print("power  calibration skip, KL   test skip, KL")
    for power in EXPONENTS:
        tempered = search if power == 1 else search.tempered(power)
        point = tempered.find(target, grid=20)
        rule = thresholds(block_alphas(tempered.profile, meter.blocks), point.tau_text, point.tau_vision)
        test = meter.measure(rule)
        print(f"{power:<5g}  {point.skip:.3f}  {point.kl:.4f}          {test.skip:.3f}  {test.kl:.4f}")


if __name__ == "__main__":
    main()
