"""FX graph -> FX graph, on functional aten as AOTAutograd makes it, before Inductor's decompositions.

Read PIPELINE first: it is the order. Each pass is one function in a file of its own name, takes the graph and
the `Unit` (profile, real inputs, findings), edits in place and returns how often it did. `runner.py` does the
rest.

Finders (`find_blocks`, `gate_region`, `find_router`, `most_kept`, all by `dataflow`) change nothing; `prove`
runs both sides of a rewrite; `unit` is what the passes share.
"""

from modes_fx.passes.count_dropped import count_dropped
from modes_fx.passes.delete_experts import delete_experts
from modes_fx.passes.drop_dead_code import drop_dead_code
from modes_fx.passes.drop_modality import drop_modality
from modes_fx.passes.narrow_slots import narrow_slots
from modes_fx.passes.provide_modality import provide_modality
from modes_fx.passes.runner import run_passes as run_passes
from modes_fx.passes.skip_experts import skip_experts

PIPELINE = (
    provide_modality,  # before the rewrite, which needs the modality as an argument
    skip_experts,
    drop_modality,  # what follows bounds the slots of text alone, where that is all there is
    delete_experts,
    narrow_slots,
    count_dropped,  # after what may delete a block, which it would keep alive
    drop_dead_code,
)
