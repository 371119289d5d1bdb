"""Estimates of alpha: against derivatives by hand, against the exact alpha, and what they leave behind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modes_fx.batches import batch_digest
from modes_fx.blocks import find_blocks
from modes_fx.calibration.alpha_exact import VARIANTS, Task
from modes_fx.calibration.alpha_taylor import ESTIMATES, _cotangent, measure_taylor, rank_correlation
from modes_fx.calibration.calibrate import calibrate
from modes_fx.calibration.distributed import Share
from modes_fx.calibration.state import Journal, State
from modes_fx.errors import ModesError
from modes_fx.measure import answer_logits, evaluating
from modes_fx.modality import TEXT, VISION, token_modality
from modes_fx.profile import Profile
from modes_fx.progress import Bar
from modes_fx.testing import FAMILIES, IMAGE, SPECIAL, VIDEO, set_experts, tiny_inputs, tiny_qwen3_vl_moe

LAYERS = 4


def labelled(inputs: dict[str, Any]) -> dict[str, Any]:
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


def run(model: Any, batches: list[Any], method: Any = "exact", **given: Any) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False, method=method, **given)


def alphas(profile: Profile) -> tuple[list[float], list[float]]:
    return [layer.alpha_text for layer in profile.layers], [layer.alpha_vision for layer in profile.layers]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=LAYERS)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return [labelled(tiny_inputs(batch=4, seed=seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def exact(model, batches) -> Profile:
    return run(model, batches)


def one_batch(model: Any, batch: dict[str, Any], method: Any) -> list[list[float]]:
    """The sums of each block for text and vision, not normalised."""
    blocks = find_blocks(model)
    ids = ((IMAGE, VIDEO), SPECIAL)
    share = Share(0, tuple(range(len(blocks))))
    task = Task(model, blocks, ids, VARIANTS["modality"], [share], [batch_digest(batch)])
    journal = Journal(None, State.fresh({}, len(blocks), 2))
    with evaluating(model):
        measure_taylor(task, [batch], journal, Bar(), method)
    return journal.state.kl_sums


@pytest.fixture(scope="module")
def precise() -> tuple[Any, dict[str, Any]]:
    inputs = tiny_inputs(batch=2)
    batch = {**labelled(inputs), "pixel_values": inputs["pixel_values"].double()}
    model = tiny_qwen3_vl_moe(dtype=torch.float64)
    set_experts(model, "eager")
    return model, batch


@pytest.mark.parametrize("modality", [TEXT, VISION])
def test_the_gate_estimate_is_that_of_a_gate_on_the_routed_output(precise, modality):
    model, batch = precise
    kind = token_modality(batch["input_ids"], (IMAGE, VIDEO), SPECIAL).flatten()
    with torch.no_grad():
        logits = answer_logits(model, batch)
    back = _cotangent(logits, batch, "taylor-gate", seed=0)
    found = one_batch(model, batch, "taylor-gate")
    for layer, sums in zip(model.model.language_model.layers, found, strict=True):
        sides = []
        for step in (-0.01, 0.01):
            gate = 1 + step * (kind == modality).double()[:, None]
            handle = layer.mlp.experts.register_forward_hook(lambda m, args, y, gate=gate: y * gate)
            with torch.no_grad():
                sides.append(answer_logits(model, batch))
            handle.remove()
        # Per answer token, then per row: three answer tokens each.
        felt = (back * (sides[1] - sides[0]) / 0.02).sum(-1).view(2, 3).sum(1)
        assert sums[modality] == pytest.approx(float((felt**2).sum() / 2), rel=0.01, abs=1e-9)


def test_the_estimate_is_that_of_a_change_of_any_direction_in_each_token(precise):
    model, batch = precise
    kind = token_modality(batch["input_ids"], (IMAGE, VIDEO), SPECIAL).flatten()
    outputs: list[Tensor] = []

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_() if not outputs else output)
        if len(outputs) > 1:
            outputs[-1].retain_grad()
        return outputs[-1]

    handles = [layer.mlp.experts.register_forward_hook(hook) for layer in model.model.language_model.layers]
    logits = answer_logits(model, batch)
    logits.backward(_cotangent(logits.detach(), batch, "taylor", seed=0))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    found = one_batch(model, batch, "taylor")
    for output, sums in zip(outputs, found, strict=True):
        assert output.grad is not None
        each = output.grad.norm(dim=-1) * output.detach().norm(dim=-1)
        assert sums == pytest.approx([float(each[kind == m].sum()) for m in (TEXT, VISION)], rel=1e-4)


def test_random_vectors_have_the_fisher_matrix_for_covariance():
    logits = torch.tensor([[1.0, 0.0, -1.0, 3.0]]).expand(50_000, 4)
    drawn = _cotangent(logits, {}, "taylor", seed=0).double()
    p = logits[0].double().softmax(-1)
    fisher = p.diag() - p[:, None] * p
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), fisher, atol=0.01, rtol=0)
    assert not torch.equal(drawn.float(), _cotangent(logits, {}, "taylor", seed=1))


def test_the_loss_estimate_goes_back_from_the_answers_own_loss(precise):
    _, batch = precise
    logits = torch.randn(6, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    answers = batch["labels"][:, 1:][batch["labels"][:, 1:] != -100]
    torch.nn.functional.cross_entropy(logits, answers, reduction="sum").backward()
    found = _cotangent(logits.detach(), batch, "taylor-loss", seed=0)
    torch.testing.assert_close(found, logits.grad)


@pytest.mark.parametrize("method", ESTIMATES)
def test_an_estimate_makes_a_whole_profile_of_its_own_name(model, batches, method):
    model.train()
    before = [parameter.requires_grad for parameter in model.parameters()]
    profile = run(model, batches, method)
    assert model.training
    model.eval()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())
    text, vision = alphas(profile)
    assert sum(text) == pytest.approx(1) and sum(vision) == pytest.approx(1)
    assert min(text) > 0
    # Nothing of the last block's vision tokens reaches an answer.
    assert vision[-1] == 0.0 and min(vision[:-1]) > 0
    assert profile.method == f"modality, {method}"
    assert [layer.weight_scale for layer in profile.layers] == [1.0] * LAYERS


def test_the_default_estimate_ranks_blocks_as_the_exact_alpha_does(model, batches, exact):
    estimated = alphas(run(model, batches, "taylor"))
    for ours, theirs in zip(estimated, alphas(exact), strict=True):
        assert rank_correlation(ours, theirs) >= 0.8


def test_it_works_in_bfloat16(batches):
    model = tiny_qwen3_vl_moe(num_layers=LAYERS, dtype=torch.bfloat16)
    exact, estimated = alphas(run(model, batches)), alphas(run(model, batches, "taylor"))
    assert rank_correlation(estimated[0], exact[0]) >= 0.8
    assert rank_correlation(estimated[1], exact[1]) >= 0.8


@pytest.mark.parametrize("name", ["ernie4_5_vl_moe", "llama4", "granitemoehybrid", "mixtral"])
@pytest.mark.parametrize("method", ESTIMATES)
def test_other_families_are_estimated_too(name, method):
    family = FAMILIES[name]
    text, _ = alphas(run(family.build(), [labelled(family.inputs("batch"))], method))
    assert sum(text) == pytest.approx(1) and len(set(text)) > 1


def test_one_alpha_for_both_modalities_counts_all_their_tokens(precise):
    model, batch = precise
    profile = run(model, [batch], "taylor", variant="paper")
    text, vision = alphas(profile)
    sums = [sum(row) ** 2 for row in one_batch(model, batch, "taylor")]
    assert text == vision == pytest.approx([value / sum(sums) for value in sums])


def test_a_check_prints_the_rank_correlation_with_the_exact_alpha(model, batches, capsys):
    profile = run(model, batches, "taylor", check=5)
    printed = capsys.readouterr().err
    exact = run(model, batches[:2])
    found = [rank_correlation(*pair) for pair in zip(alphas(profile), alphas(exact), strict=True)]
    expected = f"of 8 samples: text {found[0]:.3f}, vision {found[1]:.3f}."
    assert printed == f"Rank correlation with the exact alpha {expected}\n"


def test_a_killed_estimate_resumes_to_the_same(tmp_path, model, batches):
    resume = tmp_path / "resume.json"
    assert run(model, batches[:2], "taylor", resume=resume) == run(model, batches[:2], "taylor")
    assert run(model, batches, "taylor", resume=resume) == run(model, batches, "taylor")
    with pytest.raises(ModesError, match="another calibration: method differs"):
        run(model, batches, "exact", resume=resume)


def test_what_is_not_estimated_is_refused(model, batches):
    with pytest.raises(ModesError, match=r"modes-code. is only measured, not estimated; use method=.exact."):
        run(model, batches, "taylor", variant="modes-code")
    with pytest.raises(
        ModesError, match="method must be one of exact, taylor, taylor-gate, taylor-loss, got"
    ):
        run(model, batches, "guess")


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 300]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [3, 2, 1]) == 0
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
