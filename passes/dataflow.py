"""Read an aten graph by dataflow: what the finders share. Nothing here changes a graph."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

CASTS = (
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
)
VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
)
# Operators that hand the same numbers on, in another shape, stride or dtype.
LAYOUT_ONLY = (
    *CASTS,
    *VIEWS,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
)


class Mismatch(Exception):
    """A walk met something that the pattern does not have; the message says what."""


def is_call(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of these operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def need(node: Any, what: str, *targets: Any) -> Node:
    """`node`, or a `Mismatch` that names what stands in its place."""
    if not is_call(node, *targets):
        raise Mismatch(f"{what} should be {' or '.join(map(str, targets))}, got {name_of(node)}")
    return node


def name_of(node: Any) -> str:
    """What an error calls a node: its operator."""
    return str(getattr(node, "target", node))


def up_through(node: Any, *targets: Any) -> Any:
    """The first node above (or `node` itself) that is none of `targets`, along first arguments."""
    while is_call(node, *targets):
        node = node.args[0]
    return node


def upwards(node: Node, stop: Callable[[Node], bool] = lambda _: False) -> Iterator[Node]:
    """`node` and everything above it, nearest first; nothing above a node at which `stop` holds."""
    todo, seen = [node], set()
    for current in todo:
        if current not in seen:
            seen.add(current)
            yield current
            if not stop(current):
                todo.extend(current.all_input_nodes)


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape of a node's tensor; sizes may be symbolic."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        raise Mismatch(f"expected a tensor, got {name_of(node)}")
    return tuple(value.shape)


def dtype_of(node: Node) -> torch.dtype:
    """Dtype of a node's tensor."""
    return node.meta["val"].dtype


def is_tensor(node: Any) -> bool:
    """Whether a node holds one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_symbolic(node: Node) -> bool:
    """Whether a node holds a size, not a tensor."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def hint(size: Any) -> int:
    """A size as a number: the one of the call that is being compiled, where it is symbolic."""
    number = size if isinstance(size, int) else size.node.hint
    if number is None:
        raise Mismatch("a size depends on data")
    return number


def static(size: Any, what: str) -> int:
    """A size that has to be known at compile time."""
    if not isinstance(size, int):
        raise Mismatch(f"{what} is not known at compile time")
    return size


def is_parameter(node: Any) -> bool:
    """Whether a node stands for a tensor that the graph gets from outside."""
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr") and is_tensor(node)


def parameter_of(node: Any) -> Node | None:
    """The parameter that `node` is a view or copy of, or None."""
    node = up_through(node, *LAYOUT_ONLY)
    return node if is_parameter(node) else None


def between(outputs: list[Node], stop: set[Node]) -> list[Node]:
    """Nodes from `outputs`, themselves included, up to those below `stop`, in graph order; no sizes."""
    seen: set[Node] = set()
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node in seen or node in stop or is_symbolic(node):
            continue
        seen.add(node)
        todo.extend(node.all_input_nodes)
    return [node for node in outputs[0].graph.nodes if node in seen]
