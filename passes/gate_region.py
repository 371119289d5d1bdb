"""Name the activation between the two products of an expert: `act(gate) * up`, its layout and function.

before:  y = x @ gate_up;  gate, up = split(y);  a = act(gate) * up;  a @ down
after:   ("silu", interleaved=False)

Anything else is refused by name; the rewrite needs to know what it computes.
"""

import operator
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


class UnknownGate(Exception):
    """The region between the two products is none that the op can compute; the message says what it is."""


def classify_gate(first: Node, gated: Any) -> tuple[str, bool]:
    """The activation's name and whether gate and up are interleaved.

    Args:
        first: The first product, `[P, 2I]`.
        gated: What enters the second product, `[P, I]`.
    """
    gated = _uncast(gated)
    if not _is(gated, aten.mul.Tensor):
        raise UnknownGate(f"the gate should be act(gate) * up, got {getattr(gated, 'target', gated)}")
    for activated, up in (gated.args[:2], gated.args[1::-1]):
        name, gate = _activation(_uncast(activated))
        if name is None:
            continue
        gate_half, up_half = _half(_uncast(gate), first), _half(_uncast(up), first)
        if (gate_half, up_half) == ("first", "second"):
            return name, False
        if (gate_half, up_half) == ("even", "odd"):
            return name, True
        halves = f"{gate_half} and {up_half}"
        raise UnknownGate(f"gate and up should be the halves of the first product, got {halves}")
    targets = [str(getattr(_uncast(a), "target", a)) for a in gated.args[:2]]
    raise UnknownGate(f"no activation known in {' * '.join(targets)}")


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _uncast(node: Any) -> Any:
    while _is(node, aten._to_copy.default, aten.clone.default, aten.alias.default):
        node = node.args[0]
    return node


def _activation(node: Any) -> tuple[str | None, Any]:
    if _is(node, aten.silu.default):
        return "silu", node.args[0]
    if _is(node, aten.relu.default):
        return "relu", node.args[0]
    if _is(node, aten.gelu.default):
        return ("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"), node.args[0]
    return None, None


def _half(node: Any, first: Node) -> str:
    """Which part of the first product `node` is: first, second, even, odd, or something else."""
    width = first.meta["val"].shape[-1]
    if _is(node, operator.getitem) and _is(node.args[0], aten.split.Tensor):
        source, size, *dim = node.args[0].args
        if _uncast(source) is first and 2 * size == width and dim in ([-1], [1]):
            return ("first", "second")[node.args[1]]
    if _is(node, aten.slice.Tensor):
        source, dim, start, end, *step = node.args
        if _is(source, aten.slice.Tensor) and source.args[1:] == (0, 0, 9223372036854775807):
            source = source.args[0]
        if _uncast(source) is first and dim in (-1, 1):
            whole = end >= width
            if step == [2] and whole and start in (0, 1):
                return ("even", "odd")[start]
            if not step and start == 0 and 2 * end == width:
                return "first"
            if not step and 2 * start == width and whole:
                return "second"
    return f"{getattr(node, 'target', node)}"
