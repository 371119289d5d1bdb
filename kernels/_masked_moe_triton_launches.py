"""What a call of the Triton lowering launches, as data: for runtimes that launch kernels by a table.

    launches = record(call, arch)      the launcher itself, on fake tensors; sizes are expressions in T
    entry(launches[0])                 the kernel as such a runtime calls it

An entry takes the tensors that it reads, then sizes, then the tensors that it writes; strides, tiles and
flags are constants of it. The thresholds are a tensor (`THRESHOLDS`), so that all layers of a model share
their kernels. Who launches sees no sizes but those of the tensors that go in, so each entry whose sizes
depend on T reads a tensor that tells T, even if its kernel does not.

An expression is an integer, "T", or a list: "+", "*", "//" or "min", and what it is applied to.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.functions import FloorDiv, Min

from modes_fx.kernels._gate_formula_triton import jit_source
from modes_fx.kernels._masked_moe_triton import masked_moe_launched_by
from modes_fx.kernels.masked_moe import Call

Expression = int | str | list[Any]

THRESHOLDS = ("alpha_text", "alpha_vision", "tau_text", "tau_vision")  # in this order, float32
TOKENS = "T"
_OPERATIONS = {sympy.Add: "+", sympy.Mul: "*", FloorDiv: "//", Min: "min"}
# What Triton calls them.
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


@dataclass(frozen=True)
class Buffer:
    """A tensor that a launch writes.

    Attributes:
        name: Of no other tensor of the call.
        dtype: As torch names it.
        shape: Expressions.
    """

    name: str
    dtype: str
    shape: tuple[Expression, ...]


@dataclass(frozen=True)
class Told:
    """Where a launch reads T: `size of this dimension of this input == times * T`."""

    input: int
    dimension: int
    times: int


@dataclass(frozen=True)
class Launch:
    """One kernel, and how it is launched.

    Attributes:
        name: Of the kernel, without underscores.
        kernel: The `triton.jit` function of the lowering.
        inputs: Name of the tensor for each parameter that is read: an argument of the op, "thresholds", or
            what an earlier launch wrote. In the order of the entry.
        input_dtypes: Of them.
        sizes: Expression for each parameter that is a size, int32.
        outputs: What is written, for each such parameter.
        constants: Value of every other parameter.
        grid: Expressions.
        told: None where no expression depends on T.
    """

    name: str
    kernel: Any
    inputs: dict[str, str]
    input_dtypes: dict[str, torch.dtype]
    sizes: dict[str, Expression]
    outputs: dict[str, Buffer]
    constants: dict[str, Any]
    grid: tuple[Expression, ...]
    num_warps: int
    num_stages: int
    told: Told | None


def record(call: Call, arch: int) -> list[Launch]:
    """The launches of a call, in order, the last of which writes the result.

    Args:
        call: Of fake tensors. The number of tokens may be symbolic (and nothing else); its hint chooses the
            path and the tiles, and the expressions hold for every number.
        arch: 80, 90 or 100: whose tiles.
    """
    assert isinstance(call.hidden, FakeTensor)
    recorder = _Recorder(call)
    with call.hidden.fake_mode:
        masked_moe_launched_by(call, recorder.wrap, arch)
    return recorder.launches


def entry(launch: Launch) -> Any:
    """A `triton.jit` function of `inputs`, `sizes`, `outputs` and, as constants, `constants`."""
    parameters = [*launch.inputs, *launch.sizes, *launch.outputs]
    parameters += [f"{name}: tl.constexpr" for name in launch.constants]
    arguments = [
        f"tl.load(thresholds + {THRESHOLDS.index(name)})" if name in THRESHOLDS else name
        for name in _parameters(launch.kernel)
    ]
    source = f"def {launch.name}({', '.join(parameters)}):\n    kernel({', '.join(arguments)})\n"
    return jit_source(launch.name, source, kernel=launch.kernel)


def evaluate(expression: Expression, tokens: Any, minimum: Callable[[Any, Any], Any] = min) -> Any:
    """The value of an expression.

    Args:
        tokens: T, an integer, or what can be added, multiplied and divided (`//`) with integers on its right.
        minimum: Of two such.
    """
    if expression == TOKENS:
        return tokens
    if not isinstance(expression, list):
        return expression
    name, *operands = expression
    values = [evaluate(operand, tokens, minimum) for operand in operands]
    if name == "//":
        return values[0] // values[1]
    # Integers last: what stands for T may know how to add an integer, and not how to be added to one.
    values.sort(key=lambda value: isinstance(value, int))
    return functools.reduce({"+": operator.add, "*": operator.mul, "min": minimum}[name], values)


class _Recorder:
    def __init__(self, call: Call) -> None:
        arguments = {name: value for name, value in vars(call).items() if isinstance(value, Tensor)}
        # Views share their storage, so weights are known whichever way they are read.
        self._names = {_storage(tensor): name for name, tensor in arguments.items()}
        self._seen = list(arguments.values())  # which keeps their storages, by whose addresses they are known
        self._scores = call.scores
        self.launches: list[Launch] = []

    def wrap(self, kernel: Any) -> Any:
        """What takes the place of a kernel: `it[grid](...)` is noted."""
        recorder = self

        class Noted:
            def __getitem__(self, grid: Any) -> Any:
                return functools.partial(recorder._note, kernel, grid)

        return Noted()

    def _note(self, kernel: Any, grid: Any, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name, value) for name, value in (("num_warps", 4), ("num_stages", 3))}
        given = dict(zip(_parameters(kernel), args, strict=False)) | kwargs
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        read: dict[str, Tensor] = {}
        written: dict[str, Tensor] = {}
        sizes: dict[str, Expression] = {}
        constants: dict[str, Any] = {}
        for parameter, value in given.items():
            if isinstance(value, Tensor):
                # Every buffer is new when it is first passed on, to the kernel that fills it.
                (read if _storage(value) in self._names else written)[parameter] = value
            elif isinstance(value, torch.SymInt):
                sizes[parameter] = _expression(value)
            elif parameter not in THRESHOLDS:
                constants[parameter] = value
        for parameter, value in written.items():
            self._seen.append(value)
            self._names[_storage(value)] = f"{name}_{parameter}"
        outputs = {
            parameter: Buffer(f"{name}_{parameter}", _dtype(value), tuple(map(_expression, value.shape)))
            for parameter, value in written.items()
        }
        inputs = {parameter: self._names[_storage(value)] for parameter, value in read.items()}
        expressions = (*sizes.values(), *grid, *(size for value in written.values() for size in value.shape))
        told = None
        if not all(isinstance(size, int) for size in expressions):
            told = _told(list(read.values()))
            if told is None:
                read["scores"], inputs["scores"] = self._scores, "scores"
                told = _told(list(read.values()))
        dtypes = {parameter: value.dtype for parameter, value in read.items()}
        if any(parameter in THRESHOLDS for parameter in given):
            inputs["thresholds"], dtypes["thresholds"] = "thresholds", torch.float32
        self.launches.append(
            Launch(
                name,
                kernel,
                inputs,
                dtypes,
                sizes,
                outputs,
                constants,
                tuple(map(_expression, grid)),
                **options,
                told=told,
            )
        )


def _parameters(kernel: Any) -> list[str]:
    return list(inspect.signature(kernel.fn).parameters)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _told(read: list[Tensor]) -> Told | None:
    for index, tensor in enumerate(read):
        for dimension, size in enumerate(tensor.shape):
            if isinstance(size, torch.SymInt):
                times, rest = size.node.expr.as_coeff_Mul()
                if rest.is_Symbol:
                    return Told(index, dimension, int(times))
    return None


def _expression(size: int | torch.SymInt) -> Expression:
    return size if isinstance(size, int) else _write(size.node.expr)


def _write(expression: sympy.Expr) -> Expression:
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return TOKENS
    return [_OPERATIONS[type(expression)], *map(_write, expression.args)]
