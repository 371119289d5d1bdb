"""The routed scaling factor that a model has folded into its routing weights, told from the weights."""

import torch
from torch import Tensor

from modes_fx.skipping import Rule, Tokens, keep_all


def measure_scales(scales: list[list[float] | None], batch: int) -> Rule:
    """A rule that drops nothing and fills in `[batch, weight_scale]` of each block that has none yet."""

    def rule(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        real = weights[tokens.real]
        if scales[block] is None and len(real) > 1:
            scales[block] = [batch, weight_scale(real)]
        return keep_all(block, weights, tokens)

    return rule


def weight_scale(weights: Tensor) -> float:
    """The factor that a router has folded into its weights, told from the weights themselves.

    A router that renormalises gives every token weights of one sum, 1 or the factor; any other gives sums
    that differ from token to token, and its weights are then taken as they are.

    Args:
        weights: Routing weights of two tokens or more, `[T, K]`, floating point; also widened from a
            narrower dtype.
    Returns:
        What the weights of each token sum to, with no more digits than their dtype vouches for; 1.0 where the
        sums differ by more than rounding, or all weights are alike, which says nothing.
    """
    narrow = [d for d in (torch.bfloat16, torch.float16) if torch.equal(weights.to(d).to(weights), weights)]
    # Routers add up to 1e-6 to the sum that they divide by.
    rounding = torch.finfo(narrow[0]).eps if narrow else 1e-5
    sums = weights.double().sum(-1)
    mean = float(sums.mean())
    differ = float((sums - mean).abs().max()) > 2 * rounding * mean
    alike = float(weights.max() - weights.min()) <= 2 * rounding * float(weights.max())
    if not mean > 0 or differ or alike:
        return 1.0
    shortest = (float(f"{mean:.{digits}g}") for digits in range(1, 17))
    return next((scale for scale in shortest if abs(scale - mean) <= rounding * mean), mean)
