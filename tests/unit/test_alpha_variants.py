"""The meanings of alpha: what pins each to its formula, and to a difference from the others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import ModesError
from modes_fx.modality import OTHER, TEXT, VISION, token_modality
from modes_fx.profile import Profile
from modes_fx.testing import FAMILIES, IMAGE, SPECIAL, VIDEO, tiny_inputs, tiny_qwen3_vl_moe

Batch = dict[str, Tensor]
LAYERS = 3
SAME, OTHERWISE = 1e-4, 1e-3


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=LAYERS)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    """Answers of three tokens and of one, so that what is left out weighs differently."""
    made = []
    for seed, answer in ((0, 3), (1, 1), (2, 2)):
        inputs = tiny_inputs(seed=seed)
        labels = inputs["input_ids"].clone()
        labels[:, :-answer] = -100
        made.append({**inputs, "labels": labels})
    return made


def run(model: Any, batches: list[Batch], variant: Any) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False, variant=variant)


def by_hand(
    model: Any,
    batches: list[Batch],
    modalities: tuple[int, ...],
    *,
    passes_input: bool = False,
    ahead: int = 1,
    special: tuple[int, ...] = tuple(SPECIAL),
) -> list[float]:
    """Of each block the KL at answers, divided by the sum over blocks, by replacing `experts.forward`."""
    kls = []
    for layer in model.model.language_model.layers:
        total, tokens = 0.0, 0
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            kind = token_modality(inputs["input_ids"], (IMAGE, VIDEO), special).flatten()
            hit = torch.isin(kind, torch.tensor(modalities))[:, None]
            experts = layer.mlp.experts
            forward = experts.forward

            def partly(
                hidden: Any, index: Any, weights: Any, forward: Any = forward, hit: Any = hit
            ) -> Tensor:
                return torch.where(hit, hidden if passes_input else 0.0, forward(hidden, index, weights))

            with torch.no_grad():
                original = model(**inputs).logits
                experts.forward = partly
                skipped = model(**inputs).logits
                del experts.forward
            log_p, log_q = original.double().log_softmax(-1), skipped.double().log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            answers = batch["labels"][:, ahead:] != -100
            total += float(kl[:, : kl.shape[1] - ahead][answers].sum())
            tokens += int(answers.sum())
        kls.append(total / tokens)
    return [kl / sum(kls) for kl in kls]


def alphas(profile: Profile) -> tuple[list[float], list[float]]:
    return [layer.alpha_text for layer in profile.layers], [layer.alpha_vision for layer in profile.layers]


def test_by_modality_drops_the_tokens_of_one_and_compares_every_answer_token(model, batches):
    text, vision = alphas(run(model, batches, "modality"))
    assert text == pytest.approx(by_hand(model, batches, (TEXT,)), rel=SAME)
    assert vision == pytest.approx(by_hand(model, batches, (VISION,)), rel=SAME)
    assert text != pytest.approx(vision, rel=OTHERWISE)


def test_the_papers_alpha_drops_text_and_vision_together_and_is_one_for_both(model, batches):
    text, vision = alphas(run(model, batches, "paper"))
    assert text == vision
    both = by_hand(model, batches, (TEXT, VISION))
    assert text == pytest.approx(both, rel=SAME)
    for other in alphas(run(model, batches, "modality")):
        assert text != pytest.approx(other, rel=OTHERWISE)


def test_special_tokens_keep_their_experts(model, batches):
    special = (*SPECIAL, *range(8, 60))
    profile = calibrate(model, batches, special_token_ids=special, variant="paper", progress=False)
    text, _ = alphas(profile)
    assert text == pytest.approx(by_hand(model, batches, (TEXT, VISION), special=special), rel=SAME)
    assert text != pytest.approx(by_hand(model, batches, (TEXT, VISION, OTHER)), rel=OTHERWISE)


def test_the_papers_code_passes_the_experts_input_on_and_compares_from_the_first_answer_token(model, batches):
    profile = run(model, batches, "modes-code")
    assert profile.method == "modes-code"
    text, vision = alphas(profile)
    assert sum(text) == pytest.approx(1) and sum(vision) == pytest.approx(1)
    assert text == pytest.approx(by_hand(model, batches, (TEXT,), passes_input=True, ahead=0), rel=SAME)
    assert vision == pytest.approx(by_hand(model, batches, (VISION,), passes_input=True, ahead=0), rel=SAME)
    # Either difference alone shows.
    for passes_input, ahead in ((False, 0), (True, 1), (False, 1)):
        other = by_hand(model, batches, (TEXT,), passes_input=passes_input, ahead=ahead)
        assert text != pytest.approx(other, rel=OTHERWISE)


@pytest.mark.parametrize("variant", ["modality", "paper", "modes-code"])
def test_a_variant_is_the_same_with_and_without_reuse(model, batches, variant):
    given: dict[str, Any] = {"special_token_ids": SPECIAL, "progress": False, "variant": variant}
    assert calibrate(model, batches, **given) == calibrate(model, batches, reuse=False, **given)


def test_an_answer_of_one_token_counts_in_the_papers_code_at_its_own_position(model, batches):
    """At the last position of a row there are logits, which predict nothing; the code compares them."""
    only = [{**batches[1]}]
    assert int((only[0]["labels"] != -100).sum()) == 1
    text, _ = alphas(run(model, only, "modes-code"))
    assert text == pytest.approx(by_hand(model, only, (TEXT,), passes_input=True, ahead=0), rel=SAME)


@pytest.mark.parametrize("variant", ["modality", "modes-code"])
def test_shared_experts_stay_for_dropped_tokens(variant):
    family = FAMILIES["llava+qwen2_moe"]
    model = family.build()
    inputs = family.inputs("picture")
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    batch = [{**inputs, "labels": labels}]
    text, _ = alphas(run(model, batch, variant))
    code = variant == "modes-code"
    # By hand only the routed experts give way.
    assert all(hasattr(layer.mlp, "shared_expert") for layer in model.model.language_model.layers)
    assert text == pytest.approx(by_hand(model, batch, (TEXT,), passes_input=code, ahead=1 - code), rel=SAME)


def test_experts_that_are_not_given_rows_of_tokens_are_refused_by_the_papers_code():
    family = FAMILIES["llama4"]
    inputs = family.inputs("picture")
    with pytest.raises(ModesError, match="is given each token once for each expert; use another variant"):
        run(family.build(), [{**inputs, "labels": inputs["input_ids"].clamp(max=90)}], "modes-code")
