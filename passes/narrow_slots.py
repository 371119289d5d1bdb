"""Look at fewer slots per token than the router chooses, where the rest can never reach the threshold.

before:  masked_moe(x, w, w, ids, …, alpha_text=a, tau_text=t, …)                  w, ids: [T, K]
after:   masked_moe(x, w[:, :M], w[:, :M], ids[:, :M], …)                          M = floor(a / t) < K

Weights in descending order that sum to at most one satisfy w_j <= 1/j, so that slot j can be kept only where
alpha / j >= tau. Exact: the slots left out would have been dropped. It takes a router whose weights come in
order and have a known sum (`find_router.py`), and no tokens that keep every slot (`most_kept.py`).
"""

from typing import Any

import torch
from torch.fx import GraphModule

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes.dataflow import aten, shape_of
from modes_fx.passes.most_kept import most_kept
from modes_fx.passes.unit import Unit


def narrow_slots(gm: GraphModule, unit: Unit) -> int:
    """Returns how many blocks look at fewer slots now."""
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=masked_moe):
        top_k = shape_of(node.args[3])[1]
        most = most_kept(node, unit)
        if 0 < most < top_k:
            _narrow(gm, node, most)
            unit.specialise(node.kwargs["layer"], f"top {top_k} -> {most}")
            count += 1
    return count


def _narrow(gm: GraphModule, node: Any, most: int) -> None:
    narrowed = {}
    with gm.graph.inserting_before(node):
        for whole in dict.fromkeys(node.args[1:4]):
            part = gm.graph.call_function(aten.slice.Tensor, (whole, 1, 0, most))
            part.meta["val"] = whole.meta["val"][:, :most]
            # The op reads [T, M] row by row.
            contiguous: dict[str, Any] = {"memory_format": torch.contiguous_format}
            copy = gm.graph.call_function(aten.clone.default, (part,), contiguous)
            copy.meta["val"] = part.meta["val"].contiguous()
            narrowed[whole] = copy
    for position in (1, 2, 3):
        node.update_arg(position, narrowed[node.args[position]])
