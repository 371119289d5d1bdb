"""Decode reads each expert that any token of the batch wants once: there, experts cost, not pairs.

So a pair whose expert is read anyway is free, and what is worth reading is decided for the batch as a whole
(as OEA, arXiv 2511.02237, and XShare, arXiv 2602.07265, do).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modes_fx.modality import TEXT
from modes_fx.policies.policy import Policy
from modes_fx.skipping import Rule, Tokens

Demand = Literal["max", "sum"]


def batch_aware(demand: Demand) -> Policy:
    """Read the experts that the text tokens of a step want most, and keep every pair of theirs.

    Args:
        demand: What an expert's place is decided by: the greatest of its weights in the step, or their sum.
    """

    def rule(shape: Sequence[float], strength: float) -> Rule:
        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            text, step = steps(tokens)
            assert tokens.experts is not None
            wanted = wanted_weights(weights, tokens, text, step, demand)
            read = wanted[step.unsqueeze(-1), tokens.experts] >= math.exp(strength)
            return ~read & text.unsqueeze(-1)

        return dropped

    return Policy(f"batch-aware, {demand}", "after arXiv 2511.02237", rule, (math.log(1e-4), 2.5))


def token_by_token() -> Policy:
    """One threshold on the weights of text tokens, for comparison."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            return (weights < math.exp(strength)) & steps(tokens)[0].unsqueeze(-1)

        return dropped

    return Policy("one threshold", "MoDES table 4", rule, (math.log(1e-4), 0.0))


def steps(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(which tokens are text `[T]` bool, the step of decoding of each `[T]` int64).

    The tokens that are equally far from the end of their sequences make a step, as if they were decoded
    together, one of each sequence.
    """
    assert tokens.left is not None
    return (tokens.modality == TEXT) & tokens.real, tokens.left


def wanted_weights(weights: Tensor, tokens: Tokens, text: Tensor, step: Tensor, demand: Demand) -> Tensor:
    """Per step and expert, the greatest or the summed weight over the step's text tokens, `[steps, E]`."""
    assert tokens.experts is not None
    experts = int(tokens.experts.max()) + 1
    table = torch.zeros((int(step.max()) + 1) * experts, dtype=weights.dtype, device=weights.device)
    places = (step.unsqueeze(-1) * experts + tokens.experts)[text].flatten()
    how = "amax" if demand == "max" else "sum"
    return table.scatter_reduce_(0, places, weights[text].flatten(), how).view(-1, experts)


class ExpertsRead:
    """Counts the distinct experts that a rule leaves to each block and step: `mean` over both."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._read = self._steps = 0

    def __call__(self, block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        dropped = self._rule(block, weights, tokens)
        text, step = steps(tokens)
        assert tokens.experts is not None
        kept = ~dropped & text.unsqueeze(-1)
        pairs = torch.stack([step.unsqueeze(-1).expand_as(kept)[kept], tokens.experts[kept]])
        self._read += pairs.unique(dim=1).shape[1]
        self._steps += len(step[text].unique())
        return dropped

    @property
    def mean(self) -> float:
        return self._read / max(1, self._steps)
