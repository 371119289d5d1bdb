"""Find the experts of each block in a functional aten graph, by dataflow alone.

What all implementations of routed experts have in common is two products with per-expert weights, one feeding
the other, and a sum over a token's slots. What is matched, outwards from the products:

    rows  = a gather (or repetition) of hidden [T, H]                        -> hidden, the experts' input
    y     = product(rows, gate_up) [+ gate_up_bias[ids]]                     -> gate_up, its layout, its bias
    a     = elementwise formula of y                                         -> `gate_region.py`
    z     = product(a, down) [+ down_bias[ids]]                              -> down, its layout, its bias
    out   = sum over slots(z * weights)                                      -> weights, the block's output

    product, one of        grouped_mm   rows in expert order, with offsets from the sorted expert ids
                           batched_mm   bmm(rows, weight[ids])
                           dense        bmm([E, T, .], weight): every expert on every token

    ids, offsets come from experts [T, K]. The weights may multiply the rows in place of z (Llama 4).

How the pairs are ordered, counted and put back in between is not matched step by step: those operators only
have to be of the kinds that move rows (`_DISPATCH`), and `prove` runs them. Nothing here changes a graph. Two
products that do not fit are returned as `Declined`, with the reason, so that a rewrite is never silently
missing.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from modes_fx.passes.dataflow import (
    CASTS,
    LAYOUT_ONLY,
    VIEWS,
    Mismatch,
    aten,
    between,
    dtype_of,
    is_call,
    is_parameter,
    is_tensor,
    name_of,
    shape_of,
    static,
    up_through,
    upwards,
)
from modes_fx.passes.find_router import Router, find_router
from modes_fx.passes.gate_region import gate_formula


@dataclass(frozen=True)
class Experts:
    """One block's experts as they stand in the graph: the match record.

    Attributes:
        kind: How the products are spelt: "grouped_mm", "batched_mm" or "dense".
        hidden: Input of the experts, `[T, H]`.
        experts: Chosen experts, `[T, K]`, int64.
        weights: Routing weights, `[T, K]`; of a dense block `[T, E]`, zero where not chosen.
        gate_up: Parameter, `[E, 2I, H]`, or `[E, I, H]` without a gate, or transposed.
        down: Parameter, `[E, H, I]`, or transposed.
        gate_up_bias, down_bias: Parameters, `[E, 2I]` and `[E, H]`, or None.
        output: The node that holds the weighted sum over slots, `[T, H]`.
        num_experts: E.
        top_k: K.
        is_transposed: The weights lie as `[E, H, 2I]` and `[E, I, H]`.
        activation: Formula of the gate, see `kernels/gate_formula.py`.
        interleaved: Gate and up alternate.
        weights_on_input: The weights multiply the experts' input.
        router: Where the weights come from.
    """

    kind: str
    hidden: Node
    experts: Node
    weights: Node
    gate_up: Node
    down: Node
    gate_up_bias: Node | None
    down_bias: Node | None
    output: Node
    num_experts: int
    top_k: int
    is_transposed: bool
    activation: str
    interleaved: bool
    weights_on_input: bool
    router: Router

    def parameters(self) -> list[Node]:
        """The expert weights and biases."""
        return [p for p in (self.gate_up, self.down, self.gate_up_bias, self.down_bias) if p is not None]

    def nodes(self) -> list[Node]:
        """The nodes from the block's inputs to its output, in graph order: what the rewrite replaces."""
        return between([self.output], {self.hidden, self.experts, self.weights, *self.parameters()})

    def traits(self) -> str:
        """What tells families apart, for people to read."""
        parts = [self.kind, str(self.router), self.activation]
        parts += ["interleaved"] * self.interleaved + ["transposed"] * self.is_transposed
        parts += ["biased"] * (self.gate_up_bias is not None or self.down_bias is not None)
        parts += ["weights on the input"] * self.weights_on_input
        return "; ".join(parts)


@dataclass(frozen=True)
class Declined:
    """Something that looks like a block's experts and is left alone, with the reason."""

    output: Node
    router: Node | None
    reason: str


@dataclass(frozen=True)
class _Product:
    """`rows @ weight[expert of the row]`."""

    node: Node
    rows: Any
    weight: Node
    is_transposed: bool
    kind: str
    ids: Node | None  # where the expert of each row comes from; None of a dense product


# What may stand in a dispatch or a combine: operators that order, count, move and add up rows.
_DISPATCH = {
    *LAYOUT_ONLY,
    *(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable),
    *(aten.floor_divide.default, aten.div.Tensor_mode, operator.floordiv, operator.getitem),
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.repeat.default),
    *(aten.repeat_interleave.self_int, aten.scatter.src, aten.scatter.value, aten.index_put.default),
    *(aten.histc.default, aten.bincount.default, aten.cumsum.default, aten.one_hot.default),
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.empty_like.default),
    *(aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default, aten.full.default),
    *(aten.mul.Tensor, aten.add.Tensor, aten.sum.dim_IntList, aten.bmm.default, aten.sym_size.int),
    *(aten.index_add.default, aten.scatter_add.default, operator.mul, operator.add),
}


def find_blocks(graph: Graph) -> list[Experts | Declined]:
    """The experts of each block in graph order, which is layer order. Changes nothing."""
    products = {node: product for node in graph.nodes if (product := _as_product(node)) is not None}
    found: list[Experts | Declined] = []
    for second in products.values():
        first = _product_above(second, products)
        if first is None:
            continue
        try:
            found.append(_match(first, second))
        except Mismatch as reason:
            # Products with all experts' weights at once need not be routed: shared experts run like that too.
            if second.kind != "dense":
                found.append(Declined(second.node, _router_near(second), str(reason)))
    return found


def _grouped_targets() -> tuple[Any, ...]:
    # transformers registers its own operator for dtypes that torch's grouped product does not trace.
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return (aten._grouped_mm.default,) if fallback is None else (aten._grouped_mm.default, fallback.default)


def _as_product(node: Node) -> _Product | None:
    if is_call(node, *_grouped_targets()):
        weight = _expert_weight(node.args[1])
        if weight is None or any(a is not None for a in node.args[3:4]) or not isinstance(node.args[2], Node):
            return None
        return _Product(node, node.args[0], *weight, "grouped_mm", node.args[2])
    if is_call(node, aten.bmm.default):
        left, right = node.args
        for rows, operand, is_right in ((left, right, True), (right, left, False)):
            indexed, flipped = _untransposed(operand)
            if is_call(indexed, aten.index.Tensor) and is_parameter(indexed.args[0]):
                ids = indexed.args[1]
                if len(shape_of(indexed.args[0])) == 3 and len(ids) == 1:
                    kind = "batched_mm"
                    return _Product(node, rows, indexed.args[0], is_right != flipped, kind, ids[0])
            elif is_right and is_parameter(indexed) and len(shape_of(indexed)) == 3:
                return _Product(node, rows, indexed, not flipped, "dense", None)
    return None


def _expert_weight(operand: Any) -> tuple[Node, bool] | None:
    """The parameter `[E, ., .]`, and whether it enters a product `rows @ weight` as it lies."""
    node, flipped = _untransposed(operand)
    return (node, not flipped) if is_parameter(node) and len(shape_of(node)) == 3 else None


def _untransposed(node: Any) -> tuple[Any, bool]:
    """`node` without a transposition of its last two dimensions, and whether there was one."""
    if is_call(node, aten.transpose.int) and {d % 3 for d in node.args[1:3]} == {1, 2}:
        return node.args[0], True
    if is_call(node, aten.permute.default) and tuple(d % 3 for d in node.args[1]) == (0, 2, 1):
        return node.args[0], True
    return node, False


def _product_above(second: _Product, products: dict[Node, _Product], reach: int = 96) -> _Product | None:
    """The nearest product whose rows become those of `second`, with no sum or attention in between."""
    barriers = (aten.sum.dim_IntList, aten.index_add.default, aten.mm.default, aten.addmm.default)
    if not isinstance(second.rows, Node):
        return None
    for count, node in enumerate(upwards(second.rows, stop=lambda n: n in products or is_call(n, *barriers))):
        if node in products:
            return products[node]
        if count > reach:
            return None
    return None


def _match(first: _Product, second: _Product) -> Experts:
    if first.kind != second.kind:
        raise Mismatch(f"one product is {first.kind}, the other {second.kind}")
    if first.is_transposed != second.is_transposed:
        raise Mismatch("gate_up and down lie in different layouts")
    num_experts = static(shape_of(first.weight)[0], "the number of experts")
    if shape_of(second.weight)[0] != num_experts:
        raise Mismatch("gate_up and down have different numbers of experts")
    inner, gate_up_bias = _with_bias(first)
    activation, interleaved = gate_formula(inner, second.rows)
    outer, down_bias = _with_bias(second)
    output, factor = _combine(outer, second)
    hidden, input_factor = _gathered(first)
    if (factor is None) == (input_factor is None):
        many = "both before and after" if factor else "neither before nor after"
        raise Mismatch(f"the routing weights are applied {many} the experts")
    column = factor if factor is not None else input_factor
    if first.kind == "dense":
        experts, weights = _dense_choice(column, num_experts)
    else:
        assert first.ids is not None and second.ids is not None
        experts = _choice(first.ids)
        if _choice(second.ids) is not experts:
            raise Mismatch("the two products follow different choices of experts")
        weights = _weights(column, experts)
    block = Experts(
        kind=first.kind,
        hidden=hidden,
        experts=experts,
        weights=weights,
        gate_up=first.weight,
        down=second.weight,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        output=output,
        num_experts=num_experts,
        top_k=static(shape_of(experts)[1], "the number of slots"),
        is_transposed=first.is_transposed,
        activation=activation,
        interleaved=interleaved,
        weights_on_input=factor is None,
        router=find_router(experts, None if first.kind == "dense" else weights, num_experts),
    )
    _check_dispatch(block, inner, second)
    return block


def _with_bias(product: _Product) -> tuple[list[Node], Node | None]:
    """The nodes that hold a product's value `[..., B]` in any view, with its bias where it has one."""
    width = shape_of(product.weight)[2 if product.is_transposed else 1]
    value = _views(product.node, width)
    for node in value:
        for user in node.users:
            if is_call(user, aten.add.Tensor) and len(user.args) == 2 and not user.kwargs:
                other = user.args[1] if user.args[0] is node else user.args[0]
                gathered = up_through(other, *LAYOUT_ONLY)
                if is_call(gathered, aten.index.Tensor) and is_parameter(gathered.args[0]):
                    bias = gathered.args[0]
                    if len(shape_of(bias)) != 2:
                        raise Mismatch(f"a bias of shape {shape_of(bias)}, which should be [E, .]")
                    return _views(user, width), bias
    return value, None


def _views(node: Node, width: Any) -> list[Node]:
    """`node` and its views that are still rows of `width` columns."""
    found = [node]
    for each in found:
        found += [user for user in each.users if is_call(user, *VIEWS)]
    return [each for each in found if shape_of(each)[-1] == width]


def _combine(value: list[Node], second: _Product) -> tuple[Node, Node | None]:
    """The sum over slots below the second product, and what the rows are multiplied by on the way."""
    # A bias that was added in place leaves views on the way from one of `value` to another.
    users = [user for node in value for user in node.users if user not in value]
    users = [user for user in users if not (is_call(user, *VIEWS) and {*user.users} <= {*value})]
    factor: Any = None
    at: Any = None
    while True:
        if len(users) != 1:
            names = ", ".join(sorted({name_of(user) for user in users})) or "nothing"
            raise Mismatch(f"the output of each expert goes to {names}, which should be one sum over slots")
        user = users[0]
        source = next(n for n in user.all_input_nodes if n in value or n is at)
        if is_call(user, aten.mul.Tensor) and factor is None:
            factor = user.args[1] if user.args[0] is source else user.args[0]
            if not isinstance(factor, Node):
                raise Mismatch("the expert outputs are multiplied by a constant")
        elif _is_reduction(user, source, second.kind):
            return user, factor
        elif not is_call(user, *LAYOUT_ONLY, aten.index.Tensor) or user.args[0] is not source:
            raise Mismatch(f"{name_of(user)} on the output of each expert, before the sum over slots")
        at = user
        users = list(user.users)


def _is_reduction(node: Any, source: Node, kind: str) -> bool:
    if is_call(node, aten.sum.dim_IntList):
        dims = [d % len(shape_of(source)) for d in node.args[1]]
        kept = len(node.args) > 2 and node.args[2]
        if len(shape_of(source)) != 3 or dims != [0 if kind == "dense" else 1] or kept:
            raise Mismatch(f"the combine should sum [T, K, H] over the slots, got a sum over {node.args[1]}")
        return True
    if is_call(node, aten.index_add.default, aten.scatter_add.default):
        zeros = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default, aten.full.default)
        if not is_call(up_through(node.args[0], *CASTS), *zeros) or node.args[3] is not source:
            raise Mismatch("the expert outputs are added onto something that is not zero")
        return True
    return False


def _gathered(first: _Product) -> tuple[Node, Node | None]:
    """The experts' input above the gather of rows, and what the rows are multiplied by on the way."""
    node: Any = first.rows
    factor = None
    while True:
        if is_call(node, aten.index.Tensor, aten.index_select.default, aten.repeat.default):
            node = node.args[0]
            break
        if is_call(node, aten.repeat_interleave.self_int):
            node = node.args[0]
            break
        if is_call(node, aten.expand.default):
            node = node.args[0]
            while is_call(node, *VIEWS) and len(shape_of(node)) != 2:
                node = node.args[0]
            break
        if is_call(node, aten.mul.Tensor) and factor is None:
            columns = [a for a in node.args if is_tensor(a) and shape_of(a)[-1] == 1]
            if len(columns) != 1:
                raise Mismatch("the rows are multiplied by something that is not one weight per pair")
            factor = columns[0]
            node = node.args[1] if node.args[0] is factor else node.args[0]
            continue
        if not is_call(node, *LAYOUT_ONLY):
            raise Mismatch(f"the first product should have gathered tokens as rows, got {name_of(node)}")
        node = node.args[0]
    if not is_tensor(node) or len(shape_of(node)) != 2:
        raise Mismatch(f"the experts' input should be [T, H], got {name_of(node)}")
    return node, factor


def _choice(ids: Node) -> Node:
    """The chosen experts, `[T, K]`, above what orders or counts them."""
    for node in upwards(ids, stop=lambda n: is_tensor(n) and len(shape_of(n)) == 2):
        if is_tensor(node) and len(shape_of(node)) == 2 and not dtype_of(node).is_floating_point:
            return node
    raise Mismatch("the expert of each row should come from [T, K] chosen experts")


def _weights(column: Any, experts: Node) -> Node:
    """The routing weights, `[T, K]`, above the column that multiplies the rows."""
    found = None
    node = column
    while is_tensor(node):
        if len(shape_of(node)) == 2 and _same_size(node, experts):
            found = node
        movable = (*VIEWS, aten.index.Tensor, aten.expand.default)
        if not is_call(node, *(movable if found is not None else (*movable, *CASTS))):
            break
        node = node.args[0]
    if found is None:
        raise Mismatch("the factor of each row should be a routing weight of shape [T, K]")
    return found


def _same_size(node: Node, experts: Node) -> bool:
    (tokens, slots), (want, top_k) = shape_of(node), shape_of(experts)
    return slots == top_k and (tokens is want or tokens == want)


def _dense_choice(column: Any, num_experts: int) -> tuple[Node, Node]:
    """The chosen experts and the dense weights, `[T, E]`, of a block that runs every expert."""
    weights = None
    for above in upwards(column, stop=lambda n: not is_call(n, *LAYOUT_ONLY)):
        if is_tensor(above) and len(shape_of(above)) == 2 and shape_of(above)[1] == num_experts != 1:
            weights = above
    if weights is None:
        raise Mismatch(f"the dense weights should be [T, {num_experts}]")
    node: Any = weights
    functions = []
    while is_call(node, *CASTS, aten.sigmoid.default):
        functions.append(node.target)
        node = node.args[0]
    if not is_call(node, aten.scatter.src) or node.args[1] not in (1, -1):
        raise Mismatch("the dense weights should be scattered from the chosen ones")
    base = up_through(node.args[0], *CASTS)
    full, zeros = (aten.full_like.default, aten.full.default), (aten.zeros_like.default, aten.zeros.default)
    fill = base.args[1] if is_call(base, *full) else 0
    if not is_call(base, *full, *zeros, aten.new_zeros.default):
        raise Mismatch(f"the dense weights are scattered onto {name_of(base)}")
    value = torch.tensor(float(fill))
    if (torch.sigmoid(value) if aten.sigmoid.default in functions else value) != 0:
        raise Mismatch("experts that were not chosen have a weight that is not zero")
    return node.args[2], weights


def _check_dispatch(block: Experts, inner: list[Node], second: _Product) -> None:
    """Between inputs and output are only operators that move rows, and nothing else comes in."""
    allowed = {*_DISPATCH, *_grouped_targets()}
    stop = {block.hidden, block.experts, block.weights, *block.parameters()}
    gate = set(between([second.rows], {*stop, *inner})) - set(between(inner, stop))
    for node in block.nodes():
        if node in gate:
            continue
        if node.op != "call_function" or node.target not in allowed:
            raise Mismatch(f"{name_of(node)} between the block's inputs and its output")


def _router_near(second: _Product) -> Node | None:
    """A router above a block that did not match, for the message."""
    num_experts = shape_of(second.weight)[0]
    if second.ids is None or not isinstance(num_experts, int):
        return None
    try:
        return find_router(_choice(second.ids), None, num_experts).weight
    except Mismatch:
        return None
