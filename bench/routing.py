"""Prescribed routing: uniform choices, and thresholds that drop a given share of the pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modes_fx.modality import TEXT, VISION


@dataclass(frozen=True)
class Routing:
    """What one call of a block is given, and what its rule makes of it.

    Attributes:
        hidden: `[T, H]`.
        weights: `[T, K]`, the dtype of the model; also what the rule looks at.
        experts: `[T, K]`, int64, distinct in a row.
        modality: `[T]`, uint8.
        tau: Threshold of both modalities; 0 drops nothing.
        keep: `[T, K]`, bool.
    """

    hidden: Tensor
    weights: Tensor
    experts: Tensor
    modality: Tensor
    tau: float
    keep: Tensor

    def dropped_to(self, value: int) -> Tensor:
        """`experts` with another id at dropped pairs."""
        return self.experts.masked_fill(~self.keep, value)

    @property
    def zeroed(self) -> Tensor:
        """`weights` with zero at dropped pairs."""
        return self.weights.masked_fill(~self.keep, 0)

    def distinct(self, *, kept: bool) -> Tensor:
        """Experts that have a pair, sorted; `kept`, a pair that is kept."""
        return (self.experts[self.keep] if kept else self.experts).unique()


def prescribe(
    *,
    tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    skip: float,
    dtype: torch.dtype,
    vision: float,
    generator: torch.Generator,
) -> Routing:
    """Softmax top-k of random logits; dropped are the pairs of lowest weight, `skip` of all.

    In bfloat16 many weights are equal, and pairs at the threshold are all kept: the true skip rate is that of
    `keep`.
    """
    logits = torch.randn(tokens, num_experts, generator=generator)
    weights, experts = logits.softmax(-1).topk(top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    kept = round((1 - skip) * weights.numel())
    if kept == 0:
        raise ValueError(f"A skip rate of {skip} leaves none of {weights.numel()} pairs.")
    tau = weights.float().flatten().sort(descending=True).values[kept - 1].item() if skip else 0.0
    modality = torch.where(torch.rand(tokens, generator=generator) < vision, VISION, TEXT).to(torch.uint8)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return Routing(x, weights, experts, modality, tau, ~(weights.float() < tau))
