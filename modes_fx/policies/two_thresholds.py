"""MoDES and its ablations: thresholds on alpha times the routing weight (MoDES 5.1 and 5.2)."""

import math
from collections.abc import Sequence

from modes_fx.policies.policy import Policy
from modes_fx.skipping import Rule, thresholds

# Logarithms of the least and the greatest threshold, times the greatest alpha.
_LEAST, _GREATEST = math.log(1e-5), math.log(1.0)

Alphas = Sequence[tuple[float, float]]  # (text, vision) of each block, as `skipping.block_alphas` gives them


def plain(scales: Sequence[float]) -> Policy:
    """One threshold on the routing weight: neither alpha nor modality (the first row of the ablation).

    Args:
        scales: `weight_scale` of each block.
    """
    return _one_threshold("one threshold", "MoDES table 4, neither part", _ones(scales))


def gmlg(alphas: Alphas) -> Policy:
    """One threshold on alpha times the weight (MoDES Eq. 3 alone)."""
    return _one_threshold("GMLG", "MoDES Eq. 3, table 4", alphas)


def dmt(scales: Sequence[float]) -> Policy:
    """Two thresholds on the weight, one for text and one for vision (MoDES Eq. 5 alone)."""
    return modes(_ones(scales), "DMT", "MoDES Eq. 5, table 4")


def modes(alphas: Alphas, name: str = "MoDES", source: str = "MoDES Eq. 3 to 5") -> Policy:
    """Two thresholds on alpha times the weight; the shape is log(tau_text / tau_vision)."""
    top = math.log(max(max(pair) for pair in alphas))

    def rule(shape: Sequence[float], strength: float) -> Rule:
        return thresholds(alphas, math.exp(strength + shape[0]), math.exp(strength))

    # The ratio may be far from one: both ends must be in reach of either threshold.
    return Policy(name, source, rule, (top + _LEAST, top + _GREATEST + 6), (-1.0,), 1.0)


def tempered(alphas: Alphas) -> Policy:
    """MoDES with alpha to a power; the shape is (log(tau_text / tau_vision), power)."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        powers = [(power(text, shape[1]), power(vision, shape[1])) for text, vision in alphas]
        return thresholds(powers, math.exp(strength + shape[0]), math.exp(strength))

    return Policy("MoDES, tempered alpha", "this package", rule, (_LEAST - 4, 6.0), (-1.0, 0.25), 0.5)


def power(alpha: float, exponent: float) -> float:
    """alpha to a power that is at least zero; what reaches no answer stays free to drop at every power."""
    return alpha ** max(0.0, exponent) if alpha else 0.0


def _one_threshold(name: str, source: str, alphas: Alphas) -> Policy:
    top = math.log(max(max(pair) for pair in alphas))

    def rule(shape: Sequence[float], strength: float) -> Rule:
        return thresholds(alphas, math.exp(strength), math.exp(strength))

    return Policy(name, source, rule, (top + _LEAST, top + _GREATEST))


def _ones(scales: Sequence[float]) -> Alphas:
    return [(1 / scale, 1 / scale) for scale in scales]
