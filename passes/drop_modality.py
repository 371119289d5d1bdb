"""Leave the modality out where it cannot change what is dropped.

before:  masked_moe(…, modality, …, alpha_text=a, alpha_vision=b, tau_text=s, tau_vision=t)
after:   masked_moe(…, None, …)                  every token is then thresholded as text

That is so where every token is text (the profile names no visual and no special tokens, as of a text-only
model), where text and vision have the same constants and no token is special, and where the thresholds are
zero or less, which no routing weight of a softmax or a sigmoid is below.
"""

from typing import Any

from torch.fx import GraphModule

from modes_fx.decisions import decide
from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes.dataflow import is_call, shape_of
from modes_fx.passes.find_router import find_router
from modes_fx.passes.unit import Unit

_MODALITY = 4  # position among the arguments of the op


def drop_modality(gm: GraphModule, unit: Unit) -> int:
    """Returns how many blocks need no modality."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=masked_moe):
        scores: Any = node.args[1]
        reads, position = (scores, 1) if is_call(scores, decide) else (node, _MODALITY)
        if reads.args[position] is not None and not modality_matters(node, unit):
            reads.update_arg(position, None)
            unit.specialise(node.kwargs["layer"], "no mask")
            count += 1
    if count:
        _drop_unused(gm, unit)
    return count


def modality_matters(node: Any, unit: Unit) -> bool:
    """Whether a call of the op could drop other pairs if it took every token for text."""
    profile, constants = unit.profile, node.kwargs
    if is_call(node.args[1], decide):
        # Thresholds that move are equal today and differ tomorrow.
        return bool(profile.visual_token_ids or profile.special_token_ids)
    if not profile.special_token_ids:
        same = all(constants[f"{name}_text"] == constants[f"{name}_vision"] for name in ("alpha", "tau"))
        if same or not profile.visual_token_ids:
            return False
    _, _, weights, experts, _, gate_up = node.args[:6]
    router = find_router(experts, weights, shape_of(gate_up)[0])
    drops = max(constants["tau_text"], constants["tau_vision"]) > 0
    return drops or router.largest is None


def _drop_unused(gm: GraphModule, unit: Unit) -> None:
    """Inputs and nodes that only served the modality."""
    if unit.gives_modality or unit.counting:
        return
    gm.graph.eliminate_dead_code()
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.name in unit.extra_inputs and not node.users:
            unit.extra_inputs.remove(node.name)
            gm.graph.erase_node(node)
