"""Run passes: what is the same for all of them, once. Order and content are in `passes/__init__.py`."""

import logging
import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch._logging import trace_structured
from torch.fx import GraphModule

from modes_fx.passes.unit import Unit

log = logging.getLogger(__name__)

Pass = Callable[[GraphModule, Unit], int]


def run_passes(
    gm: GraphModule, unit: Unit, pipeline: Sequence[Pass], disable: Collection[str] = ()
) -> dict[str, int]:
    """Run `pipeline` in order on `gm`, in place.

    Args:
        gm: A functional aten graph with fake values in `meta["val"]`.
        unit: What the passes share; they write their findings into it.
        pipeline: Passes, in order.
        disable: Names of passes to leave out; an unknown name is an error that lists the known.
    Returns:
        How often each pass changed the graph, also in `unit.counts` and
        `torch._dynamo.utils.counters["modes_fx"]`.
    """
    names = [each.__name__ for each in pipeline]
    if unknown := sorted(set(disable) - set(names)):
        raise ValueError(f"No pass is named {', '.join(unknown)}; the passes are {', '.join(names)}.")
    for each in pipeline:
        if each.__name__ in disable:
            continue
        start, before = time.perf_counter(), len(gm.graph.nodes)
        changes = each(gm, unit)
        unit.counts[each.__name__] = changes
        if not changes:
            continue
        gm.graph.lint()
        gm.recompile()
        # Not imported by name above: Dynamo loads Triton and takes seconds, and torch loads it on first use.
        torch._dynamo.utils.counters["modes_fx"][each.__name__] += changes
        elapsed_ms = 1000 * (time.perf_counter() - start)
        grown = len(gm.graph.nodes) - before
        log.info("%s: %d rewrites, %+d nodes, %.1f ms", each.__name__, changes, grown, elapsed_ms)
        metadata = {"name": f"modes_fx_after_{each.__name__}", "encoding": "string"}
        trace_structured(
            "artifact",
            metadata_fn=lambda metadata=metadata: metadata,  # type: ignore[misc]
            payload_fn=lambda: gm.print_readable(print_output=False),
        )
    return unit.counts
