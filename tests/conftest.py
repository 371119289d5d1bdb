"""What holds before any test module is imported; and the shapes, inputs and error budget of `masked_moe`."""

import os

# Before the imports: Triton decides once, when it is first imported, whether kernels run in its interpreter,
# on CPU tensors. With a GPU, TRITON_INTERPRET=0 runs the same tests on compiled kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from modes_fx.kernels.gate_formula import SILU, parse
from modes_fx.kernels.masked_moe import OTHER, TEXT, VISION, Call, reference
from modes_fx.testing.compile_only import GPT_OSS


class Case(NamedTuple):
    """A shape, and what is special about it. `why` is the test's name."""

    why: str
    tokens: int = 9
    slots: int = 2
    experts: int = 4
    hidden: int = 32
    intermediate: int = 16
    modality: str | None = "mixed"  # of the tokens: "mixed", "text", "vision", "other", or no mask at all
    routing: str = "any"  # "any", "one" (all on expert 1), "not one" (nobody on expert 1)
    skip: float = 0.5  # part of the pairs to drop


CASES = [
    Case("typical", tokens=33, slots=4, experts=8),
    Case("no tokens", tokens=0),
    Case("one token, as in decode", tokens=1),
    # Rows of a tile are at most 64; dispatch chunks hold 128 pairs.
    Case("one row past a tile on one expert", tokens=65, slots=1, routing="one", skip=0),
    Case("one token past a dispatch chunk", tokens=65, slots=2),
    Case("many rows per expert, so the larger tile", tokens=70, experts=2, hidden=80, intermediate=144),
    Case("one slot", slots=1),
    Case("every expert chosen", slots=4),
    Case("slots no power of two", slots=3, experts=5),
    Case("an expert without tokens", routing="not one"),
    Case("all on one expert", slots=1, routing="one"),
    Case("one expert", slots=1, experts=1),
    Case("more experts than one block counts", slots=6, experts=35),
    Case("nothing skipped", skip=0),
    Case("all skipped", skip=1, modality="text"),
    Case("all text", modality="text"),
    Case("all text, without a mask", modality=None),
    Case("all image", modality="vision"),
    Case("all other, so never skipped", modality="other", skip=1),
    Case("H and I no multiples of 16", hidden=40, intermediate=25),
    Case("H and I below the smallest tile", hidden=7, intermediate=3),
    Case("H and I past one tile", hidden=72, intermediate=68),
]

# What differs between families, as arguments of `make_problem`.
LAYOUTS: dict[str, dict[str, Any]] = {
    "gelu": {"activation": "gelu(gate) * up"},
    "gelu by tanh, in float32": {"activation": "same(gelu_tanh(float32(gate)) * float32(up))"},
    "relu, up first": {"activation": "up * relu(gate)"},
    "limits before silu": {
        "activation": "silu(clamp_max(gate, 1.5)) * clamp_max(clamp_min(up, -1.5), 1.5)",
        "interleaved": True,
    },
    "gpt-oss": {"activation": GPT_OSS, "interleaved": True, "is_transposed": True, "bias": True},
    "no gate": {"activation": "square(relu(x))"},
    "no gate, with biases": {"activation": "gelu(x)", "bias": True, "is_transposed": True},
    "weights on the input": {"weights_on_input": True, "is_transposed": True},
    "weights on the input, with biases": {"weights_on_input": True, "bias": True, "interleaved": True},
    "weights on the input, renormalised": {
        "activation": "square(relu(x))",
        "weights_on_input": True,
        "renormalise": True,
    },
    "a wider result": {"width_out": 50, "bias": True, "renormalise": True},
    "a narrower result": {"width_out": 20, "bias": True, "is_transposed": True},
}

Problem = dict[str, Any]  # the arguments of the op, by name


def cast(problem: Problem, dtype: torch.dtype) -> Problem:
    """Floating-point inputs in another dtype; not the scores, whose comparison has to stay the same."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name != "scores" else x
        for name, x in problem.items()
    }


@pytest.fixture(params=CASES, ids=lambda case: case.why.replace(" ", "-").replace(",", ""))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(params=LAYOUTS.values(), ids=[name.replace(" ", "-").replace(",", "") for name in LAYOUTS])
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def typical() -> Case:
    return CASES[0]


@pytest.fixture
def small() -> Case:
    return Case("small")


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    def make(
        case: Case,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = False,
        activation: str = SILU,
        is_transposed: bool = False,
        width_out: int | None = None,
        **flags: Any,
    ) -> Problem:
        """Random inputs; the thresholds drop `case.skip` of the text pairs and of the vision pairs.

        `width_out`, the width of the result, is that of the input unless given.
        """
        g = torch.Generator().manual_seed(0)
        T, K, E, H, I = case[1:6]
        hidden = torch.randn(T, H, generator=g)
        logits = torch.randn(T, E, generator=g)
        if case.routing != "any":
            logits[:, 1] = torch.inf if case.routing == "one" else -torch.inf
        _, experts = logits.topk(K)
        scores = torch.rand(T, K, generator=g).sort(descending=True).values * 0.9 + 0.1
        modality = {
            "mixed": torch.arange(T) % 3,
            "text": torch.full((T,), TEXT),
            "vision": torch.full((T,), VISION),
            "other": torch.full((T,), OTHER),
        }.get(case.modality or "")
        alpha_text, alpha_vision = 0.7, 0.3
        # Scores lie in [0.1, 1), so a threshold outside drops none or all.
        cut = {0.0: 0.05, 1.0: 1.5}.get(case.skip)
        if cut is None:
            cut = scores.quantile(case.skip).item() if T else 0.5
        rows, width_out = I * len(parse(activation).variables), width_out or H
        gate_up = torch.randn(E, rows, H, generator=g) / H**0.5
        down = torch.randn(E, width_out, I, generator=g) / I**0.5
        if is_transposed:
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        problem = {
            "hidden": hidden,
            "scores": scores,
            "weights": scores * 1.5,  # a routed scaling factor: what multiplies is not what is compared
            "experts": experts,
            "modality": None if modality is None else modality.to(torch.uint8),
            "gate_up": gate_up,
            "down": down,
            "gate_up_bias": torch.randn(E, rows, generator=g) if bias else None,
            "down_bias": torch.randn(E, width_out, generator=g) if bias else None,
            "alpha_text": alpha_text,
            "alpha_vision": alpha_vision,
            "tau_text": alpha_text * cut,
            "tau_vision": alpha_vision * cut,
            "activation": activation,
            "is_transposed": is_transposed,
            **flags,
        }
        return cast(problem, dtype)

    return make


@pytest.fixture
def assert_within_budget() -> Callable[[Tensor, Problem], None]:
    def check(got: Tensor, problem: Problem) -> None:
        """At most twice the error of the reference in the same dtype, against float64, plus a rounding band.

        The band is for where the reference is exact by luck: four roundings of the largest value. A token
        that has lost all its pairs has to be exactly zero.
        """
        exact = reference(**cast(problem, torch.float64))
        low = reference(**problem)
        assert got.shape == low.shape
        assert got.dtype == problem["hidden"].dtype
        assert got.is_contiguous()
        if got.numel() == 0:
            return
        error = (got.double() - exact).abs().amax()
        band = 4 * torch.finfo(got.dtype).eps * exact.abs().amax()
        assert error <= 2 * (low.double() - exact).abs().amax() + band
        empty = ~Call(**problem).keep().any(dim=-1)
        torch.testing.assert_close(got[empty], torch.zeros_like(got[empty]), rtol=0, atol=0)

    return check


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (and the largest integer), so whoever reads what was never written shows it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
