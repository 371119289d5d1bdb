"""Return from the graph how many pairs each of its blocks dropped, by modality.

before:  out = masked_moe(x, s, w, ids, m, …, alpha_text=a, tau_text=t, …);   return (out, …)
after:   counts = count_pairs([keep_mask(s, m, a, …)], modality, [K]);         return (out, …, counts)

Only where `Unit.counting` asks for it. Graphs stay pure: the wrapper adds the counts up. A padding token is a
special one to a graph, "other", of which no pair is dropped.
"""

from collections import defaultdict
from typing import Any

from torch.fx import GraphModule, Node

from modes_fx.decisions import count_pairs
from modes_fx.kernels.masked_moe import keep_mask, masked_moe
from modes_fx.passes.unit import Unit

_RULE = ("alpha_text", "alpha_vision", "tau_text", "tau_vision")


def count_dropped(gm: GraphModule, unit: Unit) -> int:
    """Returns how many blocks are counted."""
    blocks = [block for block in unit.blocks if block.rewritten]
    if not unit.counting or not blocks:
        return 0
    calls: dict[Any, list[Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_function", target=masked_moe):
        calls[node.kwargs["layer"]].append(node)
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        keeps: list[Node | None] = []
        for block in blocks:
            if not calls[block.layer]:
                # Its experts were deleted: it keeps no pair.
                keeps.append(None)
                continue
            call = calls[block.layer].pop(0)
            rule = [call.kwargs[name] for name in _RULE]
            keeps.append(gm.graph.call_function(keep_mask, (call.args[1], call.args[4], *rule)))
        top_k = [block.top_k for block in blocks]
        counts = gm.graph.call_function(count_pairs, (keeps, unit.modality, top_k))
    output.args = ((*output.args[0], counts),)  # type: ignore[misc]
    unit.gives_counts = True
    return len(blocks)
