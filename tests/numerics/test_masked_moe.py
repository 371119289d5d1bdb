"""The CPU lowering of `masked_moe` against the specification, and the op against what torch asks of one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modes_fx.kernels.masked_moe import (
    OTHER,
    TEXT,
    VISION,
    Call,
    _cpu,
    keep_mask,
    kept_weights,
    masked_moe,
    reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = {"rtol": 0, "atol": 0}
FORMULAS = [f"{name}(gate) * up" for name in ("silu", "gelu", "gelu_tanh", "relu")]


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_reads_every_layout(typical, bias, interleaved, is_transposed, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=bias, interleaved=interleaved, is_transposed=is_transposed)
    assert_within_budget(masked_moe(**problem), problem)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("activation", FORMULAS)
def test_applies_every_activation(typical, activation, renormalise, make_problem, assert_within_budget):
    problem = make_problem(typical, activation=activation, renormalise=renormalise)
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
        _cpu(**problem)
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
    names = ["hidden", "scores", "weights", "experts", "modality"]
    names += ["gate_up", "down", "gate_up_bias", "down_bias"]
    args = tuple(problem.pop(name) for name in names)
    torch.library.opcheck(masked_moe, args, problem)


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


def test_the_reference_weighs_each_slot_by_its_own_weight():
    # Two experts that return 1 and 10 times the input: 2 = 1 * w[0], 30 = 10 * w[1].
    gate_up = torch.tensor([[[1.0], [1.0]], [[10.0], [1.0]]])
    out = reference(
        hidden=torch.ones(1, 1),
        scores=torch.ones(1, 2),
        weights=torch.tensor([[2.0, 3.0]]),
        experts=torch.tensor([[0, 1]]),
        modality=None,
        gate_up=gate_up,
        down=torch.ones(2, 1, 1),
        alpha_text=1.0,
        alpha_vision=1.0,
        tau_text=0.0,
        tau_vision=0.0,
        activation="relu(gate) * up",
    )
    assert out.item() == 32
