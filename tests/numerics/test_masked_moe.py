"""The CPU lowerings of `masked_moe` against the specification, and the op against what torch asks of one."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modes_fx.kernels._masked_moe_torch import masked_moe_torch
from modes_fx.kernels.masked_moe import (
    OTHER,
    TEXT,
    VISION,
    Call,
    keep_mask,
    kept_weights,
    masked_moe,
    reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = {"rtol": 0, "atol": 0}
TENSORS = [field.name for field in dataclasses.fields(Call) if not field.kw_only]


# The keep rule.


def test_a_pair_on_the_threshold_is_kept():
    scores = torch.tensor([[0.5, 0.25, 0.125]])
    keep = keep_mask(scores, None, 0.5, 1.0, 0.125, 1.0)
    assert keep.tolist() == [[True, True, False]]


def test_the_comparison_is_in_float32():
    # 0.1 * 0.3 lies below its own float32 rounding, so comparing in float64 would drop this pair.
    scores = torch.tensor([[0.1]], dtype=torch.float32)
    tau = (scores * 0.3).item()
    assert scores.double().item() * 0.3 < tau
    assert keep_mask(scores, None, 0.3, 0.3, tau, tau).item()
    assert keep_mask(scores.double(), None, 0.3, 0.3, tau, tau).item()


def test_each_modality_has_its_own_threshold():
    scores = torch.full((3, 1), 0.5)
    modality = torch.tensor([TEXT, VISION, OTHER], dtype=torch.uint8)
    assert keep_mask(scores, modality, 1.0, 1.0, 0.4, 0.6).flatten().tolist() == [True, False, True]
    assert keep_mask(scores, modality, 1.0, 1.0, 0.6, 0.4).flatten().tolist() == [False, True, True]


def test_an_infinite_threshold_keeps_only_other_tokens():
    modality = torch.tensor([TEXT, VISION, OTHER], dtype=torch.uint8)
    keep = keep_mask(torch.ones(3, 2), modality, 1.0, 1.0, torch.inf, torch.inf)
    assert keep.tolist() == [[False] * 2, [False] * 2, [True] * 2]


def test_a_zero_threshold_keeps_everything_even_with_alpha_zero():
    scores = torch.tensor([[1.0, 0.0, 1e-45]])
    modality = torch.tensor([TEXT], dtype=torch.uint8)
    for alpha in (0.0, 1.0):
        assert keep_mask(scores, modality, alpha, alpha, 0.0, 0.0).all()


def test_kept_weights_are_not_renormalised_unless_asked():
    weights, keep = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[True, True, False]])
    assert kept_weights(weights, keep, False).tolist() == [[0.5, 0.25, 0]]
    torch.testing.assert_close(kept_weights(weights, keep, True), torch.tensor([[2 / 3, 1 / 3, 0]]))
    assert kept_weights(weights, torch.zeros_like(keep), True).tolist() == [[0, 0, 0]]


# The lowering.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(case, dtype, make_problem, assert_within_budget):
    problem = make_problem(case, dtype)
    assert_within_budget(masked_moe(**problem), problem)
    assert_within_budget(masked_moe_torch(Call(**problem)), problem)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_reads_every_layout(typical, bias, interleaved, is_transposed, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=bias, interleaved=interleaved, is_transposed=is_transposed)
    assert_within_budget(masked_moe(**problem), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_computes_every_kind_of_expert(small, layout, dtype, make_problem, assert_within_budget):
    problem = make_problem(small, dtype, **layout)
    assert_within_budget(masked_moe(**problem), problem)
    assert_within_budget(masked_moe_torch(Call(**problem)), problem)


def test_a_kept_pair_of_weight_zero_still_has_its_biases(typical, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=True, weights_on_input=True)
    problem["weights"] = torch.zeros_like(problem["weights"])
    assert_within_budget(masked_moe(**problem), problem)


def test_equal_inputs_give_equal_bits(typical, make_problem):
    problem = make_problem(typical, torch.bfloat16)
    torch.testing.assert_close(masked_moe(**problem), masked_moe(**problem), **EXACT)


def test_with_zero_thresholds_nothing_is_dropped(typical, make_problem):
    zero = {"tau_text": 0.0, "tau_vision": 0.0}
    problem = make_problem(typical) | zero
    everything_other = problem | {"modality": torch.full_like(problem["modality"], OTHER)}
    torch.testing.assert_close(masked_moe(**problem), masked_moe(**everything_other), **EXACT)


def test_dropped_pairs_are_not_multiplied(case, make_problem):
    problem = make_problem(case)
    rows = []

    class CountRows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in func.name() for word in ("mm", "matmul", "linear", "einsum")):
                rows.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    # A mode sees the op itself, not what is inside; so the lowering is called.
    with CountRows():
        masked_moe_torch(Call(**problem))
    assert sum(rows) == 2 * Call(**problem).keep().sum()  # gate_up and down


def test_an_expert_without_kept_pairs_is_not_read(typical, make_problem, assert_within_budget):
    problem = make_problem(typical._replace(modality="text"), bias=True)
    problem["scores"] = torch.where(problem["experts"] < 3, 0, problem["scores"])
    poisoned = dict(problem)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        poisoned[name] = problem[name].clone()
        poisoned[name][:3] = torch.nan
    assert_within_budget(masked_moe(**poisoned), problem)


def test_infinite_weights_of_a_dropped_pair_do_not_leak(typical, make_problem, assert_within_budget):
    problem = make_problem(typical)
    keep = Call(**problem).keep()
    infinite = problem | {"weights": torch.where(keep, problem["weights"], torch.inf)}
    assert_within_budget(masked_moe(**infinite), problem)


# The op.


@pytest.mark.parametrize("flags", [{}, {"bias": True, "is_transposed": True, "renormalise": True}])
def test_passes_every_opcheck(case, flags, make_problem):
    problem = make_problem(case, **flags)
    args = tuple(problem.pop(name) for name in TENSORS)
    torch.library.opcheck(masked_moe, args, problem)


def test_every_kind_of_expert_passes_every_opcheck(small, layout, make_problem):
    problem = make_problem(small, **layout)
    args = tuple(problem.pop(name) for name in TENSORS)
    torch.library.opcheck(masked_moe, args, problem)


def test_the_schema_lists_the_fields_of_a_call():
    fields, arguments = dataclasses.fields(Call), masked_moe._schema.arguments
    assert [(f.name, f.kw_only) for f in fields] == [(a.name, a.kwarg_only) for a in arguments]
    for f, a in zip(fields, arguments, strict=True):
        if a.has_default_value():
            assert f.default == a.default_value, f.name


def test_compiles_to_one_graph_for_every_number_of_tokens(typical, make_problem):
    graphs = []

    def keep_graph(gm, _inputs):
        graphs.append(gm)
        return gm

    @torch.compile(fullgraph=True, dynamic=True, backend=keep_graph)
    def block(problem):
        return masked_moe(**problem)

    for tokens in (33, 5, 70):
        # The thresholds are constants of the graph; everything else may change.
        problem = make_problem(typical._replace(tokens=tokens)) | {"tau_text": 0.3, "tau_vision": 0.2}
        torch.testing.assert_close(block(problem), masked_moe(**problem), **EXACT)
    assert len(graphs) == 1


def test_inductor_runs_it(typical, make_problem):
    problem = make_problem(typical, is_transposed=True)
    compiled = torch.compile(lambda **inputs: masked_moe(**inputs) + 1, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(**problem), masked_moe(**problem) + 1, **EXACT)


def test_refuses_the_modality_of_another_call(typical, make_problem):
    problem = make_problem(typical)
    with pytest.raises(ValueError, match="modality must have one value per token, 33, got"):
        masked_moe(**problem | {"modality": problem["modality"][:-1]})


def test_refuses_what_is_no_formula(typical, make_problem):
    with pytest.raises(
        ValueError, match=r"'swish\(gate\)' is not allowed, in the formula 'swish\(gate\) \* up'"
    ):
        masked_moe(**make_problem(typical) | {"activation": "swish(gate) * up"})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"weights": torch.ones(33, 3)}, r"weights and experts must be \[T, K\], .*'weights': \(33, 3\)"),
        (
            {"activation": "relu(x)"},
            r"gate_up must be \(8, 16, 32\), got \(8, 32, 32\): .* one row",
        ),
        (
            {"gate_up": torch.ones(8, 16, 32)},
            r"gate_up must be \(8, 32, 32\), got \(8, 16, .* two rows",
        ),
        ({"is_transposed": True}, r"gate_up must be \(8, 32, 64\).*transposed"),
        ({"hidden": torch.ones(33, 31)}, "hidden is 31 wide"),
        ({"gate_up_bias": torch.ones(8, 16)}, r"gate_up_bias must be \(8, 32\), got \(8, 16\)"),
        ({"down_bias": torch.ones(1, 32)}, r"down_bias must be \(8, 32\), got \(1, 32\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(wrong, message, typical, make_problem):
    with pytest.raises(ValueError, match=message):
        masked_moe(**make_problem(typical) | wrong)


@pytest.mark.parametrize(
    "flags, result",
    [
        # Experts that return the square of 1 and of 10 times their input.
        ({}, 2 * 1**2 + 3 * 10**2),
        ({"weights_on_input": True}, (2 * 1) ** 2 + (3 * 10) ** 2),
    ],
)
def test_the_reference_weighs_each_slot_by_its_own_weight(flags, result):
    out = reference(
        hidden=torch.ones(1, 1),
        scores=torch.ones(1, 2),
        weights=torch.tensor([[2.0, 3.0]]),
        experts=torch.tensor([[0, 1]]),
        modality=None,
        gate_up=torch.tensor([[[1.0]], [[10.0]]]),
        down=torch.ones(2, 1, 1),
        alpha_text=1.0,
        alpha_vision=1.0,
        tau_text=0.0,
        tau_vision=0.0,
        activation="square(x)",
        **flags,
    )
    assert out.item() == result
