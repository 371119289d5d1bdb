"""classify_gate: which activation, and where gate and up lie, on small traced graphs of the region alone."""

import pytest
import torch
from torch.nn import functional as F

from modes_fx.passes.gate_region import UnknownGate, classify_gate

aten = torch.ops.aten


@pytest.fixture
def classify(trace):
    """Trace `x @ w -> region -> @ v` and classify the region."""

    def classified(region, width=8):
        # Plain products: the region is the same between grouped ones.
        x, w, v = torch.randn(5, 6), torch.randn(6, width), torch.randn(width // 2, 6)
        (traced,) = trace(lambda x, w, v: torch.mm(region(torch.mm(x, w)), v), x=x, w=w, v=v)
        first, second = traced.all(aten.mm.default)
        return classify_gate(first, second.args[0])

    return classified


def halves(y):
    return y.chunk(2, dim=-1)


def alternating(y):
    return y[..., ::2], y[..., 1::2]


@pytest.mark.parametrize("split, interleaved", [(halves, False), (alternating, True)])
@pytest.mark.parametrize(
    "act, name",
    [
        (F.silu, "silu"),
        (F.relu, "relu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
    ],
    ids=["silu", "relu", "gelu", "gelu_tanh"],
)
def test_names_activation_and_layout(classify, split, interleaved, act, name):
    def region(y):
        gate, up = split(y)
        return act(gate) * up

    assert classify(region) == (name, interleaved)


@pytest.mark.parametrize(
    "region",
    [
        lambda y: halves(y)[1] * F.silu(halves(y)[0]),
        lambda y: F.silu(y[:, :4]) * y[:, 4:],
        lambda y: F.silu(halves(y)[0].double()).float() * halves(y)[1],
    ],
    ids=["up first", "slices", "computed in another dtype"],
)
def test_sees_through_other_spellings(classify, region):
    assert classify(region) == ("silu", False)


@pytest.mark.parametrize(
    "region, reason",
    [
        (lambda y: halves(y)[0] * F.silu(halves(y)[1]), "halves of the first product, got second and first"),
        (lambda y: F.silu(y[..., 1::2]) * y[..., ::2], "got odd and even"),
        (lambda y: F.silu(halves(y)[0]) * halves(y)[0], "got first and first"),
        (lambda y: F.silu(y[:, :4]) * y[:, 3:7], "halves of the first product"),
        (lambda y: F.silu(halves(y)[0]) * (halves(y)[1] + 1), "got first and aten.add"),
        (lambda y: F.silu(halves(y + 1)[0]) * halves(y + 1)[1], "halves of the first product"),
        (lambda y: F.silu(y.chunk(4, -1)[0].repeat(1, 2)) * halves(y)[1], "got aten.repeat"),
        (lambda y: torch.tanh(halves(y)[0]) * halves(y)[1], "no activation known in aten.tanh"),
        (lambda y: F.silu(halves(y)[0]) + halves(y)[1], r"act\(gate\) \* up, got aten.add"),
        (lambda y: F.silu(halves(y)[0]), r"act\(gate\) \* up, got aten.silu"),
    ],
    ids=[
        "halves swapped",
        "alternation swapped",
        "gate twice",
        "shifted slice",
        "up plus one",
        "bias",
        "a quarter twice",
        "tanh",
        "sum",
        "no up",
    ],
)
def test_refuses_by_name_what_the_op_cannot_compute(classify, region, reason):
    with pytest.raises(UnknownGate, match=reason):
        classify(region)
