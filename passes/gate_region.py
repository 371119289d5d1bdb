"""Read what stands between the two products of an expert as a formula of the first product.

before:  y = x @ gate_up;  gate, up = split(y);  a = silu(gate) * up;  a @ down
after:   ("silu(gate) * up", interleaved=False)

The formula is what `kernels/gate_formula.py` computes: the halves of the first product are `gate` and `up`
(the first and the second, or the even and the odd columns), and an expert without a gate is a formula of `x`,
the whole product. Any chain of elementwise operators with constants can be read; anything else, such as a
norm over the row or a learned constant, is refused by name.
"""

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Node

from modes_fx.kernels.gate_formula import parse
from modes_fx.passes.dataflow import VIEWS, Mismatch, dtype_of, is_call, name_of, shape_of, up_through

aten = torch.ops.aten

LONGEST = 2000  # characters; a formula repeats what is used twice, and a graph may use much twice
_EVERYTHING = 9223372036854775807  # the end of a slice that has none

_UNARY = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.erf.default: "erf",
    aten.abs.default: "abs",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.square.default: "square",
}
_BINARY = {
    aten.add.Tensor: "+",
    aten.add.Scalar: "+",
    aten.sub.Tensor: "-",
    aten.sub.Scalar: "-",
    aten.mul.Tensor: "*",
    aten.mul.Scalar: "*",
    aten.div.Tensor: "/",
    aten.div.Scalar: "/",
}
_CHOOSE = {aten.minimum.default: "minimum", aten.maximum.default: "maximum"}
_PLAIN = (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default)


def gate_formula(product: Collection[Node], gated: Any) -> tuple[str, bool]:
    """The formula, and whether gate and up are interleaved.

    Args:
        product: The nodes that hold the first product, with its bias, in any view: `[..., 2I]`, or
            `[..., I]` without a gate.
        gated: What enters the second product, `[..., I]`.
    Raises:
        Mismatch: The region is not elementwise; the message says what it holds.
    """
    reader = _Reader(product)
    text = reader.read(gated)
    # Parentheses around the whole formula say nothing.
    text = text[1:-1] if reader.encloses(text) else text
    if len(reader.layouts) != 1 or reader.halves not in ({"gate", "up"}, {"x"}):
        parts = ", ".join(sorted(reader.halves)) or "nothing"
        raise Mismatch(f"the gate should use both halves of the first product, or all of it, got {parts}")
    try:
        parse(text)
    except ValueError as error:
        raise Mismatch(f"the gate {text} is none that the op computes: {error}") from None
    return text, reader.layouts == {"interleaved"}


class _Reader:
    """One walk from the second product up to the first."""

    def __init__(self, product: Collection[Node]) -> None:
        self.product = product
        first = next(iter(product))
        self.width = shape_of(first)[-1]
        self.dtype = dtype_of(first)
        self.halves: set[str] = set()
        self.layouts: set[str] = set()

    def read(self, node: Any) -> str:
        text = self._read(node)
        if len(text) > LONGEST:
            raise Mismatch(f"the gate is a formula of more than {LONGEST} characters")
        return text

    def _read(self, node: Any) -> str:
        if isinstance(node, int | float):
            return repr(node)
        node = up_through(node, *_PLAIN)
        found = self._part(node)
        if found is not None:
            part, layout = found
            self.halves.add(part)
            self.layouts.add(layout)
            return part
        if is_call(node, *VIEWS):
            return self.read(node.args[0])
        if not isinstance(node, Node) or node.op != "call_function":
            raise Mismatch(f"the gate uses {name_of(node)}, which is not a constant")
        return self._operator(node)

    def _operator(self, node: Any) -> str:
        target, args = node.target, node.args
        if target in _UNARY:
            return f"{_UNARY[target]}({self.bare(args[0])})"
        if target in _CHOOSE:
            return f"{_CHOOSE[target]}({self.bare(args[0])}, {self.bare(args[1])})"
        if target in _BINARY:
            scaled = node.kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            if scaled == 1 and not node.kwargs.get("rounding_mode"):
                return self._binary(_BINARY[target], args[0], args[1])
        rule = _RULES.get(target)
        text = None if rule is None else rule(self, node)
        if text is None:
            raise Mismatch(f"no formula for {name_of(node)} in the gate")
        return text

    def _binary(self, sign: str, left: Any, right: Any) -> str:
        a, b = self.read(left), self.read(right)
        # act(gate) * up and up * act(gate) are one formula.
        if sign == "*" and (a in ("gate", "up") or _is_number(a)) and b not in ("gate", "up"):
            a, b = b, a
        return f"({a} {sign} {b})"

    def bare(self, node: Any) -> str:
        """As an argument of a function, where outer parentheses are not needed."""
        text = self.read(node)
        return text[1:-1] if self.encloses(text) else text

    @staticmethod
    def encloses(text: str) -> bool:
        """Whether the first parenthesis closes with the last character."""
        depth = 0
        for index, character in enumerate(text):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return index == len(text) - 1 and text.startswith("(")
        return False

    def cast(self, node: Any) -> str | None:
        dtype = dtype_of(node)
        if dtype == dtype_of(node.args[0]):
            return self.read(node.args[0])
        if dtype == torch.float32:
            return f"float32({self.bare(node.args[0])})"
        return f"same({self.bare(node.args[0])})" if dtype == self.dtype else None

    def _part(self, node: Any) -> tuple[str, str] | None:
        """Which part of the first product `node` is, and how the parts lie."""
        if node in self.product:
            return "x", "concatenated"
        if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor):
            source, size, *dim = node.args[0].args
            if self._is_product(source) and 2 * size == self.width and self._is_last(source, dim or [0]):
                return ("gate", "up")[node.args[1]], "concatenated"
        if is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind.int):
            source, *dim = node.args[0].args
            return self._select(source, dim[0] if dim else 0, node.args[1])
        if is_call(node, aten.select.int):
            return self._select(*node.args)
        if is_call(node, aten.slice.Tensor):
            return self._slice(node)
        return None

    def _slice(self, node: Any) -> tuple[str, str] | None:
        source, dim, start, end, *step = [*node.args, None, None, None][:5]
        source = up_through(source, *_PLAIN)
        while is_call(source, aten.slice.Tensor) and tuple(source.args[2:4]) == (0, _EVERYTHING):
            source = source.args[0]
        if not self._is_product(source) or not self._is_last(source, [dim or 0]):
            return None
        start, whole = start or 0, end is None or end >= self.width
        if step == [2] and whole and start in (0, 1):
            return ("gate", "up")[start], "interleaved"
        if step in ([None], [1]) and start == 0 and not whole and 2 * end == self.width:
            return "gate", "concatenated"
        if step in ([None], [1]) and whole and 2 * start == self.width:
            return "up", "concatenated"
        return None

    def _select(self, source: Any, dim: Any, index: Any) -> tuple[str, str] | None:
        """One of two from a view `[..., 2, I]` or `[..., I, 2]`."""
        if not is_call(source, *VIEWS) or not self._is_product(source.args[0]):
            return None
        shape = shape_of(source)
        dim = dim % len(shape)
        if shape[-2:] == (2, self.width // 2) and dim == len(shape) - 2:
            return ("gate", "up")[index], "concatenated"
        if shape[-2:] == (self.width // 2, 2) and dim == len(shape) - 1:
            return ("gate", "up")[index], "interleaved"
        return None

    def _is_product(self, node: Any) -> bool:
        return up_through(node, *_PLAIN) in self.product

    def _is_last(self, node: Any, dim: Any) -> bool:
        return dim[0] % len(shape_of(node)) == len(shape_of(node)) - 1


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _gelu(reader: _Reader, node: Any) -> str:
    approximate = node.kwargs.get("approximate", "none")
    return f"{'gelu_tanh' if approximate == 'tanh' else 'gelu'}({reader.bare(node.args[0])})"


def _clamp(reader: _Reader, node: Any) -> str:
    low, high = [*node.args[1:], *([None] * 2)][:2]
    text = reader.bare(node.args[0])
    text = text if low is None else f"clamp_min({text}, {low!r})"
    return text if high is None else f"clamp_max({text}, {high!r})"


def _power(reader: _Reader, node: Any) -> str | None:
    exponent = node.args[1]
    if exponent == 2:
        return f"square({reader.bare(node.args[0])})"
    return f"({reader.read(node.args[0])} ** {exponent!r})" if isinstance(exponent, int | float) else None


def _softplus(reader: _Reader, node: Any) -> str | None:
    return f"softplus({reader.bare(node.args[0])})" if len(node.args) == 1 else None


def _mish(reader: _Reader, node: Any) -> str:
    return f"({reader.read(node.args[0])} * tanh(softplus({reader.bare(node.args[0])})))"


def _rsub(reader: _Reader, node: Any) -> str | None:
    left, right, *scale = node.args
    return f"({reader.read(right)} - {reader.read(left)})" if not scale else None


_RULES: dict[Any, Callable[[_Reader, Any], str | None]] = {
    aten._to_copy.default: _Reader.cast,
    torch.ops.prims.convert_element_type.default: _Reader.cast,
    aten.gelu.default: _gelu,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda r, n: f"clamp_max({r.bare(n.args[0])}, {n.args[1]!r})",
    aten.hardtanh.default: lambda r, n: _clamp(r, n) if len(n.args) == 3 else None,
    aten.pow.Tensor_Scalar: _power,
    aten.neg.default: lambda r, n: f"(-{r.read(n.args[0])})",
    aten.reciprocal.default: lambda r, n: f"(1 / {r.read(n.args[0])})",
    aten.softplus.default: _softplus,
    aten.mish.default: _mish,
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
}
