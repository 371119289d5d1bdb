"""Policies to compare with: reduce-k, fewer experts for every token (method notes 3.4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter
from modes_fx.progress import Bar
from modes_fx.skipping import Rule, Tokens


@dataclass(frozen=True)
class ReducedK:
    """Experts kept per block, and what that measures on the meter's batches."""

    keep: tuple[int, ...]
    renormalise: bool
    measured: Measured


def reduce_k(
    meter: Meter, target_skip: float, *, renormalise: bool = False, bar: Bar | None = None
) -> ReducedK:
    """Keep the k' strongest experts of every token, k' per block chosen to skip about `target_skip`.

    All tokens lose the same slots, special ones too, as when a model is configured with a smaller top-k;
    where k' is not the same everywhere, the earlier blocks keep the extra expert.

    Args:
        meter: Holds the model, the batches and the original answers.
        target_skip: Dropped pairs / all pairs, 0..1.
        renormalise: Rescale the kept weights to the sum that all had (what a smaller top-k in the model's
            configuration does); the paper's own reduce-k does not.
    """
    if not 0 <= target_skip <= 1:
        raise SearchError(f"target_skip must be from 0 to 1, got {target_skip}.")
    keep = keep_per_block([block.top_k for block in meter.blocks], target_skip)
    measured = meter.measure(reduce_k_rule(keep), renormalise=renormalise, bar=bar)
    return ReducedK(keep, renormalise, measured)


def keep_per_block(top_k: list[int], target_skip: float) -> tuple[int, ...]:
    """Experts to keep per block: together as near (1 - target) * sum(top_k) as whole numbers come."""
    wanted = round((1 - target_skip) * sum(top_k))
    keep = [int(wanted * k // sum(top_k)) for k in top_k]
    for i in range(len(keep)):
        if sum(keep) < wanted and keep[i] < top_k[i]:
            keep[i] += 1
    return tuple(keep)


def reduce_k_rule(keep: tuple[int, ...]) -> Rule:
    """Drop all but the `keep[block]` largest weights of every token."""

    def rule(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        # Not every router gives its weights in descending order; equal ones keep the order of their slots.
        order = weights.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(weights.shape[-1], device=weights.device).expand_as(order)
        )
        return rank >= keep[block]

    return rule
