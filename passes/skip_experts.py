"""Rewrite each block's experts into one op that drops pairs, with the layer's constants baked in.

before:  ids, perm = sort(experts); x = hidden[perm // K]; ...; out = sum(view(w * grouped_mm(...)))
after:   out = modes_fx.masked_moe(hidden, weights, weights, experts, modality, gate_up, down, …,
                                   alpha_text=…, alpha_vision=…, tau_text=…, tau_vision=…)

Where thresholds are to be moved at run time (`Unit.thresholds`), they are an input of the graph, and the rule
is applied before the op:

after:   keep = decide(weights, modality, thresholds, alpha_text, alpha_vision)
         out = modes_fx.masked_moe(hidden, keep, weights, experts, None, gate_up, down, …,
                                   alpha_text=1, alpha_vision=1, tau_text=0, tau_vision=0)

The router stays as it is; the local score is the routing weight that enters the experts, and alpha is
divided by the constant factor that the model has folded into it (`Layer.weight_scale`). Every rewrite is
proved on the spot (`prove.py`). A block whose router the profile does not know is an error for the caller to
raise; here it is reported and left alone.
"""

import torch
from torch.fx import GraphModule, Node

from modes_fx.decisions import DECIDED, decide
from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes.dataflow import aten, dtype_of
from modes_fx.passes.find_blocks import Declined, Experts, find_blocks
from modes_fx.passes.prove import Constants, prove
from modes_fx.passes.unit import NOT_IN_PROFILE, BlockReport, Unit
from modes_fx.profile import Layer

THRESHOLDS = "thresholds"
# Routing weights below which the proof drops text and vision, where thresholds are no constants.
_PROVED_AT = (0.4, 0.3)


def skip_experts(gm: GraphModule, unit: Unit) -> int:
    """Rewrite the blocks of a graph; returns how many. Each block, rewritten or not, gets a report."""
    count = 0
    for block in find_blocks(gm.graph):
        router = block.router if isinstance(block, Declined) else block.router.weight
        layer = None if router is None else unit.layer_of(router)
        name = None if layer is None else layer.name
        if isinstance(block, Declined):
            unit.blocks.append(BlockReport(name, False, block.reason))
            continue
        report = BlockReport(name, False, "", block.num_experts, block.top_k, traits=block.traits())
        unit.blocks.append(report)
        if router is None:
            report.reason = "its router was not found in this graph"
        elif layer is None:
            report.reason = NOT_IN_PROFILE
        elif (layer.num_experts, layer.top_k) != (block.num_experts, block.top_k):
            report.reason = (
                f"the profile has {layer.num_experts} experts, top {layer.top_k}, "
                f"the graph {block.num_experts}, top {block.top_k}"
            )
        elif unit.modality is None:
            report.reason = unit.why_no_modality
        else:
            if unit.thresholds is not None and unit.thresholds_input is None:
                unit.thresholds_input = _thresholds_input(gm, block, unit)
            rewritten = build(gm, block, layer, unit)
            real = {parameter: unit.real(parameter) for parameter in block.parameters()}
            constants = constants_of(unit, layer)
            proof = prove(block, rewritten, unit.modality, real, constants, unit.thresholds_input)
            report.max_error = proof.error
            if not proof.holds:
                gm.graph.eliminate_dead_code()
                report.reason = f"the rewrite differs from the model: {proof}"
                continue
            block.output.replace_all_uses_with(rewritten)
            report.rewritten = True
            count += 1
    return count


def constants_of(unit: Unit, layer: Layer) -> Constants:
    """What a rewrite of this layer is proved with: what the profile says, not what the rewrite says."""
    alphas = (layer.weight_alpha_text, layer.weight_alpha_vision)
    if unit.thresholds is None:
        return Constants(*alphas, unit.profile.tau_text, unit.profile.tau_vision)
    # Any thresholds will do, and those of the profile may be none that a weight can meet.
    taus = (alpha * cut or 1.0 for alpha, cut in zip(alphas, _PROVED_AT, strict=True))
    return Constants(*alphas, *taus)


def _thresholds_input(gm: GraphModule, block: Experts, unit: Unit) -> Node:
    """One more input at the end: tau of text and of vision."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(THRESHOLDS)
    hidden = block.hidden.meta["val"]
    with hidden.fake_mode:
        node.meta["val"] = torch.empty((2,), dtype=torch.float32, device=hidden.device)
    unit.extra_inputs.append(THRESHOLDS)
    return node


def build(gm: GraphModule, block: Experts, layer: Layer, unit: Unit) -> Node:
    """The nodes that are to stand for `block`, before its output; returns the last."""
    graph, profile = gm.graph, unit.profile
    hidden, weights = block.hidden, block.weights
    with graph.inserting_before(block.output):
        if dtype_of(hidden) != dtype_of(block.gate_up):
            hidden = _cast(gm, hidden, dtype_of(block.gate_up))
        if block.kind == "dense":
            weights = graph.call_function(aten.gather.default, (weights, 1, block.experts))
            weights.meta["val"] = _like(block.experts, dtype_of(block.weights))
        scores, modality = weights, unit.modality
        constants = {
            "alpha_text": layer.weight_alpha_text,
            "alpha_vision": layer.weight_alpha_vision,
            "tau_text": profile.tau_text,
            "tau_vision": profile.tau_vision,
        }
        if unit.thresholds_input is not None:
            alphas = (layer.weight_alpha_text, layer.weight_alpha_vision)
            scores = graph.call_function(decide, (weights, modality, unit.thresholds_input, *alphas))
            scores.meta["val"] = _like(weights, torch.float32)
            modality, constants = None, DECIDED
        out = graph.call_function(
            masked_moe,
            (
                hidden,
                scores,
                weights,
                block.experts,
                modality,
                block.gate_up,
                block.down,
                block.gate_up_bias,
                block.down_bias,
            ),
            {
                **constants,
                "activation": block.activation,
                "interleaved": block.interleaved,
                "is_transposed": block.is_transposed,
                "weights_on_input": block.weights_on_input,
                "layer": layer.name,
            },
        )
        out.meta = {**block.output.meta, "val": _like(block.output, dtype_of(block.gate_up))}
        if dtype_of(out) != dtype_of(block.output):
            out = _cast(gm, out, dtype_of(block.output))
            out.meta = dict(block.output.meta)
    return out


def _cast(gm: GraphModule, node: Node, dtype: torch.dtype) -> Node:
    cast = gm.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta["val"] = _like(node, dtype)
    return cast


def _like(node: Node, dtype: torch.dtype) -> torch.Tensor:
    """A fake value of the same shape."""
    value = node.meta["val"]
    with value.fake_mode:
        return torch.empty_like(value, dtype=dtype)
