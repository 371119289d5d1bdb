"""How many of a token's slots can be kept at most, by the constants of its layer and what its router gives.

    sum(w) <= mass, w in descending order => w_j <= mass / j => keeps slot j only if alpha * mass / j >= tau
    w <= largest                          => keeps none if alpha * largest < tau

Exact up to nothing: `Router` widens its bounds by the rounding errors of its dtype.
"""

import math
from typing import Any

from modes_fx.decisions import decide
from modes_fx.passes.dataflow import is_call, shape_of
from modes_fx.passes.find_router import Router, find_router
from modes_fx.passes.provide_modality import MODALITY
from modes_fx.passes.unit import Unit


def most_kept(node: Any, unit: Unit) -> int:
    """The most slots of any token that this call of the op can keep."""
    _, scores, weights, experts, modality = node.args[:5]
    constants = node.kwargs
    if is_call(scores, decide):
        # Thresholds that move: the lowest that they may go to.
        assert unit.thresholds is not None
        modality, (alpha_text, alpha_vision) = scores.args[1], scores.args[3:]
        (tau_text, _), (tau_vision, _) = unit.thresholds.bounds
        constants = {
            **{"alpha_text": alpha_text, "alpha_vision": alpha_vision},
            **{"tau_text": tau_text, "tau_vision": tau_vision},
        }
    top_k = shape_of(experts)[1]
    # Special tokens keep every slot, and so do those of a call whose modality the wrapper does not know.
    if modality is not None and (unit.profile.special_token_ids or MODALITY in unit.extra_inputs):
        return top_k
    router = find_router(experts, weights, shape_of(node.args[5])[0])
    kinds = ("text",) if modality is None else ("text", "vision")
    return max(_most(router, top_k, constants[f"alpha_{kind}"], constants[f"tau_{kind}"]) for kind in kinds)


def _most(router: Router, top_k: int, alpha: float, tau: float) -> int:
    if tau <= 0 or router.largest is None:
        return top_k
    if alpha * router.largest < tau:
        return 0
    if router.mass is None or not router.is_sorted:
        return top_k
    return min(top_k, math.floor(alpha * router.mass / tau))
