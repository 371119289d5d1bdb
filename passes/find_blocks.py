"""Find the experts of each block in a functional aten graph, by dataflow alone.

transformers builds the experts graph of all its families from a few functions; what differs between families
(router, gate, bias, layout) sits around or between two grouped matrix products. What is matched, backwards
from the combine, for `experts_implementation="grouped_mm"`:

    ids_sorted, perm = sort(view(experts, [T*K]))
    x   = index(hidden, [perm // K])
    w   = index(view(weights, [T*K]), [perm])
    y   = grouped_mm(x, gate_up^T, offsets)     offsets = cumsum(histc(ids_sorted, E))
    a   = <gate region>(y)                      classified by `gate_region.py`
    z   = grouped_mm(a, down^T, offsets)
    out = sum(view(index(z * unsqueeze(w), [inverse(perm)]), [T, K, H]), [1])

Nothing here changes a graph. A candidate (two grouped products that end in a sum over slots) that does not
fit is returned as `Declined`, with the reason, so that a rewrite is never silently missing.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from modes_fx.passes.gate_region import UnknownGate, classify_gate

aten = torch.ops.aten


class _Mismatch(Exception):
    """The walk met something that the pattern does not have; the message says what."""


@dataclass(frozen=True)
class Experts:
    """One block's experts as they stand in the graph.

    Attributes:
        hidden: Input of the experts, `[T, H]`.
        experts: Chosen experts, `[T, K]`, int64.
        weights: Routing weights, `[T, K]`.
        gate_up: Placeholder of the gate and up weights of all experts, `[E, 2I, H]` or transposed.
        down: Placeholder of the down weights of all experts, `[E, H, I]` or transposed.
        output: The node that holds the weighted sum over slots, `[T, H]`.
        num_experts: E.
        top_k: K.
        is_transposed: The weights lie as `[E, H, 2I]` and `[E, I, H]`.
        activation: A key of `kernels.masked_moe.ACTIVATIONS`.
        interleaved: Gate and up alternate.
        router: Placeholder of the router weight `[E, H_router]`, or None where the walk found none.
    """

    hidden: Node
    experts: Node
    weights: Node
    gate_up: Node
    down: Node
    output: Node
    num_experts: int
    top_k: int
    is_transposed: bool
    activation: str
    interleaved: bool
    router: Node | None

    def nodes(self) -> list[Node]:
        """The nodes from the block's inputs to its output, in graph order: what the rewrite replaces."""
        stop = {self.hidden, self.experts, self.weights, self.gate_up, self.down}
        seen: set[Node] = set()
        todo = [self.output]
        while todo:
            node = todo.pop()
            if node in seen or node in stop or node.op == "placeholder" or _is_symbolic(node):
                continue
            seen.add(node)
            todo.extend(node.all_input_nodes)
        return [node for node in self.output.graph.nodes if node in seen]


@dataclass(frozen=True)
class Declined:
    """Something that looks like a block's experts and is left alone, with the reason."""

    output: Node
    router: Node | None
    reason: str


def find_blocks(graph: Graph) -> list[Experts | Declined]:
    """The experts of each block in graph order, which is layer order. Changes nothing."""
    found: list[Experts | Declined] = []
    claimed: set[Node] = set()
    for node in graph.nodes:
        if not _is(node, aten.sum.dim_IntList):
            continue
        second = _grouped_product_above(node.args[0])
        first = None if second is None else _grouped_product_above(second.args[0])
        if second is None or first is None or second in claimed:
            continue
        claimed |= {first, second}
        try:
            found.append(_match_grouped_mm(node))
        except (_Mismatch, UnknownGate) as reason:
            found.append(Declined(node, _router_above(node), str(reason)))
    return found


def placeholder_of(node: Node) -> Node | None:
    """The placeholder that `node` is a view or copy of, or None."""
    while node.op != "placeholder":
        if node.op != "call_function" or node.target not in _LAYOUT_ONLY:
            return None
        node = node.args[0]  # type: ignore[assignment]
    return node


# Operators that hand the same numbers on, in another shape, stride or dtype.
_LAYOUT_ONLY = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
)
_CAST = (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default)
_VIEW = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def _grouped_targets() -> tuple[Any, ...]:
    # transformers registers its own operator for dtypes that torch's grouped product does not trace.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return (aten._grouped_mm.default,) if fallback is None else (aten._grouped_mm.default, fallback.default)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _is_symbolic(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def _need(node: Any, what: str, *targets: Any) -> Node:
    if not _is(node, *targets):
        found = getattr(node, "target", node)
        raise _Mismatch(f"{what} should be {' or '.join(str(t) for t in targets)}, got {found}")
    return node


def _skip(node: Any, *targets: Any) -> Any:
    while _is(node, *targets):
        node = node.args[0]
    return node


def _grouped_product_above(node: Any, reach: int = 48) -> Node | None:
    """The nearest grouped product that feeds `node` without another sum over slots in between."""
    todo = [node] if isinstance(node, Node) else []
    seen: set[Node] = set()
    while todo and len(seen) < reach:
        above = todo.pop(0)
        if _is(above, *_grouped_targets()):
            return above
        if above not in seen and not _is(above, aten.sum.dim_IntList) and above.op == "call_function":
            seen.add(above)
            todo.extend(above.all_input_nodes)
    return None


def _match_grouped_mm(output: Node) -> Experts:
    if tuple(output.args[1]) != (1,) or (len(output.args) > 2 and output.args[2]):  # type: ignore[arg-type]
        raise _Mismatch(f"the combine should sum over the slots, dimension 1, got {output.args[1:]}")
    slots = _need(_skip(output.args[0], *_CAST), "the combine's input", *_VIEW)
    shape = _shape(slots)
    if len(shape) != 3:
        raise _Mismatch(f"the combine should see [T, K, H], got {shape}")
    top_k = _static(shape[1], "the number of slots")

    unsorted = _need(_skip(slots.args[0], *_CAST), "the un-permute", aten.index.Tensor)
    weighted = _need(_skip(unsorted.args[0], *_CAST), "the weighting", aten.mul.Tensor)
    weight_column, product = _split_weighting(weighted)
    column = _skip(weight_column.args[0], *_CAST)
    sorted_weights = _need(column, "the weights in expert order", aten.index.Tensor)
    perm = _only_index(sorted_weights, "the weights")
    sort = _permutation_source(perm)
    _check_inverse(_only_index(unsorted, "the un-permute"), perm)

    second = _need(_skip(product, *_CAST), "the second product", *_grouped_targets())
    down, down_transposed = _expert_weights(second.args[1], "the down weights")
    first = _first_product(second)
    gate_up, gate_up_transposed = _expert_weights(first.args[1], "the gate and up weights")
    if down_transposed != gate_up_transposed:
        raise _Mismatch("gate_up and down lie in different layouts")
    if first.args[2] is not second.args[2]:
        raise _Mismatch("the two grouped products use different offsets")
    for product_node in (first, second):
        if len(product_node.args) > 3 and product_node.args[3] is not None:
            raise _Mismatch("a bias inside the grouped product")

    gathered = _need(_skip(first.args[0], *_CAST), "the gather of tokens", aten.index.Tensor)
    token = _only_index(gathered, "the gather of tokens")
    rows = _need(token, "the token of each pair", aten.floor_divide.default)
    if rows.args[0] is not perm or rows.args[1] != top_k:
        raise _Mismatch("tokens are not gathered by pair // K")

    weights = _need(_skip(sorted_weights.args[0], *_CAST), "the flat weights", *_VIEW).args[0]
    experts = _need(sort.args[0], "the flat expert ids", *_VIEW).args[0]
    hidden = gathered.args[0]
    for name, value in (("weights", weights), ("experts", experts)):
        if len(_shape(value)) != 2 or _static(_shape(value)[1], name) != top_k:
            raise _Mismatch(f"{name} should be [T, {top_k}], got {_shape(value)}")
    num_experts = _static(_shape(gate_up)[0], "the number of experts")
    _check_offsets(first.args[2], sort, num_experts)
    activation, interleaved = classify_gate(first, second.args[0])
    assert isinstance(hidden, Node) and isinstance(weights, Node) and isinstance(experts, Node)
    return Experts(
        hidden=hidden,
        experts=experts,
        weights=weights,
        gate_up=gate_up,
        down=down,
        output=output,
        num_experts=num_experts,
        top_k=top_k,
        is_transposed=gate_up_transposed,
        activation=activation,
        interleaved=interleaved,
        router=find_router(experts, num_experts),
    )


def find_router(experts: Node, num_experts: int) -> Node | None:
    """The placeholder of the router weight, `[E, H]`, that decides `experts`; None where none does."""

    def is_router(node: Node) -> bool:
        shape = _shape(node)
        return len(shape) == 2 and shape[0] == num_experts

    products = (aten.mm.default, aten.addmm.default, aten.linear.default)
    for node in _upwards(experts, stop=lambda n: _is(n, *products)):
        if _is(node, *products):
            for argument in node.all_input_nodes:
                source = placeholder_of(argument)
                if source is not None and is_router(source):
                    return source
    return None


def _router_above(output: Node) -> Node | None:
    """A router weight above a block that did not match, for the message."""
    for node in _upwards(output):
        if _is(node, aten.topk.default):
            return find_router(node, _shape(node.args[0])[-1])
    return None


def _upwards(node: Node, stop: Callable[[Node], bool] = lambda _: False) -> Iterator[Node]:
    todo, seen = [node], set()
    while todo:
        current = todo.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            todo.extend(current.all_input_nodes)


def _shape(node: Any) -> tuple[Any, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        raise _Mismatch(f"expected a tensor, got {node}")
    return tuple(value.shape)


def _static(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise _Mismatch(f"{what} is not known at compile time")
    return size


def _only_index(node: Node, what: str) -> Node:
    indices = node.args[1]
    if not isinstance(indices, list | tuple) or len(indices) != 1 or not isinstance(indices[0], Node):
        raise _Mismatch(f"{what} should be indexed along its first dimension alone")
    return indices[0]


def _split_weighting(weighted: Node) -> tuple[Node, Any]:
    for column, product in (weighted.args[:2], weighted.args[1::-1]):
        if _is(column, aten.unsqueeze.default):
            return column, product  # type: ignore[return-value]
    raise _Mismatch("the expert outputs should be multiplied by one weight per pair")


def _permutation_source(perm: Node) -> Node:
    if not (_is(perm, operator.getitem) and perm.args[1] == 1):
        raise _Mismatch("pairs should be ordered by the indices of a sort")
    return _need(perm.args[0], "the order of pairs", aten.sort.default, aten.sort.stable)


def _check_inverse(inverse: Node, perm: Node) -> None:
    _need(inverse, "the inverse permutation", aten.index_put.default)
    indices: Any = inverse.args[1]
    values = inverse.args[2]
    counts_up = _is(values, aten.arange.default, aten.arange.start_step)
    if len(indices) != 1 or indices[0] is not perm or not counts_up:
        raise _Mismatch("the un-permute should invert the order of pairs")


def _check_offsets(offsets: Any, sort: Node, num_experts: int) -> None:
    cumsum = _need(_skip(offsets, *_CAST), "the offsets", aten.cumsum.default)
    histogram = _need(_skip(cumsum.args[0], *_CAST), "the counts", aten.histc.default)
    if histogram.args[1:] != (num_experts, 0, num_experts - 1):
        raise _Mismatch(f"the counts should cover experts 0 to {num_experts - 1}, got {histogram.args[1:]}")
    sorted_ids = _skip(histogram.args[0], *_CAST)
    if not (_is(sorted_ids, operator.getitem) and sorted_ids.args == (sort, 0)):
        raise _Mismatch("the counts are not those of the sorted expert ids")


def _expert_weights(node: Any, what: str) -> tuple[Node, bool]:
    """The placeholder of expert weights, and whether it enters the product as it lies (`is_transposed`)."""
    if _is(node, aten.transpose.int) and {d % 3 for d in node.args[1:3]} == {1, 2}:
        node, is_transposed = node.args[0], False
    else:
        is_transposed = True
    if not (isinstance(node, Node) and node.op in ("placeholder", "get_attr") and len(_shape(node)) == 3):
        raise _Mismatch(f"{what} should be a parameter [E, ., .], got {getattr(node, 'target', node)}")
    return node, is_transposed


def _first_product(second: Node) -> Node:
    first = _grouped_product_above(second.args[0])
    if first is None:
        raise _Mismatch("the gate region should start at a grouped product")
    return first
