"""The shipped model, compiled, gives what the oracle gives, in prefill and at each step of decode."""

import copy
import dataclasses

import pytest
import torch

import modes_fx
from modes_fx import demo
from modes_fx.calibration.calibrate import token_ids
from modes_fx.testing import tiny_profile

ATOL = 1e-4


@pytest.fixture(scope="module")
def loaded():
    model, processor = demo.load()
    profile = tiny_profile(model)
    _, special = token_ids(model, processor=processor)
    # As calibration finds it: what the last layer's experts make of a picture reaches no answer.
    last = dataclasses.replace(profile.layers[-1], alpha_vision=0.0)
    return model, dataclasses.replace(profile, layers=(*profile.layers[:-1], last), special_token_ids=special)


@pytest.mark.parametrize("skip", [0.0, 0.5, 0.83, 1.0])
@torch.no_grad()
def test_prefill_and_sixteen_tokens_equal_the_oracle(skip, loaded, oracle, thresholds_at):
    original, profile = loaded
    model = copy.deepcopy(original)
    batch = demo.batches("test", 13)[0].inputs
    profile = thresholds_at(model, profile, batch, skip)
    with_picture, _ = demo.question("test", 0)
    without, _ = demo.question("test", 1, picture=False)
    options = {
        **{"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False},
        **{"output_logits": True, "return_dict_in_generate": True},
    }
    truth = oracle(model, profile)
    with truth():
        want_batch = model(**batch).logits
        assert truth.skip == pytest.approx(skip * (1 - special_share(batch, profile)), abs=0.03)
        wanted = [model.generate(**inputs, **options) for inputs in (with_picture, without)]
    # Whole and through Inductor once; the vision tower has no experts and takes longer than all the rest.
    backend = modes_fx.backend(profile, lowering="inductor" if skip == 0.83 else "eager")
    if skip != 0.83:
        tower = model.get_encoder("image")
        tower.forward = torch.compiler.disable(tower.forward)
    model.compile(backend=backend)
    torch.testing.assert_close(model(**batch).logits, want_batch, atol=ATOL, rtol=0)
    for inputs, want in zip((with_picture, without), wanted, strict=True):
        got = model.generate(**inputs, **options)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=ATOL, rtol=0)
        assert torch.equal(got.sequences, want.sequences)
    # One call for the batch, and sixteen for each generate(): every layer ran rewritten in all of them.
    assert backend.run.executed == [33] * len(profile.layers)


def special_share(batch: dict[str, torch.Tensor], profile: modes_fx.Profile) -> float:
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(profile.special_token_ids))
    return float((special & ~torch.isin(ids, torch.tensor(profile.visual_token_ids))).float().mean())
