"""The Triton lowering of `masked_moe`, interpreted, or compiled with `TRITON_INTERPRET=0` and a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import moe
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from modes_fx.kernels import _masked_moe_triton as lowering
from modes_fx.kernels._gate_formula_triton import STEPS, compile_formula
from modes_fx.kernels._masked_moe_tiles import TABLE, is_decode, max_tiles
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
            with monkeypatch.context() as patch:
                patch.setattr(lowering, "is_decode", lambda *_: False)
                yield run(problem)

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


def test_matches_the_reference_in_bfloat16(case, make_problem, assert_within_budget, run_both_ways):
    problem = make_problem(case, torch.bfloat16)
    for result in run_both_ways(problem):
        assert_within_budget(result, problem)


def test_matches_the_reference_in_float16(typical, make_problem, assert_within_budget):
    problem = make_problem(typical, torch.float16)
    assert_within_budget(run(problem), problem)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("some", {}),
        ("some", {"interleaved": True, "bias": True}),
        ("many", {"interleaved": True, "is_transposed": True}),
        ("odd", {"weights_on_input": True}),
        ("float32", {"activation": "square(relu(x))"}),
    ],
    ids=["some", "some-interleaved", "many", "odd", "float32"],
)
def test_tiles_of_every_width(kind, flags, small, make_problem, assert_within_budget, monkeypatch):
    """Experts with as many pairs as a width, with one more, and with one."""
    tiles = TABLE[kind, 90]
    monkeypatch.setattr(lowering, "choose_tiles", lambda *_: tiles)
    widths = tiles.gate_up.widths
    num_pairs = torch.tensor([1, *widths, *(width + 1 for width in widths)])
    tokens, experts = int(num_pairs.max()), len(num_pairs)
    case = small._replace(tokens=tokens, slots=experts, experts=experts, hidden=16, intermediate=16)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    problem = make_problem(case._replace(modality=None), dtype, **flags)
    problem["experts"] = torch.arange(experts).expand(tokens, experts)
    problem["scores"] = (torch.arange(tokens)[:, None] < num_pairs).float()
    assert Call(**problem).keep().sum(dim=0).tolist() == num_pairs.tolist()
    assert_within_budget(run(problem), problem)


@pytest.mark.parametrize("weights_on_input", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_an_expert_in_several_slots_of_a_token_counts_as_often(
    weights_on_input, renormalise, small, make_problem, assert_within_budget, run_both_ways
):
    flags = {"weights_on_input": weights_on_input, "renormalise": renormalise, "bias": True}
    problem = make_problem(small._replace(slots=4), **flags)
    problem["experts"] = torch.tensor([[1, 1, 0, 1], [2, 2, 2, 2], [0, 3, 3, 0]]).repeat(3, 1)
    for result in run_both_ways(problem):
        assert_within_budget(result, problem)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_offsets_past_32_bits(is_transposed, small, make_problem, assert_within_budget, run_both_ways):
    """Views that stretch over 4 GiB of address space, of which they touch a few pages."""
    problem = make_problem(small, torch.float16, is_transposed=is_transposed, bias=True)
    views = dict(problem)
    # Not filled with NaN, which would touch all of it.
    torch.use_deterministic_algorithms(False)
    space = torch.empty(2**31 + 2**20, dtype=torch.float16)
    start = 0
    for name in ("hidden", "gate_up", "down", "gate_up_bias", "down_bias"):
        x = problem[name]
        far = 2**31 // (len(x) - 1) + 1
        assert far * (len(x) - 1) >= 2**31
        views[name] = space.as_strided(x.shape, (far, *x.stride()[1:]), start).copy_(x)
        start += x[0].numel() + 64  # the last rows are up to 8 further apart than the first
    torch.use_deterministic_algorithms(True)
    for result in run_both_ways(views):
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


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_launches_no_more_than_the_unmodified_experts(experts, typical, launched, make_problem):
    """Operators of transformers' experts, each at least a launch, behind the same top-k.

    Uncompiled: 9 of batched_mm, as in decode, against 2; 16 of grouped_mm, as in prefill, against 6.
    """
    problem = make_problem(typical, torch.bfloat16)
    run(problem)
    module = SimpleNamespace(
        gate_up_proj=problem["gate_up"],
        down_proj=problem["down"],
        num_experts=typical.experts,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        _apply_gate=lambda y: F.silu(y.chunk(2, dim=-1)[0]) * y.chunk(2, dim=-1)[1],
    )
    with CountOperators() as theirs:
        forward = getattr(moe, f"{experts}_experts_forward")
        forward(module, problem["hidden"], problem["experts"], problem["weights"])
    assert len(launched) < theirs.num


class CountOperators(TorchDispatchMode):
    """Counts operators that compute something."""

    num = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        allocates = op in (torch.ops.aten.empty_like.default, torch.ops.aten.detach.default)
        self.num += not (op.is_view or allocates)
        return op(*args, **(kwargs or {}))


def test_launches_the_same_whatever_is_dropped(typical, launched, make_problem):
    """As a CUDA graph needs it: kernels and grids follow from shapes."""
    problem = make_problem(typical)
    grids = []
    for tau in (0.0, 0.2, torch.inf):
        launched.clear()
        run(problem | {"tau_text": tau, "tau_vision": tau})
        grids.append(list(launched))
    assert grids[0] == grids[1] == grids[2]


@pytest.fixture
def launched(monkeypatch):
    """Names and grids of what is launched, in order."""
    names = []
    kernel_type = type(lowering._down_kernel)
    launch = kernel_type.run

    def note(self, *args, grid, **kwargs):
        names.append((self.fn.__name__, grid))
        return launch(self, *args, grid=grid, **kwargs)

    monkeypatch.setattr(kernel_type, "run", note)
    return names


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
