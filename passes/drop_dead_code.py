"""Remove what a rewrite left behind: the sort, the permutation and the two grouped products of each block.

before:  out = masked_moe(...); ids, perm = sort(...); y = grouped_mm(...)
after:   out = masked_moe(...)
"""

from torch.fx import GraphModule

from modes_fx.passes.unit import Unit


def drop_dead_code(gm: GraphModule, unit: Unit) -> int:
    """Returns how many nodes went."""
    before = len(gm.graph.nodes)
    gm.graph.eliminate_dead_code()
    return before - len(gm.graph.nodes)
