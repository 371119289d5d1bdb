"""Formulas of an expert's gate: what is read, what is refused, and that torch's own result comes out."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from modes_fx.kernels.gate_formula import FUNCTIONS, SILU, Step, parse

EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


GPT_OSS = (
    "(clamp_max(clamp_min(up, -7.0), 7.0) + 1.0) * "
    "(clamp_max(gate, 7.0) * sigmoid(clamp_max(gate, 7.0) * 1.702))"
)
GATED = {
    SILU: lambda gate, up: F.silu(gate) * up,
    "gelu(gate) * up": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh(gate) * up": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "up * relu(gate)": lambda gate, up: F.relu(gate) * up,
    "tanh(gate) + up": lambda gate, up: torch.tanh(gate) + up,
    "sigmoid(gate) - up": lambda gate, up: torch.sigmoid(gate) - up,
    "gate / up": lambda gate, up: gate / up,
    "minimum(gate, up)": torch.minimum,
    "maximum(gate, -up)": lambda gate, up: torch.maximum(gate, -up),
    "gate": lambda gate, up: gate,
    "up": lambda gate, up: up,
    GPT_OSS: gpt_oss,
    # In one dtype, then in another: the two round differently.
    "gelu_tanh(gate) * up * gate": lambda gate, up: F.gelu(gate, approximate="tanh") * up * gate,
    "same(gelu_tanh(float32(gate)) * float32(up)) * gate": lambda gate, up: (
        (F.gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype) * gate
    ),
    "silu(float32(gate)) * up": lambda gate, up: (F.silu(gate.float()) * up).to(gate.dtype),
}
UNGATED = {
    "square(relu(x))": lambda x: torch.square(F.relu(x)),
    "x": lambda x: x,
    "-x": lambda x: -x,
    "exp(x)": torch.exp,
    "log(x)": torch.log,
    "softplus(x)": F.softplus,
    "x * tanh(softplus(x))": F.mish,
    "erf(x)": torch.erf,
    "abs(x)": torch.abs,
    "sqrt(x)": torch.sqrt,
    "rsqrt(x)": torch.rsqrt,
    "x ** 3": lambda x: x**3,
    "x ** -0.5": lambda x: x**-0.5,
    "clamp_min(x, -0.25)": lambda x: x.clamp(min=-0.25),
    "clamp_max(x, inf)": lambda x: x,
    "clamp_min(x, -inf)": lambda x: x,
    "1e-3 - x * 2 / 7": lambda x: 1e-3 - x * 2 / 7,
    "x * (2.0 / 3 - 1)": lambda x: x * (2.0 / 3 - 1),
    "x * -2 ** 2": lambda x: x * -4,
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("text", GATED)
def test_a_gated_formula_computes_what_torch_does(text, interleaved, dtype):
    y = (4 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    # Views, as in a model: the last bit of a vectorised function depends on the strides.
    gate, up = (y[:, ::2], y[:, 1::2]) if interleaved else (y[:, :16], y[:, 16:])
    formula = parse(text)
    assert formula.is_gated
    if dtype == torch.float64 and "float32" in text:
        # At least float32: what is exact stays exact.
        want = parse(text.replace("float32", "").replace("same", "")).evaluate(y, interleaved)
    else:
        want = GATED[text](gate, up)
    torch.testing.assert_close(formula.evaluate(y, interleaved), want, **EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", UNGATED)
def test_a_formula_without_a_gate_computes_what_torch_does(text, dtype):
    y = (4 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    formula = parse(text)
    assert not formula.is_gated
    want = UNGATED[text](y)
    exact = EXACT if "softplus(x))" not in text else {}  # mish rounds once, its formula three times
    torch.testing.assert_close(formula.evaluate(y), want, **exact)


def test_every_function_is_evaluated_above():
    texts = " ".join([*GATED, *UNGATED])
    assert [name for name in FUNCTIONS if f"{name}(" not in texts] == []


def test_float32_inside_a_formula_saves_roundings():
    y = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = parse("silu(gate) * up").evaluate(y.double())
    error = {
        text: (parse(text).evaluate(y) - exact).abs().mean()
        for text in ("silu(gate) * up", "same(silu(float32(gate)) * float32(up))")
    }
    assert error["same(silu(float32(gate)) * float32(up))"] < error["silu(gate) * up"]


@pytest.mark.parametrize("text", [*GATED, *UNGATED])
def test_a_formula_reads_as_itself(text):
    formula = parse(text)
    again = parse(str(formula))
    assert again == formula
    assert again.text == formula.text


def test_writing_it_differently_changes_nothing():
    assert parse(" ( silu( gate )*up ) ") == parse("silu(gate) * up")
    assert str(parse(" ( silu( gate )*up ) ")) == "silu(gate) * up"
    assert parse("up * silu(gate)") != parse("silu(gate) * up")


def test_what_is_used_twice_is_computed_once():
    functions = [step.function for step in parse(GPT_OSS).steps]
    assert functions == ["clamp_min", "clamp_max", "+", "clamp_max", "*", "sigmoid", "*", "*"]
    text = "x"
    for _ in range(30):
        text = f"({text} + {text})" if len(text) < 1000 else text
    assert len(parse(text).steps) == text.count("(").bit_length()


def test_a_number_is_never_taken_for_a_tensor():
    # up is the second tensor, and the result of the second step is another; 1.0 is neither.
    formula = parse("(gate * up) / (gate * 1.0) + gate * 0.0")
    assert Step("*", ("gate", "up")) in formula.steps
    assert Step("*", ("gate", 1.0)) in formula.steps
    y = torch.tensor([[3.0, 5.0]])
    assert formula.evaluate(y).item() == 5


def test_a_formula_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse(SILU).text = "x"


@pytest.mark.parametrize(
    "text, message",
    [
        ("swish(gate) * up", r"^'swish\(gate\)' is not allowed"),
        ("silu(gate) * down", "^'down' is not allowed"),
        ("silu", "^'silu' is not allowed"),
        ("", "is no expression"),
        ("silu(gate", "is no expression"),
        ("gate; up", "is no expression"),
        ("gate\n* up", "is no expression"),
        ("3.0", "uses neither gate, up nor x"),
        ("inf", "uses neither gate, up nor x"),
        ("x * up", "mixes x with gate and up"),
        ("gate % up", "^'gate % up' is not allowed"),
        ("gate @ up", "^'gate @ up' is not allowed"),
        ("gate // 2", "^'gate // 2' is not allowed"),
        ("+gate", r"^'\+gate' is not allowed"),
        ("not gate", "^'not gate' is not allowed"),
        ("gate < up", "^'gate < up' is not allowed"),
        ("gate if up else gate", "is not allowed"),
        ("gate and up", "is not allowed"),
        ("gate.exp()", r"^'gate.exp\(\)' is not allowed"),
        ("gate[0]", r"^'gate\[0\]' is not allowed"),
        ("(lambda: gate)()", "is not allowed"),
        ("[gate for _ in x]", "mixes x"),
        ("[gate for gate in up]", "is not allowed"),
        ("(y := gate)", "is not allowed"),
        ("__import__('os').system('true')", "is not allowed"),
        ("gate * 'a'", "^\"'a'\" is not allowed"),
        ("gate * True", "^'True' is not allowed"),
        ("gate * 1j", "^'1j' is not allowed"),
        ("gate * nan", "^'nan' is not allowed"),
        ("gate * (inf - inf)", "^'inf - inf' is no real number"),
        ("gate * (1 / 0)", "^'1 / 0' is no real number"),
        ("gate * 9 ** 9 ** 9", r"^'9 \*\* 9 \*\* 9' is no real number"),
        ("gate * (-2) ** 0.5", "is no real number"),
        ("gate ** up", r"^'gate \*\* up' needs a finite number other than 0 as its exponent"),
        ("2 ** gate", "needs a finite number other than 0 as its exponent"),
        ("gate ** 0", "needs a finite number other than 0 as its exponent"),
        ("gate ** inf", "needs a finite number other than 0 as its exponent"),
        ("silu()", r"^'silu\(\)' needs 1 argument: one that depends on gate, up or x"),
        ("gate * silu(2.0)", "needs 1 argument: one that depends on gate, up or x"),
        ("silu(gate, up)", "needs 1 argument"),
        ("minimum(gate, 2.0)", "needs 2 arguments: one that depends on gate, up or x, then one that depends"),
        ("clamp_min(gate, up)", "needs 2 arguments: one that depends on gate, up or x, then a number"),
        ("clamp_max(gate)", "needs 2 arguments"),
        ("clamp_max(gate, max=7.0)", "is not allowed"),
        ("clamp_max(*gate)", r"^'\*gate' is not allowed"),
        ("-" * 100_000 + "x", "is nested too deeply"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message) as refusal:
        parse(text)
    assert "Allowed are gate and up, or x alone; numbers and inf;" in str(refusal.value)
    assert "clamp_max" in str(refusal.value)
