"""The compiled model gives the logits of the unedited one with dropped pairs at weight zero, everywhere."""

import pytest
import torch

import modes_fx
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

ATOL = 1e-4
CALLS = [
    tiny_inputs(),
    tiny_inputs(grid=None),
    tiny_inputs(text=15, grid=(4, 8), seed=1),
    tiny_inputs(batch=2, seed=4),
]


def compile_model(how: str, model: torch.nn.Module, backend: modes_fx.Backend) -> torch.nn.Module:
    if how == "torch.compile(model)":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    if how == "language model":
        model.model.language_model.compile(backend=backend)  # type: ignore[union-attr,operator]
    else:
        model.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    ("how", "skip"),
    [
        ("torch.compile(model)", 0.5),
        ("model.compile()", 0.83),
        ("language model", 1.0),
    ],
)
@torch.no_grad()
def test_with_and_without_a_picture_at_several_lengths(how, skip, oracle, thresholds_at):
    model = tiny_qwen3_vl_moe()
    profile = thresholds_at(model, tiny_profile(model), CALLS[0], skip)
    # Whole models take long to trace, for the vision tower's many graph breaks.
    calls = CALLS if how == "language model" else CALLS[:2]
    wanted = []
    truth = oracle(model, profile)
    for inputs in calls:
        with truth():
            wanted.append(model(**inputs).logits)
        assert truth.skip > 0
    backend = modes_fx.backend(profile, lowering="eager")
    compiled = compile_model(how, model, backend)
    for number, (inputs, want) in enumerate(zip(calls, wanted, strict=True), start=1):
        torch.testing.assert_close(compiled(**inputs).logits, want, atol=ATOL, rtol=0)
        assert backend.run.executed == [number] * len(profile.layers)


@pytest.mark.parametrize("how", ["model.compile()", "language model"])
@pytest.mark.parametrize("grid", [(4, 4), None], ids=["picture", "text"])
@torch.no_grad()
def test_each_step_of_generate(how, grid, oracle, thresholds_at):
    model = tiny_qwen3_vl_moe()
    inputs = tiny_inputs(grid=grid)
    profile = thresholds_at(model, tiny_profile(model), tiny_inputs(), 0.5)
    options = {
        **{"max_new_tokens": 16, "do_sample": False},
        **{"output_logits": True, "return_dict_in_generate": True},
    }
    with oracle(model, profile)():
        want = model.generate(**inputs, **options)
    unskipped = model.generate(**inputs, **options)
    backend = modes_fx.backend(profile, lowering="eager")
    compile_model(how, model, backend)
    got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=ATOL, rtol=0)
    assert not torch.allclose(torch.stack(unskipped.logits), torch.stack(want.logits), atol=ATOL)
    assert backend.run.executed == [16] * len(profile.layers)


@torch.no_grad()
def test_generate_with_a_static_cache(oracle):
    model = tiny_qwen3_vl_moe()
    profile = tiny_profile(model)
    inputs = tiny_inputs()
    options = {
        **{"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"},
        **{"disable_compile": True, "output_logits": True, "return_dict_in_generate": True},
    }
    with oracle(model, profile)():
        want = model.generate(**inputs, **options)
    backend = modes_fx.backend(profile, lowering="eager")
    # disable_compile is about transformers' own compilation; the model is compiled in place already.
    model.compile(backend=backend)
    got = model.generate(**inputs, **options)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=ATOL, rtol=0)
    assert backend.run.executed == [6] * len(profile.layers)


@torch.no_grad()
def test_thresholds_of_zero_give_the_eager_model(oracle):
    model = tiny_qwen3_vl_moe()
    profile = tiny_profile(model, tau_text=0.0, tau_vision=0.0)
    wanted = [model(**inputs).logits for inputs in CALLS]
    model.model.language_model.compile(backend=modes_fx.backend(profile, lowering="eager"))
    for inputs, want in zip(CALLS, wanted, strict=True):
        torch.testing.assert_close(model(**inputs).logits, want, atol=ATOL, rtol=0)


@torch.no_grad()
def test_bfloat16_drops_the_same_pairs(oracle, thresholds_at):
    model = tiny_qwen3_vl_moe(dtype=torch.bfloat16)
    inputs = tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    exact = tiny_qwen3_vl_moe()
    with oracle(exact, profile)():
        reference = exact(**tiny_inputs()).logits
    with oracle(model, profile)():
        want = model(**inputs).logits
    model.model.language_model.compile(backend=modes_fx.backend(profile, lowering="eager"))
    got = model(**inputs).logits
    # Twice the error that the eager model itself has in bfloat16.
    budget = 2 * (want.float() - reference).abs().max() + 1e-2
    assert (got.float() - reference).abs().max() <= budget
