"""Delete the routed experts of a layer none of whose pairs can ever be kept.

before:  out = masked_moe(x, w, w, ids, …, alpha_text=a, tau_text=t, …)       a * w < t for all w
after:   out = zeros_like(x)                                                  shared experts stay

With them go the router and the choice of experts, where nothing else needs them.
"""

from torch.fx import GraphModule

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes.dataflow import aten, shape_of
from modes_fx.passes.most_kept import most_kept
from modes_fx.passes.unit import Unit


def delete_experts(gm: GraphModule, unit: Unit) -> int:
    """Returns how many blocks lost their routed experts."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=masked_moe):
        hidden = node.args[0]
        if most_kept(node, unit) == 0 and shape_of(hidden) == shape_of(node):
            with gm.graph.inserting_before(node):
                zeros = gm.graph.call_function(aten.zeros_like.default, (hidden,))
            zeros.meta = dict(node.meta)
            node.replace_all_uses_with(zeros)
            unit.specialise(node.kwargs["layer"], "deleted")
            count += 1
    return count
