"""SER: keep what weighs enough beside the first choice (ik_llama.cpp, pull request 239; method notes 4.3)."""

import math
from collections.abc import Sequence

from torch import Tensor

from modes_fx.policies.policy import Policy, ranks, skippable
from modes_fx.skipping import Rule, Tokens


def ser(least: int = 1) -> Policy:
    """Keep a pair if `p_i > t * p_0`, and the `least` largest always; kept weights stay as they are."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        t = math.exp(strength)

        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            first = weights.max(-1, keepdim=True).values
            return (weights <= t * first) & (ranks(weights) >= least) & skippable(tokens)

        return dropped

    return Policy(f"SER, Kmin {least}", "ik_llama.cpp #239", rule, (math.log(1e-4), 0.01))
