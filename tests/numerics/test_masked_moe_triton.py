"""The Triton lowering of `masked_moe`, interpreted, or compiled with `TRITON_INTERPRET=0` and a GPU."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from modes_fx.kernels import _masked_moe_triton as lowering
from modes_fx.kernels._gate_formula_triton import STEPS, compile_formula
from modes_fx.kernels._masked_moe_tiles import is_decode, max_tiles
from modes_fx.kernels.gate_formula import FUNCTIONS, OPERATORS, parse
from modes_fx.kernels.masked_moe import OTHER, Call, _cuda, keep_mask

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
EXACT = {"rtol": 0, "atol": 0}

pytestmark = [
    # NaN and infinity are among the inputs, and numpy, on which the interpreter runs, says so.
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory", "bfloat16_products"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Let the interpreter multiply bfloat16: Triton 3.9's multiplies their bit patterns as integers."""
    product = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        if a.dtype.scalar == tl.bfloat16:
            wide = [(x.data.astype(np.uint32) << 16).view(np.float32) for x in (a, b)]
            a, b = (TensorHandle(x, tl.float32) for x in wide)
        return product(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def run(problem):
    """The lowering on `DEVICE`; the result on the CPU."""
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in problem.items()}
    return _cuda(**moved).cpu()


def dispatch(scores, experts, modality, num_experts, alpha=1.0, tau=0.0, weights=None, renormalise=False):
    inputs = [scores, scores if weights is None else weights, experts, modality]
    call = Call(
        torch.empty(len(scores), 1, device=DEVICE),
        *(None if x is None else x.to(DEVICE) for x in inputs),
        torch.empty(num_experts, 2, 1, device=DEVICE),
        torch.empty(num_experts, 1, 1, device=DEVICE),
        alpha_text=alpha,
        alpha_vision=alpha,
        tau_text=tau,
        tau_vision=tau,
        renormalise=renormalise,
    )
    call.check()
    return lowering.dispatch(call)


@pytest.fixture(params=[33, 9], ids=["many-tokens", "few-tokens"])
def typical(request, typical):
    """For either path."""
    return typical._replace(tokens=request.param)


@pytest.fixture
def run_both_ways(monkeypatch):
    """The results of the path that a call takes and, where that is the one for few tokens, of the other."""

    def results(problem):
        yield run(problem)
        if is_decode(*problem["scores"].shape):
            monkeypatch.setattr(lowering, "is_decode", lambda *_: False)
            yield run(problem)
            monkeypatch.undo()

    return results


# Dispatch.


@pytest.mark.parametrize(
    ("tokens", "slots", "experts"),
    [
        (1, 1, 1),
        (7, 8, 8),
        (129, 1, 5),  # one token past a chunk
        (50, 3, 40),  # slots no power of two; experts in two blocks
        (2100, 3, 3),  # more chunks than the scan takes at a time
    ],
)
def test_order_is_a_stable_sort_of_the_kept_pairs(tokens, slots, experts):
    g = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, slots, generator=g)
    chosen = torch.rand(tokens, experts, generator=g).topk(slots).indices
    got = dispatch(scores, chosen, None, experts, tau=0.6)
    kept = (scores >= 0.6).flatten().nonzero().squeeze(-1)
    order = kept[chosen.flatten()[kept].sort(stable=True).indices]
    torch.testing.assert_close(got.order.cpu()[: len(order)].long(), order, **EXACT)
    counts = torch.bincount(chosen.flatten()[kept], minlength=experts)
    torch.testing.assert_close(got.totals.cpu().long(), counts, **EXACT)


@pytest.mark.parametrize("tau", [0.0, 0.25, 1e-45, torch.inf, -torch.inf, 0.1 * 0.3, torch.nan])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_keeps_exactly_what_the_specification_keeps(tau, alpha, dtype):
    # Ties, neighbours of ties, zero, denormals and what is not finite; every modality for each of them.
    values = [0.0, 1e-45, 0.1, 0.25, 0.5, np.nextafter(np.float32(0.5), 0), 1.0, torch.inf, torch.nan, -1.0]
    scores = torch.tensor(values).to(dtype).repeat(3).unsqueeze(-1)
    modality = torch.arange(3, dtype=torch.uint8).repeat_interleave(len(values))
    for mask in (None, modality):
        got = dispatch(scores, torch.zeros_like(scores, dtype=torch.int64), mask, 1, alpha, tau)
        keep = keep_mask(scores, mask, alpha, alpha, tau, tau)
        torch.testing.assert_close(got.keys.cpu() == 0, keep.flatten(), **EXACT)


def test_compares_in_float32():
    scores = torch.tensor([[0.1]])
    tau = (scores * 0.3).item()
    assert scores.double().item() * 0.3 < tau
    assert dispatch(scores, torch.zeros(1, 1, dtype=torch.int64), None, 1, 0.3, tau).keys.item() == 0


def test_an_index_outside_the_experts_drops_its_pair():
    chosen = torch.tensor([[0, -1, 2, 1]])
    assert dispatch(torch.ones(1, 4), chosen, None, 2).keys.tolist() == [0, -1, -1, 1]


def test_renormalised_weights_have_the_mass_of_all_slots():
    scores = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.1]])
    chosen = torch.tensor([[0, 1, 2], [0, 1, 2]])
    got = dispatch(scores, chosen, None, 3, tau=0.2, weights=scores * 2, renormalise=True)
    torch.testing.assert_close(got.scales.cpu()[:3], torch.tensor([1.0, 0.5, 0.5]))
    got = dispatch(scores, chosen, None, 3, tau=0.3, weights=scores * 2, renormalise=True)
    torch.testing.assert_close(got.scales.cpu()[:1], torch.tensor([2.0]))


def test_no_routing_needs_more_tiles_than_the_grid_has():
    for num_pairs in range(1, 70):
        for num_experts in range(1, 9):
            for width in (16, 64):
                # The worst routing leaves one pair on each expert but one.
                alone = min(num_experts, num_pairs) - 1
                worst = alone + triton.cdiv(num_pairs - alone, width)
                assert worst <= max_tiles(num_pairs, num_experts, width) <= num_pairs


# The whole lowering.


def test_matches_the_reference(case, make_problem, assert_within_budget, run_both_ways):
    problem = make_problem(case)
    for result in run_both_ways(problem):
        assert_within_budget(result, problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference_in_16_bits(case, dtype, make_problem, assert_within_budget, run_both_ways):
    problem = make_problem(case, dtype)
    for result in run_both_ways(problem):
        assert_within_budget(result, problem)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_reads_every_layout(typical, bias, interleaved, is_transposed, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=bias, interleaved=interleaved, is_transposed=is_transposed)
    assert_within_budget(run(problem), problem)


def test_reads_views_where_they_lie(typical, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=True)
    views = dict(problem)
    for name in ("hidden", "scores", "weights", "experts", "gate_up", "down", "gate_up_bias", "down_bias"):
        x = problem[name]
        views[name] = torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]
        assert not views[name].is_contiguous()
    assert_within_budget(run(views), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_every_kind_of_expert(
    small, layout, dtype, make_problem, assert_within_budget, run_both_ways
):
    problem = make_problem(small, dtype, **layout)
    for result in run_both_ways(problem):
        assert_within_budget(result, problem)


def test_a_kept_pair_of_weight_zero_still_has_its_biases(typical, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=True, weights_on_input=True)
    problem["weights"] = torch.zeros_like(problem["weights"])
    assert_within_budget(run(problem), problem)


@triton.jit
def _apply(a, b, out, FORMULA: tl.constexpr, GATED: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    first, second = tl.load(a + i), tl.load(b + i)
    tl.store(out + i, FORMULA(first, second) if GATED else FORMULA(first))


# Not -0.0, whose sign some powers lose.
SPECIAL = [0.0, 1e-30, 0.3, -0.3, 1.0, -2.0, 2.5, 19.0, -30.0, 88.0, 100.0, -100.0, 1e18, -1e18]
SPECIAL += [torch.inf, -torch.inf, torch.nan]
WITH_A_CASE_OF_THEIR_OWN = {"gelu", "minimum", "maximum", "clamp_min", "clamp_max"}


@pytest.mark.parametrize(
    "text",
    [f"{name}(x)" for name in FUNCTIONS if name not in WITH_A_CASE_OF_THEIR_OWN]
    # The gelu of infinity is NaN in torch on some CPUs.
    + ["gelu(clamp_max(x, 1e30))"]
    + [f"{name}(gate, up)" for name in ("minimum", "maximum")]
    + [f"{name}(x, {n})" for name in ("clamp_min", "clamp_max") for n in ("0.5", "-inf", "inf", "-0.1")]
    + [f"gate {symbol} up" for symbol in "+-*/"]
    + ["-x", "1e39 - x", "x * 1e-40", "0.1 / x", "x - -0.1", "2 ** 0.5 * x", "up", "gate", "x"]
    + [f"x ** {n}" for n in (1, 2, -1, 3, -3, 9, 10, -9, -10)]
    # A negative number has no such power, and libraries differ on that of minus infinity.
    + [f"clamp_min(x, -1e30) ** {n}" for n in (0.5, -0.5, 1.5, -2.5, 0.3, -1.7)],
)
def test_a_step_is_what_torch_computes(text):
    formula = parse(text)
    values = torch.tensor(SPECIAL)
    a, b = (x.flatten() for x in torch.meshgrid(values, values, indexing="ij"))
    padding = torch.zeros(triton.next_power_of_2(len(a)) - len(a))
    a, b = torch.cat([a, padding]), torch.cat([b, padding])
    got = torch.empty_like(a, device=DEVICE)
    function = compile_formula(formula)
    _apply[(1,)](a.to(DEVICE), b.to(DEVICE), got, FORMULA=function, GATED=formula.is_gated, N=len(a))
    want = formula.evaluate(torch.stack([a, b], dim=1) if formula.is_gated else a.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_step_of_a_formula_can_be_compiled():
    assert STEPS.keys() | {"**"} == FUNCTIONS.keys() | OPERATORS.keys()


def test_a_formula_is_compiled_once():
    one, other = parse("silu(gate) * up"), parse("(silu( gate )*up)")
    assert compile_formula(one) is compile_formula(other)
    assert compile_formula(one) is not compile_formula(parse("silu(gate) * gate"))


def test_equal_inputs_give_equal_bits(typical, make_problem):
    problem = make_problem(typical, torch.bfloat16)
    torch.testing.assert_close(run(problem), run(problem), **EXACT)


def test_a_token_does_not_depend_on_the_others(typical, make_problem):
    problem = make_problem(typical)
    together = run(problem)
    inputs = ("hidden", "scores", "weights", "experts", "modality")
    alone = [run(problem | {name: problem[name][t : t + 1] for name in inputs}) for t in range(5)]
    torch.testing.assert_close(together[:5], torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_an_expert_without_kept_pairs_is_not_read(typical, make_problem, assert_within_budget):
    problem = make_problem(typical._replace(modality="text"), bias=True)
    problem["scores"] = torch.where(problem["experts"] < 3, 0, problem["scores"])
    poisoned = dict(problem)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        poisoned[name] = problem[name].clone()
        poisoned[name][:3] = torch.nan
    assert_within_budget(run(poisoned), problem)


def test_infinite_weights_of_a_dropped_pair_do_not_leak(typical, make_problem, assert_within_budget):
    problem = make_problem(typical)
    keep = Call(**problem).keep()
    infinite = problem | {"weights": torch.where(keep, problem["weights"], torch.inf)}
    assert_within_budget(run(infinite), problem)


def test_a_token_that_is_all_nan_and_dropped_stays_alone(typical, make_problem, assert_within_budget):
    problem = make_problem(typical._replace(modality="text"))
    problem["scores"][3] = 0
    poisoned = problem | {"hidden": problem["hidden"].clone()}
    poisoned["hidden"][3] = torch.nan
    assert_within_budget(run(poisoned), problem)


def test_with_zero_thresholds_nothing_is_dropped(typical, make_problem):
    problem = make_problem(typical) | {"tau_text": 0.0, "tau_vision": 0.0, "alpha_text": 0.0}
    everything_other = problem | {"modality": torch.full_like(problem["modality"], OTHER)}
    torch.testing.assert_close(run(problem), run(everything_other), **EXACT)


def test_never_asks_the_device_for_a_value(case, make_problem, monkeypatch):
    """Meta tensors have no values, so that anything that would wait for the device raises."""
    launched = []
    kernel_type = type(lowering._down_kernel)
    monkeypatch.setattr(kernel_type, "run", lambda self, *_args, **_kwargs: launched.append(self))
    problem = make_problem(case)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in problem.items()}
    assert _cuda(**meta).shape == problem["hidden"].shape
    num_launches = 2 if lowering.is_decode(case.tokens, case.slots) else 6
    assert len(launched) == (num_launches if case.tokens else 0)
