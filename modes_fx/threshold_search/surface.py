"""A smooth surface through values measured at a few places, and how sure it is, to choose the next place."""

import math
from itertools import product

import torch
from torch import Tensor

# Tried for the distance over which values hang together, and for roughness / variation (as variances).
_LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6)
_ROUGHNESS = (1e-6, 1e-4, 1e-3, 1e-2)
# Weight of the plane that the surface varies around: far more than any plausible slope.
_PLANE = 100.0


class Surface:
    """Gaussian process regression: a plane, deviations from it (Matern 5/2), and roughness.

    The lengths along both axes and the roughness are those of the highest likelihood among a few.

    Args:
        places: `[n, 2]` float64, about 0..1.
        values: `[n]` float64.
    """

    def __init__(self, places: Tensor, values: Tensor) -> None:
        self._places = places
        self._mean = values.mean()
        centred = values - self._mean
        # Of values that do not vary nothing can be learned but that.
        self._unit = centred.std(correction=0).clamp_min(1e-9)
        y = centred / self._unit
        best = -math.inf
        for *lengths, roughness in product(_LENGTHS, _LENGTHS, _ROUGHNESS):
            covariance = _covariance(places, places, lengths)
            factor = torch.linalg.cholesky(covariance + roughness * torch.eye(len(y), dtype=y.dtype))
            weights = torch.cholesky_solve(y[:, None], factor)[:, 0]
            # The variance of the deviations is the likeliest one, given the rest.
            variance = max(float(y @ weights) / len(y), 1e-12)
            likelihood = -0.5 * len(y) * math.log(variance) - float(factor.diagonal().log().sum())
            if likelihood > best:
                best = likelihood
                self._lengths, self._factor, self._weights = lengths, factor, weights
                self._variance, self._roughness = variance, roughness

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Expected value and its standard deviation, roughness included, at each place, `[m]` each."""
        across = _covariance(places, self._places, self._lengths)
        expected = self._mean + self._unit * (across @ self._weights)
        solved = torch.linalg.solve_triangular(self._factor, across.T, upper=False)
        alone = 1 + _PLANE * (1 + places.square().sum(1)) + self._roughness
        variance = (alone - solved.square().sum(0)).clamp_min(self._roughness) * self._variance
        return expected, self._unit * variance.sqrt()


def _covariance(a: Tensor, b: Tensor, lengths: list[float]) -> Tensor:
    scale = torch.tensor(lengths, dtype=a.dtype)
    distance = math.sqrt(5) * torch.cdist(a / scale, b / scale, compute_mode="donot_use_mm_for_euclid_dist")
    matern = (1 + distance + distance.square() / 3) * (-distance).exp()
    return matern + _PLANE * (1 + a @ b.T)


def expected_improvement(best: float, expected: Tensor, deviation: Tensor) -> Tensor:
    """How far below `best` a value is expected to lie on average, counting nothing where it lies above."""
    distance = (best - expected) / deviation
    density = (-0.5 * distance.square()).exp() / math.sqrt(2 * math.pi)
    return deviation * (distance * torch.special.ndtr(distance) + density)
