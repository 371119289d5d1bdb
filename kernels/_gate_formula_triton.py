"""A formula as a Triton function: `gate` and `up`, or `x`, float32 in and out.

    silu(gate) * up   ->   def formula(gate, up):
                               v0 = gate * tl.sigmoid(gate)
                               v1 = v0 * up
                               return v1

Kernels call it as a global, not as an argument: Inductor writes a kernel down as source, into which it copies
the functions that the kernel's globals name, and an argument that is a function would be lost.

Only what Triton's interpreter has too is used, so no library calls. A step is off by about 1e-6 at most, of
its result or of 1, whichever is more.
"""

import functools
import hashlib
import linecache
import math
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from modes_fx.kernels.gate_formula import Formula

# {0} and {1} are the arguments. `tl.where` in place of `tl.minimum` and `tl.maximum`, which lose a NaN.
STEPS = {
    "+": "{0} + {1}",
    "-": "{0} - {1}",
    "*": "{0} * {1}",
    "/": "{0} / {1}",
    "neg": "-{0}",
    "silu": "{0} * tl.sigmoid({0})",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    # 0.5 * (1 + tanh(z)) == sigmoid(2 * z)
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "sigmoid": "tl.sigmoid({0})",
    "tanh": "2.0 * tl.sigmoid(2.0 * {0}) - 1.0",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "softplus": "tl.where({0} < 0.0, 0.0, {0}) + tl.log(1.0 + tl.exp(-tl.abs({0})))",
    "erf": "tl.erf({0})",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "square": "{0} * {0}",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "clamp_min": "tl.where({0} < {1}, {1}, {0})",
    "clamp_max": "tl.where({0} > {1}, {1}, {0})",
    # All is float32 here.
    "float32": "{0}",
    "same": "{0}",
}


@functools.cache
def compile_formula(formula: Formula) -> Any:
    """A `triton.jit` function of the formula's variables, to be called by a kernel; one for each formula."""
    lines = [f"    v{i} = {_write(*step)}" for i, step in enumerate(formula.steps)]
    body = "\n".join([*lines, f"    return {formula.result}"])
    return jit_source("formula", f"def formula({', '.join(formula.variables)}):\n{body}\n")


def jit_source(name: str, source: str, **scope: Any) -> Any:
    """The `triton.jit` function of that name in `source`, which may use `tl` and what `scope` holds."""
    # Triton reads the source of a function with `inspect`, which asks `linecache`.
    file = f"<{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    scope |= {"tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    return triton.jit(scope[name])


@functools.cache
def with_formula(kernel: Any, formula: Formula) -> Any:
    """The same kernel with another `formula` among its globals; one for each pair of arguments."""
    fn = kernel.fn
    scope = {**fn.__globals__, "formula": compile_formula(formula)}
    copy = FunctionType(fn.__code__, scope, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__annotations__, copy.__qualname__ = fn.__annotations__, fn.__qualname__
    return triton.jit(copy, do_not_specialize=getattr(kernel, "do_not_specialize", None))


def _write(function: str, args: tuple[str | float, ...]) -> str:
    if function == "**":
        base, exponent = args
        return _power(str(base), float(exponent))
    return STEPS[function].format(*map(_operand, args))


def _operand(value: str | float) -> str:
    if isinstance(value, str):
        return value
    value = torch.tensor(value, dtype=torch.float32).item()
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _power(base: str, exponent: float) -> str:
    """`base ** exponent`; a power in Triton is a library call, which its interpreter lacks."""
    whole, rest = divmod(abs(exponent), 1)
    if whole <= 8 and rest in (0, 0.5):
        product = " * ".join([base] * int(whole) + [f"tl.sqrt({base})"] * (rest > 0))
        return product if exponent > 0 else f"1.0 / ({product})"
    if rest:
        return f"tl.exp2({exponent} * tl.log2({base}))"
    power = f"tl.exp2({exponent} * tl.log2(tl.abs({base})))"
    return power if exponent % 2 == 0 else f"tl.where({base} < 0.0, -1.0, 1.0) * {power}"
