"""Reduce-k: fewer experts for every token (method notes 3.4); halving, which normalises by more of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter
from modes_fx.policies.policy import Policy, ranks, skippable
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
        return ranks(weights) >= keep[block]

    return rule


def reduced_k(top_k: Sequence[int], *, per_block: bool = False) -> Policy:
    """Reduce-k with special tokens left alone, as in the paper's code (method notes 1.4, rows 7 and 16).

    The strength is the share of the slots that go; where they cannot go evenly, the earlier blocks keep more.

    Args:
        top_k: Of each block.
        per_block: Whether the tuning may move slots between blocks (the shape, in slots).
    """
    blocks = len(top_k)

    def rule(shape: Sequence[float], strength: float) -> Rule:
        return _leaving_special(reduce_k_rule(_kept(top_k, strength, shape)))

    name = "reduce-k, k per block tuned" if per_block else "reduce-k"
    shape = (0.0,) * blocks if per_block else ()
    return Policy(name, "MoDES figure 2", rule, (0.0, 1.0), shape, 1.0)


def halving(top_k: Sequence[int]) -> Policy:
    """Reduce-k with the kept weights divided by the mass of more slots than are kept (arXiv 2609.04575):
    rescaling by the kept ones alone amplifies the experts too much. The shape says how many more, from 0
    (the kept ones) to 1 (all that were chosen)."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        keep = _kept(top_k, strength, ())
        share = min(1.0, max(0.0, shape[0]))

        def factors(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            place, kept = ranks(weights), keep[block]
            wide = max(1, kept + round(share * (top_k[block] - kept)))
            mass = (weights * (place < wide)).sum(-1, keepdim=True)
            scale = weights.sum(-1, keepdim=True) / mass.clamp(min=1e-20)
            return ((place < kept) * scale).where(skippable(tokens), 1.0)

        return factors

    return Policy("halving", "arXiv 2609.04575", rule, (0.0, 1.0), (0.5,), 0.25)


def _kept(top_k: Sequence[int], strength: float, shape: Sequence[float]) -> tuple[int, ...]:
    plain = keep_per_block(list(top_k), strength)
    moved = [k + each for k, each in zip(plain, shape or (0.0,) * len(plain), strict=True)]
    return tuple(min(most, max(0, round(k))) for k, most in zip(moved, top_k, strict=True))


def _leaving_special(rule: Rule) -> Rule:
    return lambda block, weights, tokens: rule(block, weights, tokens) & skippable(tokens)
