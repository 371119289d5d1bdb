"""Read off a graph how a block's routing weights come about. Changes nothing, and no rewrite depends on it.

    logits = mm(x, router^T)
    scores = softmax(logits) | sigmoid(logits)
    experts = topk(scores [+ bias for the choice alone] [within groups])       weights = those of the chosen
    weights = weights / sum(weights)                                           where it renormalises
    weights = weights * factor

What is known of the weights bounds how many of them can reach a threshold, which `narrow_slots` uses; a
router that is spelt otherwise is no obstacle to a rewrite, it only bounds nothing.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from modes_fx.passes.dataflow import (
    CASTS,
    LAYOUT_ONLY,
    aten,
    dtype_of,
    is_call,
    is_tensor,
    parameter_of,
    shape_of,
    up_through,
    upwards,
)

_PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.linear.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
)


@dataclass(frozen=True)
class Router:
    """How the routing weights of one block come about, as far as the graph tells.

    Attributes:
        weight: Parameter of the router, `[E, H_router]`, by which its layer is known; None where none was
            found.
        score: "softmax", "sigmoid", or None.
        softmax_after: The softmax is over the chosen logits, not over all.
        choice_bias: Something is added to the scores for the choice and not for the weights.
        in_groups: The choice is limited to groups of experts.
        renormalised: The weights are divided by their sum.
        factor: Constant that the weights are multiplied by; None where they are scaled by a tensor.
        is_sorted: The weights of a token never increase from slot to slot.
        eps: Of the coarsest dtype on the way from the logits to the weights.
    """

    weight: Node | None
    score: str | None = None
    softmax_after: bool = False
    choice_bias: bool = False
    in_groups: bool = False
    renormalised: bool = False
    factor: float | None = 1.0
    is_sorted: bool = False
    eps: float = 0.0

    @property
    def mass(self) -> float | None:
        """What the weights of a token sum up to at most; None where nothing is known."""
        bounded = self.score == "softmax" or self.renormalised
        return self.largest if bounded else None

    @property
    def largest(self) -> float | None:
        """What one weight is at most; None where nothing is known."""
        if self.factor is None or self.factor < 0 or self.score is None:
            return None
        # Some roundings on the way, and a sum of at most some hundred float32 values.
        return self.factor * (1 + 4 * self.eps + 1e-4)

    def __str__(self) -> str:
        parts = [self.score or "other", "router"]
        parts += ["over the chosen"] * self.softmax_after
        parts += ["choice bias"] * self.choice_bias + ["groups"] * self.in_groups
        parts += ["renormalised"] * self.renormalised
        if self.factor != 1:
            parts.append("scaled" if self.factor is None else f"x {self.factor:g}")
        return " ".join(parts[:2]) + "".join(f", {part}" for part in parts[2:])


def find_router(experts: Node, weights: Node | None, num_experts: int) -> Router:
    """The router above a block.

    Args:
        experts: Chosen experts, `[T, K]`.
        weights: Routing weights, `[T, K]`; None reads the router's parameter alone.
        num_experts: E.
    """
    parameter = router_parameter(experts, num_experts)
    if weights is None:
        return Router(parameter)
    if parameter is None:
        # The choice is looked up by token, the weights are the router's.
        parameter = router_parameter(weights, num_experts)
    found: dict[str, Any] = {"factor": 1.0}
    node = _unscaled(weights, found)
    if is_call(node, aten.div.Tensor) and _is_sum_of(node.args[1], node.args[0]):
        found["renormalised"] = True
        node = up_through(node.args[0], *CASTS)
    # A factor may also come before the division, where it cancels: only what follows it counts.
    node = _unscaled(node, {} if found.get("renormalised") else found)
    if _is_softmax(node):
        found["softmax_after"], found["score"] = True, "softmax"
        node = up_through(node.args[0], *CASTS)
    source = _chosen_from(node, experts, found)
    if source is not None and "score" not in found:
        source = up_through(source, *LAYOUT_ONLY)
        if _is_softmax(source) or is_call(source, aten.sigmoid.default):
            found["score"] = "softmax" if _is_softmax(source) else "sigmoid"
    choices = [n for n in upwards(experts, stop=_is_product) if is_call(n, aten.topk.default)]
    found["in_groups"] = len(choices) > 1
    if source is not None and choices:
        chosen_by = up_through(choices[0].args[0], *LAYOUT_ONLY)
        between = [n for n in upwards(chosen_by, stop=lambda n: n is source) if n is not source]
        found["choice_bias"] = any(is_call(n, aten.add.Tensor) for n in between)
    way = [n for n in upwards(weights, stop=_is_product) if is_tensor(n) and dtype_of(n).is_floating_point]
    return Router(parameter, **found, eps=max(torch.finfo(dtype_of(n)).eps for n in way))


def router_parameter(experts: Node, num_experts: int) -> Node | None:
    """The parameter of the nearest product above `experts` that gives one number per expert, `[E, H]`."""
    for node in upwards(experts, stop=_is_product):
        if _is_product(node):
            # From the right: tokens that are an input of the graph look like a parameter too.
            for argument in reversed(node.args):
                source = parameter_of(argument)
                if source is not None and len(shape_of(source)) == 2 and shape_of(source)[0] >= num_experts:
                    return source
    return None


def _is_product(node: Node) -> bool:
    return is_call(node, *_PRODUCTS)


def _is_softmax(node: Any) -> bool:
    """A softmax over the last dimension."""
    return is_call(node, aten._softmax.default, aten.softmax.int) and node.args[1] in (
        -1,
        len(shape_of(node)) - 1,
    )


def _unscaled(node: Any, found: dict[str, Any]) -> Any:
    """`node` without casts and factors; the product of the factors goes to `found`."""
    while True:
        node = up_through(node, *CASTS)
        if is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
            left, right = node.args[:2]
            if isinstance(left, int | float):
                left, right = right, left
            if isinstance(right, int | float):
                divides = is_call(node, aten.div.Tensor, aten.div.Scalar)
                factor = (1 / right if right else 0.0) if divides else right
                if found.get("factor") is not None:
                    found["factor"] *= factor
                node = left
                continue
            if is_call(node, aten.mul.Tensor):
                rows = [n for n in (left, right) if is_tensor(n) and _chooses(n)]
                if len(rows) == 1:
                    # A factor per expert, looked up by the choice.
                    found["factor"] = None
                    node = left if rows[0] is right else right
                    continue
        return node


def _chooses(node: Node) -> bool:
    """Whether `node` looks a parameter up by the chosen experts."""
    return is_call(node, aten.index.Tensor) and parameter_of(node.args[0]) is not None


def _is_sum_of(total: Any, parts: Any) -> bool:
    """Whether `total` is the sum of `parts` over the slots, plus or at least some constant."""
    parts = up_through(parts, *CASTS)
    adds, clamps = (aten.add.Tensor, aten.add.Scalar), (aten.clamp.default, aten.clamp_min.default)
    while is_call(total, *CASTS, *adds, *clamps):
        constant = total.args[1] if len(total.args) > 1 else None
        grows = isinstance(constant, int | float) and constant >= 0
        if (is_call(total, *adds) and not grows) or (is_call(total, *clamps) and len(total.args) > 2):
            return False
        total = total.args[0]
    if not is_call(total, aten.sum.dim_IntList):
        return False
    dims = total.args[1]
    return list(dims) in ([-1], [1]) and up_through(total.args[0], *CASTS) is parts


def _chosen_from(node: Any, experts: Any, found: dict[str, Any]) -> Node | None:
    """What `node` [T, K] is chosen from, `[T, E]`, where it is chosen by `experts`."""
    choice: Any = experts.args[0] if is_call(experts, operator.getitem) and experts.args[1] == 1 else None
    if not is_call(choice, aten.topk.default):
        choice = None
    if is_call(node, operator.getitem) and node.args == (choice, 0):
        source, same = choice.args[0], True
    elif is_call(node, aten.gather.default) and node.args[1] in (1, -1) and node.args[2] is experts:
        source = node.args[0]
        same = choice is not None and up_through(choice.args[0], *CASTS) is up_through(source, *CASTS)
    else:
        return None
    if same:
        given: tuple[Any, ...] = choice.args[2:]
        dim, largest, in_order = given + (-1, True, True)[len(given) :]
        found["is_sorted"] = bool(largest and in_order) and dim in (1, -1)
    return source
