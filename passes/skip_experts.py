"""Rewrite each block's experts into one op that drops pairs, with the layer's constants baked in.

before:  ids, perm = sort(experts); x = hidden[perm // K]; ...; out = sum(view(w * grouped_mm(...)))
after:   out = modes_fx.masked_moe(hidden, weights, weights, experts, modality, gate_up, down,
                                   alpha_text=…, alpha_vision=…, tau_text=…, tau_vision=…)

The router stays as it is; the local score is the routing weight that enters the experts. Every rewrite is
proved on the spot (`prove.py`). A block whose router the profile does not know is an error for the caller to
raise; here it is reported and left alone.
"""

import torch
from torch.fx import GraphModule

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes.find_blocks import Declined, Experts, find_blocks
from modes_fx.passes.prove import prove
from modes_fx.passes.unit import BlockReport, Unit
from modes_fx.profile import Layer


def skip_experts(gm: GraphModule, unit: Unit) -> int:
    """Rewrite the blocks of a graph; returns how many. Each block, rewritten or not, gets a report."""
    count = 0
    for block in find_blocks(gm.graph):
        layer = None if block.router is None else unit.layer_of(block.router)
        name = None if layer is None else layer.name
        if isinstance(block, Declined):
            unit.blocks.append(BlockReport(name, False, block.reason))
            continue
        report = BlockReport(name, False, "", block.num_experts, block.top_k)
        unit.blocks.append(report)
        if block.router is None:
            report.reason = "its router was not found in this graph"
        elif layer is None:
            report.reason = "its router is not in the profile"
        elif (layer.num_experts, layer.top_k) != (block.num_experts, block.top_k):
            report.reason = (
                f"the profile has {layer.num_experts} experts, top {layer.top_k}, "
                f"the graph {block.num_experts}, top {block.top_k}"
            )
        elif unit.modality is None:
            report.reason = "no modality was provided (the pass provide_modality is switched off)"
        else:
            weights = (unit.real(block.gate_up), unit.real(block.down))
            proof = prove(block, *weights)
            report.max_error = proof.error
            if not proof.holds:
                report.reason = f"the rewrite differs from the model: {proof}"
                continue
            _rewrite(gm, block, layer, unit)
            report.rewritten = True
            count += 1
    return count


def _rewrite(gm: GraphModule, block: Experts, layer: Layer, unit: Unit) -> None:
    graph = gm.graph
    profile = unit.profile
    with graph.inserting_before(block.output):
        out = graph.call_function(
            masked_moe,
            (
                block.hidden,
                block.weights,
                block.weights,
                block.experts,
                unit.modality,
                block.gate_up,
                block.down,
                None,
                None,
            ),
            {
                "alpha_text": layer.alpha_text,
                "alpha_vision": layer.alpha_vision,
                "tau_text": profile.tau_text,
                "tau_vision": profile.tau_vision,
                "activation": block.activation,
                "interleaved": block.interleaved,
                "is_transposed": block.is_transposed,
                "layer": layer.name,
            },
        )
        want = block.output.meta["val"].dtype
        if want != block.hidden.meta["val"].dtype:
            out = graph.call_function(torch.ops.aten._to_copy.default, (out,), {"dtype": want})
    out.meta = dict(block.output.meta)
    block.output.replace_all_uses_with(out)
