"""A formula as a C++ function of vectors, float32 in and out; its functions stand in `native/vectors.h`.

silu(gate) * up   ->   static inline vec formula(vec gate, vec up) {
                         const vec v0 = v_silu(gate);
                         const vec v1 = v0 * up;
                         return v1;
                       }
"""

import math

import torch

from modes_fx.kernels.gate_formula import OPERATORS, Formula


def write_formula(formula: Formula) -> str:
    """The source of `formula(first, second)`; without a gate, `second` is not used."""
    lines = [f"  const vec v{i} = {_write(*step)};" for i, step in enumerate(formula.steps)]
    parameters = "vec gate, vec up" if formula.is_gated else "vec x, vec"
    body = "\n".join([*lines, f"  return {formula.result};"])
    return f"static inline vec formula({parameters}) {{\n{body}\n}}\n"


def _write(function: str, args: tuple[str | float, ...]) -> str:
    operands = [_operand(a) for a in args]
    if function == "**":
        return _power(operands[0], float(args[1]))
    if function == "neg":
        return f"-{operands[0]}"
    if function in OPERATORS:
        return f"{operands[0]} {function} {operands[1]}"
    if function == "square":
        return f"{operands[0]} * {operands[0]}"
    if function == "rsqrt":
        return f"1.f / v_sqrt({operands[0]})"
    if function in ("float32", "same"):  # all is float32 here
        return operands[0]
    return f"v_{function}({', '.join(operands)})"


def _operand(value: str | float) -> str:
    if isinstance(value, str):
        return value
    value = torch.tensor(value, dtype=torch.float32).item()
    if math.isinf(value):
        return f"splat({'-' if value < 0 else ''}__builtin_inff())"
    return f"splat({value!r}f)" if value >= 0 else f"splat(({value!r}f))"


def _power(base: str, exponent: float) -> str:
    """`base ** exponent`, by products where the exponent is a small whole or half number."""
    whole, rest = divmod(abs(exponent), 1)
    if whole <= 8 and rest in (0, 0.5):
        product = " * ".join([base] * int(whole) + [f"v_sqrt({base})"] * (rest > 0))
        return product if exponent > 0 else f"1.f / ({product})"
    if rest:
        return f"v_pow({base}, {exponent!r}f)"
    power = f"v_pow(v_abs({base}), {exponent!r}f)"
    return power if exponent % 2 == 0 else f"({base} < splat(0.f) ? -{power} : {power})"
