"""What an expert computes between its two products, written down as a formula.

    silu(gate) * up                                    most families
    square(relu(x))                                    experts without a gate
    silu(clamp_max(gate, 7.0)) * up                    a limit before the activation
    same(gelu_tanh(float32(gate)) * float32(up))       computed in float32, whatever the model's dtype

The language is a small part of Python's expressions, read with `ast` and never handed to `eval`:

    gate, up    the halves of the first product, `[P, I]` each
    x           all of the first product, `[P, I]`, in place of `gate` and `up`
    numbers     3, 1e-5, inf; arithmetic between numbers is done while reading
    + - * /     between any two of these, unary minus, and `a ** number`
    functions   the keys of `FUNCTIONS`

A formula is kept as the list of its steps, each distinct one once; `evaluate` runs them with torch, and
`_gate_formula_triton` writes them as a kernel's function.
"""

import ast
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SILU = "silu(gate) * up"


def _float32(a: Tensor) -> Tensor:
    # At least float32: a computation in float64 stays one.
    return a.to(torch.promote_types(a.dtype, torch.float32))


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "softplus": F.softplus,
    "erf": torch.erf,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "float32": _float32,  # compute in float32 from here on
    "same": Tensor.type_as,  # back to the dtype of the first product, which `evaluate` adds as an argument
}
OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
    "neg": operator.neg,
}
_SYMBOLS: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.Pow: "**",
    ast.USub: "neg",
}
# Arguments of what is not a function of one tensor: "t" a tensor, "n" a number.
_ARGUMENTS = {"minimum": "tt", "maximum": "tt", "clamp_min": "tn", "clamp_max": "tn"}
_ALLOWED = (
    "gate and up, or x alone; numbers and inf; + - * /, a ** number, unary minus; "
    f"the functions {', '.join(FUNCTIONS)}"
)


class Step(NamedTuple):
    """One operation. In `args` names are tensors: a variable, or `v3`, the result of step 3."""

    function: str  # of FUNCTIONS or OPERATORS
    args: tuple[str | float, ...]


@dataclass(frozen=True)
class Formula:
    """A formula that has been read; two are equal when their steps are, however they were written."""

    text: str = field(compare=False)
    variables: tuple[str, ...]  # ("gate", "up") or ("x",)
    steps: tuple[Step, ...]
    result: str  # the tensor that is the formula's value

    @property
    def is_gated(self) -> bool:
        """The first product has two halves, `gate` and `up`."""
        return len(self.variables) == 2

    def __str__(self) -> str:
        return self.text

    def evaluate(self, y: Tensor, interleaved: bool = False) -> Tensor:
        """Apply the formula to the first product, each step rounding as eager torch does.

        Args:
            y: `[P, 2I]` where the formula is gated, else `[P, I]`; floating point.
            interleaved: Gate and up alternate along `2I` instead of lying one after the other.
        Returns:
            `[P, I]`, the dtype of `y`.
        """
        parts = [y]
        if self.is_gated:
            parts = [y[..., ::2], y[..., 1::2]] if interleaved else list(y.chunk(2, dim=-1))
        values = dict(zip(self.variables, parts, strict=True))
        for i, (function, args) in enumerate(self.steps):
            operands: list[Any] = [values[a] if isinstance(a, str) else a for a in args]
            if function == "same":
                operands.append(y)
            compute = OPERATORS.get(function) or FUNCTIONS[function]
            values[f"v{i}"] = compute(*operands)
        return values[self.result].to(y.dtype)


@functools.cache
def parse(text: str) -> Formula:
    """Read a formula.

    Raises:
        ValueError: The text is no formula; the message names the piece and lists what is allowed.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        variables = ("x",) if "x" in names else ("gate", "up")
        if "x" in names and names & {"gate", "up"}:
            raise _error(text, text, "mixes x with gate and up")
        reader = _Reader(text, variables)
        result = reader.read(tree)
        if isinstance(result, float):
            raise _error(text, text, "uses neither gate, up nor x")
        return Formula(ast.unparse(tree), variables, tuple(reader.steps), result)
    except SyntaxError as error:
        raise _error(text, error.text or text, "is no expression") from None
    except (RecursionError, MemoryError):
        raise _error(text, text[:40] + "...", "is nested too deeply") from None


def _error(text: str, piece: str, why: str) -> ValueError:
    return ValueError(f"{piece.strip()!r} {why}, in the formula {text!r}. Allowed are {_ALLOWED}.")


class _Reader:
    """Turns a tree into steps; a step that is there already is not added again."""

    def __init__(self, text: str, variables: tuple[str, ...]) -> None:
        self.text = text
        self.variables = variables
        self.steps: dict[Step, str] = {}

    def read(self, node: ast.expr) -> str | float:
        """The value of a tree: the name of a tensor, or a number."""
        match node:
            case ast.Name(id=name) if name in self.variables:
                return name
            case ast.Name(id="inf"):
                return math.inf
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return self._number(node, lambda: number)
            case ast.UnaryOp(op=ast.USub() as symbol, operand=a):
                return self._operation(node, _SYMBOLS[type(symbol)], self.read(a))
            case ast.BinOp(left=a, op=symbol, right=b) if type(symbol) in _SYMBOLS:
                return self._operation(node, _SYMBOLS[type(symbol)], self.read(a), self.read(b))
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return self._call(node, name, [self.read(a) for a in args])
        raise self._refused(node, "is not allowed")

    def _operation(self, node: ast.expr, symbol: str, *args: str | float) -> str | float:
        if all(isinstance(a, float) for a in args):
            return self._number(node, lambda: OPERATORS[symbol](*args))
        if symbol == "**" and not (isinstance(args[1], float) and math.isfinite(args[1]) and args[1]):
            raise self._refused(node, "needs a finite number other than 0 as its exponent")
        return self._step(symbol, args)

    def _call(self, node: ast.expr, name: str, args: list[str | float]) -> str:
        wanted = _ARGUMENTS.get(name, "t")
        if "".join("t" if isinstance(a, str) else "n" for a in args) != wanted:
            words = {"t": "one that depends on gate, up or x", "n": "a number"}
            needs = ", then ".join(words[kind] for kind in wanted)
            raise self._refused(node, f"needs {len(wanted)} argument{'s'[: len(wanted) - 1]}: {needs}")
        return self._step(name, tuple(args))

    def _step(self, function: str, args: tuple[str | float, ...]) -> str:
        return self.steps.setdefault(Step(function, args), f"v{len(self.steps)}")

    def _number(self, node: ast.expr, compute: Callable[[], Any]) -> float:
        try:
            number = float(compute())
        except (ArithmeticError, TypeError):  # a TypeError where the result is complex
            number = math.nan
        if math.isnan(number):
            raise self._refused(node, "is no real number")
        return number

    def _refused(self, node: ast.expr, why: str) -> ValueError:
        return _error(self.text, ast.get_source_segment(self.text.strip(), node) or ast.unparse(node), why)
