"""The shipped model at a wanted skip rate, without a search: what `bench/export_*.py` export."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modes_fx import demo
from modes_fx.aot.loaded import ExportedModel
from modes_fx.blocks import find_blocks
from modes_fx.calibration.calibrate import token_ids
from modes_fx.modality import OTHER
from modes_fx.profile import Layer, Profile, fingerprint
from modes_fx.skipping import Counts, simulate

MAX_NEW_TOKENS = 8
RATES = (0.0, 0.5, 0.83, 1.0)
TOLERANCE = 0.005


def profile_at(model: Any, processor: Any, rate: float, calls: Sequence[Mapping[str, Tensor]]) -> Profile:
    """A profile of equal alphas that drops the part `rate` of all pairs of these very calls, to `TOLERANCE`.

    Special tokens keep their pairs, which count. At 1, all pairs that may be skipped are dropped.
    """
    if rate in (0, 1):
        return equal_profile(model, processor, 0.0 if rate == 0 else float("inf"), rate)
    low, high = 0.0, 1.0
    while high - low > 1e-7:
        profile = equal_profile(model, processor, (low + high) / 2, rate)
        measured = measured_skip(model, profile, calls).skip()
        if abs(measured - rate) <= TOLERANCE / 2:
            return profile
        low, high = (low, profile.tau_text) if measured > rate else (profile.tau_text, high)
    raise RuntimeError(f"No threshold drops {rate} of the pairs; around {low} it jumps over it.")


@torch.no_grad()
def measured_skip(model: Any, profile: Profile, calls: Sequence[Mapping[str, Tensor]]) -> Counts:
    """What the profile drops of these calls in the eager model."""
    with simulate(model, profile) as counts:
        for inputs in calls:
            model(**inputs)
    return counts


def of_skippable(counts: Counts) -> float:
    """The part that is dropped of the pairs that may be."""
    return int(counts.dropped.sum()) / int(counts.pairs[:, :OTHER].sum())


def equal_profile(model: Any, processor: Any, tau: float, rate: float) -> Profile:
    """Alpha 1 everywhere, and both thresholds `tau`."""
    visual, special = token_ids(model, processor)
    layers = tuple(
        Layer(block.name, 1.0, 1.0, block.num_experts, block.top_k, fingerprint(block.router_weight))
        for block in find_blocks(model)
    )
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    return Profile(layers, tau, tau, visual, special, vocabulary, hidden, target_skip=rate)


def examples(rows: int = 2) -> list[dict[str, Tensor]]:
    """Inputs to trace with, of so many rows: pictures of both sizes that the suite has."""
    batches = demo.batches("calibration", 26, batch_size=rows)
    return [dict(batches[0].inputs), dict(batches[-1].inputs)]


@torch.no_grad()
def answers_like(
    model: Any, profile: Profile, program: ExportedModel, questions: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """An exported model beside the eager one, on the CPU, with dropped pairs at weight zero.

    Gives the largest difference of a logit, and how many greedy answers are the same to the token.
    """
    furthest, same = 0.0, 0
    for inputs in questions:
        given: Any = inputs
        with simulate(model, profile):
            want = model(**given).logits
            tokens = model.generate(**given, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        furthest = max(furthest, float((program(**given).logits - want).abs().max()))
        answer = tokens[:, inputs["input_ids"].shape[1] :]
        same += program.generate(max_new_tokens=MAX_NEW_TOKENS, **given).tolist() == answer.tolist()
    return {"max_difference": furthest, "same_answers": same}
