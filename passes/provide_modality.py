"""Give a graph the modality of its tokens: text, vision, or other (special), one uint8 each.

In order of preference:

1.  The graph embeds token ids.       2.  It gets embedded tokens.     3.  Neither: the wrapper knows.

    before:  x = embedding(table, ids)    before:  inputs_embeds           before:  (no ids)
    after:   m = token_modality(ids)      after:   m = rows_modality(      after:   m = <one more input>
             ...                               inputs_embeds, table)
             return (..., m)                       return (..., m)

Graphs stay pure. In a compiled model the wrapper (`modes_fx.runtime`) keeps what a graph gives for the others
of the same call, and fills the added input from it, or from embedded tokens that it reads itself; case 2 is
for exported programs, which have no wrapper. Rows of embedded tokens are exactly what the embedding makes of
their ids, so the modality can be read back; a row that is no token's comes from the vision encoder.
"""

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from modes_fx.kernels.rows_modality import rows_modality
from modes_fx.modality import token_modality
from modes_fx.passes.dataflow import CASTS, is_call, is_tensor, parameter_of
from modes_fx.passes.find_blocks import Experts, find_blocks
from modes_fx.passes.unit import FROM_EMBEDDINGS, FROM_TOKEN_IDS, Unit, is_token_embedding

aten = torch.ops.aten

_OVERWRITES = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.index_put.default)

MODALITY, TABLE_KEYS, TABLE_MODALITY = "modality", "table_keys", "table_modality"


def find_token_ids(graph: Graph, unit: Unit) -> list[Node]:
    """The token ids, `[B, S]`, that this graph looks up in the token embedding, one node a sequence."""
    found: dict[Node, None] = {}
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, ids = node.args[:2]
        source = parameter_of(table)
        # Models also look up single tokens, to compare embeddings with them; those are no [B, S].
        if source is None or ids.meta["val"].dim() != 2:
            continue
        if is_token_embedding(unit.profile, unit.real(source)):
            found[_as_given(ids)] = None
    # Ids that are a constant of the model are nobody's tokens.
    given = [ids for ids in found if ids.op == "placeholder"]
    return given or list(found)


def _as_given(ids: Any) -> Node:
    """Token ids before the model wrote another id over those of pictures, as some do for the lookup."""
    while True:
        if is_call(ids, *CASTS, *_OVERWRITES):
            ids = ids.args[0]
        elif is_call(ids, aten.where.self, aten.where.ScalarSelf):
            _, other, kept = ids.args
            if is_tensor(other) and other.meta["val"].dim() == 2:
                return ids
            ids = kept
        else:
            return ids


def provide_modality(gm: GraphModule, unit: Unit) -> int:
    """Set `unit.modality` and add the inputs and outputs it takes; returns 1 where the graph changed."""
    graph = gm.graph
    experts = [block for block in find_blocks(graph) if isinstance(block, Experts)]
    token_ids = find_token_ids(graph, unit)
    profile = unit.profile
    if len(token_ids) > 1:
        unit.why_no_modality = "the graph looks up the ids of two sequences, and does not show which it sees"
        return 0
    if token_ids:
        (ids,) = token_ids
        with graph.inserting_after(ids):
            modality = graph.call_function(
                token_modality, (ids, list(profile.visual_token_ids), list(profile.special_token_ids))
            )
        with graph.inserting_after(modality):
            unit.modality = graph.call_function(aten.reshape.default, (modality, [-1]))
        unit.modality_source = FROM_TOKEN_IDS
    elif not experts:
        return 0
    elif unit.embeds is not None:
        rows = graph.find_nodes(op="placeholder")[unit.embeds]
        keys = _input(graph, unit, TABLE_KEYS, experts[0])
        table = _input(graph, unit, TABLE_MODALITY, experts[0])
        with graph.inserting_after(table):
            unit.modality = graph.call_function(rows_modality, (rows, keys, table))
        unit.modality_source = FROM_EMBEDDINGS
    else:
        unit.modality = _input(graph, unit, MODALITY, experts[0])
        unit.modality_source = unit.modality_elsewhere
        return 1
    output = graph.output_node()
    output.args = ((*output.args[0], unit.modality),)  # type: ignore[misc]
    unit.gives_modality = True
    return 1


def _input(graph: Graph, unit: Unit, name: str, block: Experts) -> Node:
    """One more input at the end. Its fake value says shape and dtype to whatever traces the graph next."""
    last = graph.find_nodes(op="placeholder")[-1]
    hidden = block.hidden.meta["val"]
    sizes: dict[str, tuple[Any, torch.dtype]] = {
        MODALITY: (hidden.shape[0], torch.uint8),
        TABLE_KEYS: (unit.profile.vocab_size, torch.int64),
        TABLE_MODALITY: (unit.profile.vocab_size, torch.uint8),
    }
    size, dtype = sizes[name]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    with hidden.fake_mode:
        node.meta["val"] = torch.empty((size,), dtype=dtype, device=hidden.device)
    unit.extra_inputs.append(name)
    return node
