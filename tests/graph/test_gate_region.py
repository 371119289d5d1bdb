"""gate_formula: what stands between two products, as text, and as the same numbers."""

import pytest
import torch
from torch.nn import functional as F

from modes_fx.kernels.gate_formula import parse
from modes_fx.passes.dataflow import Mismatch
from modes_fx.passes.gate_region import gate_formula
from modes_fx.testing.small_block import GATED, UNGATED

aten = torch.ops.aten

GATE, UP = "gate", "up"


@pytest.fixture
def read(trace):
    """Trace `x @ w -> region -> @ v` and read the region; checks that the formula gives its numbers."""

    def formula(region, width=8, dtype=torch.float32):
        # Plain products: the region is the same between grouped ones.
        y = 4 * torch.randn(5, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        want = region(y)
        x, w, v = torch.randn(5, 6).to(dtype), torch.randn(6, width).to(dtype), torch.randn(want.shape[1], 6)
        v = v.to(dtype)
        (traced,) = trace(lambda x, w, v: torch.mm(region(torch.mm(x, w)), v), x=x, w=w, v=v)
        first, second = traced.all(aten.mm.default)
        views = [first, *(user for user in first.users if user.target is aten.view.default)]
        text, interleaved = gate_formula(
            [node for node in views if node.meta["val"].shape[-1] == width], second.args[0]
        )
        got = parse(text).evaluate(y, interleaved)
        assert got.dtype == want.dtype
        torch.testing.assert_close(
            got, want, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
        return text, interleaved

    return formula


def halves(y):
    return y.chunk(2, dim=-1)


def alternating(y):
    return y[..., ::2], y[..., 1::2]


@pytest.mark.parametrize("split, interleaved", [(halves, False), (alternating, True)])
@pytest.mark.parametrize(
    "act, name",
    [
        (F.silu, "silu(gate)"),
        (F.relu, "relu(gate)"),
        (F.gelu, "gelu(gate)"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh(gate)"),
        (torch.tanh, "tanh(gate)"),
        (torch.sigmoid, "sigmoid(gate)"),
        (lambda x: x * torch.sigmoid(1.702 * x), None),
        (F.mish, None),
        (F.softplus, "softplus(gate)"),
        (lambda x: F.relu(x) ** 2, "square(relu(gate))"),
        (lambda x: F.relu6(x), None),
        (lambda x: F.silu(x.clamp(-2.0, 3.0)), "silu(clamp_max(clamp_min(gate, -2.0), 3.0))"),
        (lambda x: -x.abs(), None),
    ],
)
def test_reads_activation_and_layout(read, split, interleaved, act, name):
    def region(y):
        gate, up = split(y)
        return act(gate) * up

    text, found = read(region)
    assert found == interleaved
    if name is not None:
        assert text == f"{name} * up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_reads_the_gates_of_the_families(read, name, dtype):
    text, interleaved = read(UNGATED.get(name) or (lambda y: GATED[name](*halves(y))), dtype=dtype)
    assert not interleaved
    variables = ("x",) if name in UNGATED else (GATE, UP)
    assert parse(text).variables == variables


def test_reads_gpt_oss_as_it_is_written(read):
    def region(y):
        gate, up = alternating(y)
        gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    text, interleaved = read(region)
    assert interleaved
    assert text.count("clamp_max(gate, 7.0)") == 2 and "clamp_max(clamp_min(up, -7.0), 7.0) + 1" in text


def test_says_where_it_computes_in_float32(read):
    text, _ = read(lambda y: GATED["in float32"](*halves(y)), dtype=torch.bfloat16)
    assert text == "same(silu(float32(gate)) * float32(up))"
    # In a float32 model the casts are none.
    assert read(lambda y: GATED["in float32"](*halves(y)))[0] == "silu(gate) * up"


@pytest.mark.parametrize(
    "region, interleaved",
    [
        (lambda y: halves(y)[1] * F.silu(halves(y)[0]), False),
        (lambda y: F.silu(y[:, :4]) * y[:, 4:], False),
        (lambda y: F.silu(y.split(4, -1)[0]) * y.split(4, -1)[1], False),
        (lambda y: F.silu(y.view(-1, 2, 4).unbind(1)[0]) * y.view(-1, 2, 4).unbind(1)[1], False),
        (lambda y: F.silu(y.view(-1, 2, 4)[:, 0]) * y.view(-1, 2, 4)[:, 1], False),
        (lambda y: F.silu(y.view(-1, 4, 2)[..., 0]) * y.view(-1, 4, 2)[..., 1], True),
        (lambda y: F.silu(y.view(-1, 4, 2).unbind(-1)[0]) * y.view(-1, 4, 2).unbind(-1)[1], True),
        (lambda y: F.silu(y.select(0, 0)[None, :4].expand(5, 4) * 0 + y[:, :4]) * y[:, 4:], None),
    ],
    ids=["up first", "slices", "split", "unbind", "select", "last select", "last unbind", "another row"],
)
def test_sees_through_other_spellings(read, region, interleaved):
    if interleaved is None:
        with pytest.raises(Mismatch, match="no formula for"):
            read(region)
    else:
        assert read(region) == ("silu(gate) * up", interleaved)


@pytest.mark.parametrize(
    "region, text",
    [
        (lambda y: halves(y)[0] * F.silu(halves(y)[1]), "silu(up) * gate"),
        (lambda y: F.silu(halves(y)[0]) * (halves(y)[1] + 1), "silu(gate) * (up + 1)"),
        (lambda y: F.silu(halves(y)[0]) + halves(y)[1], "silu(gate) + up"),
        (lambda y: F.silu(halves(y)[0]) * halves(y)[1] / 2, "(silu(gate) * up) / 2"),
        (lambda y: torch.maximum(*halves(y)), "maximum(gate, up)"),
        (lambda y: 1 - halves(y)[0] * halves(y)[1], None),
    ],
)
def test_reads_formulas_that_no_family_has(read, region, text):
    found, _ = read(region)
    assert text in (None, found)


@pytest.mark.parametrize(
    "region, reason",
    [
        (lambda y: F.silu(halves(y)[0]) * halves(y)[0], "both halves of the first product, .* got gate"),
        (lambda y: F.silu(halves(y)[0]), "got gate"),
        (lambda y: F.silu(y[:, :4]) * y[:, 4:] + y.view(-1, 4, 2)[..., 0], "both halves"),
        (lambda y: F.silu(y[:, :4]) * y[:, 3:7], "no formula for aten.slice"),
        (lambda y: F.silu(halves(y + 1)[0]) * halves(y + 1)[1], "no formula for"),
        (lambda y: F.silu(y.chunk(4, -1)[0].repeat(1, 2)) * halves(y)[1], "no formula for aten.repeat"),
        (lambda y: torch.sin(halves(y)[0]) * halves(y)[1], "no formula for aten.sin"),
        (lambda y: F.rms_norm(F.silu(halves(y)[0]) * halves(y)[1], (4,)), "no formula for"),
        (lambda y: F.silu(halves(y)[0]).softmax(-1) * halves(y)[1], "no formula for aten._softmax"),
        (lambda y: F.silu(halves(y)[0]) * halves(y)[1].cumsum(-1), "no formula for aten.cumsum"),
        (lambda y: F.silu(halves(y)[0]) * torch.rand_like(halves(y)[1]), "no formula for"),
        (
            lambda y: F.silu(halves(y)[0]).double().tanh().float() * halves(y)[1],
            "no formula for aten._to_copy",
        ),
        (lambda y: F.silu(halves(y)[0]).flip(0) * halves(y)[1], "no formula for aten.flip"),
        (lambda y: torch.clamp(halves(y)[0], max=halves(y)[1]), "no formula for aten.clamp.Tensor"),
    ],
    ids=[
        "gate twice",
        "no up",
        "two layouts",
        "shifted slice",
        "sum before the split",
        "a quarter twice",
        "sine",
        "norm over the row",
        "softmax over the row",
        "running sum",
        "noise",
        "float64",
        "another token's",
        "clamp with a tensor",
    ],
)
def test_refuses_by_name_what_the_op_cannot_compute(read, region, reason):
    with pytest.raises(Mismatch, match=reason):
        read(region)


def test_refuses_a_learned_constant(trace):
    def block(x, w, v, limit):
        y = torch.mm(x, w)
        return torch.mm(torch.minimum(F.silu(y[:, :4]) * y[:, 4:], limit), v)

    inputs = {"x": torch.randn(5, 6), "w": torch.randn(6, 8), "v": torch.randn(4, 6), "limit": torch.ones(4)}
    (traced,) = trace(block, **inputs)
    first, second = traced.all(aten.mm.default)
    with pytest.raises(Mismatch, match="which is not a constant"):
        gate_formula([first], second.args[0])


def test_refuses_a_formula_without_end(trace):
    def block(x, w, v):
        y = torch.mm(x, w)
        for _ in range(12):
            y = y * torch.sigmoid(y)
        return torch.mm(y, v)

    (traced,) = trace(block, x=torch.randn(5, 6), w=torch.randn(6, 8), v=torch.randn(8, 6))
    first, second = traced.all(aten.mm.default)
    with pytest.raises(Mismatch, match="more than 2000 characters"):
        gate_formula([first], second.args[0])
