"""An attached model gives the logits of the unedited one with dropped pairs at weight zero."""

import gc
import threading
import warnings
from typing import Any

import pytest
import torch
import transformers

import modes_fx
from modes_fx.testing import FAMILIES, set_experts, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

ATOL = 1e-4
PICTURE = tiny_inputs()
GENERATE = {
    **{"max_new_tokens": 6, "do_sample": False},
    **{"output_logits": True, "return_dict_in_generate": True},
}
# Families of decorated experts that cannot skip, and why.
DECLINED = {
    "diffusion_gemma": "may be given other tokens",
    "muse_spark": "should be one sum over slots",
}


def expected(oracle: Any, model: Any, profile: Any, inputs: dict[str, Any]) -> torch.Tensor:
    truth = oracle(model, profile)
    with truth():
        logits = model(**inputs).logits
    assert 0 < truth.skip < 1
    return logits


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.decorated])
@torch.no_grad()
def test_every_family_skips_or_says_why_not(name, oracle, thresholds_at):
    family = FAMILIES[name]
    model = family.build()
    profile = tiny_profile(model, weight_scale=family.weight_scale)
    if name in DECLINED:
        with pytest.raises(modes_fx.RewriteError, match=DECLINED[name]):
            modes_fx.attach(model, profile)
        return
    kinds = [kind for kind in ("picture", "batch") if kind in family.kinds]
    calls = [{**family.inputs(kind), "use_cache": False} for kind in kinds]
    profile = thresholds_at(model, profile, calls[0], 0.5)
    plain = [model(**inputs).logits for inputs in calls]
    wanted = [expected(oracle, model, profile, inputs) for inputs in calls]
    with warnings.catch_warnings(), modes_fx.attach(model, profile) as attached:
        warnings.filterwarnings("error", "The modality", UserWarning)
        assert attached.layers == tuple(layer.name for layer in profile.layers)
        for inputs, want, unskipped in zip(calls, wanted, plain, strict=True):
            got = model(**inputs).logits
            torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
            assert (got - unskipped).abs().max() > 100 * ATOL
    assert torch.equal(model(**calls[0]).logits, plain[0])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["internvl+gpt_oss", "kimi_k25+deepseek_v3"])
@torch.no_grad()
def test_whatever_ran_the_experts_before(name, implementation, oracle, thresholds_at):
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs("picture")
    profile = thresholds_at(model, tiny_profile(model, weight_scale=family.weight_scale), inputs, 0.5)
    set_experts(model, implementation)
    want = expected(oracle, model, profile, inputs)
    before = model.get_experts_implementation()
    with modes_fx.attach(model, profile):
        torch.testing.assert_close(model(**inputs).logits, want, atol=ATOL, rtol=0)
    assert model.get_experts_implementation() == before


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "internvl+gpt_oss", "ernie4_5_vl_moe"])
@torch.no_grad()
def test_bfloat16(name, oracle, thresholds_at):
    family = FAMILIES[name]
    model, exact = family.build(dtype=torch.bfloat16), family.build()
    inputs = family.inputs("picture", dtype=torch.bfloat16)
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    want = expected(oracle, model, profile, inputs).float()
    reference = expected(oracle, exact, profile, family.inputs("picture"))
    with modes_fx.attach(model, profile):
        got = model(**inputs).logits.float()
    # Twice the error that the eager model itself has in bfloat16.
    budget = 2 * (want - reference).abs().max() + 1e-2
    errors = (got - reference).abs().amax(-1).flatten().sort().values
    # Rounded otherwise, a score can fall on the other side of a threshold: for one token, not for more.
    assert errors[-2] <= budget


@pytest.mark.parametrize("how", ["whole", "decoder", "layers", "layers, inductor"])
@torch.no_grad()
def test_compiled_by_any_backend(how, oracle, thresholds_at):
    family = FAMILIES["internvl+qwen3_moe"]
    model = family.build()
    calls = [family.inputs(kind, seed=seed) for seed, kind in enumerate(("picture", "text", "pictures"))]
    profile = thresholds_at(model, tiny_profile(model), calls[0], 0.5)
    wanted = [expected(oracle, model, profile, inputs) for inputs in calls]
    compiled = model
    with modes_fx.attach(model, profile):
        if how == "whole":
            compiled = torch.compile(model, backend="eager")
        elif how == "decoder":
            model.get_decoder().compile(backend="eager", dynamic=True)
        else:
            for layer in model.get_decoder().layers:
                # Layers share their code: constants of one in the graph of another would show.
                layer.compile(backend="inductor" if how.endswith("inductor") else "eager")
        for inputs, want in zip(calls, wanted, strict=True):
            torch.testing.assert_close(compiled(**inputs).logits, want, atol=ATOL, rtol=0)


@torch.no_grad()
def test_one_graph_for_the_whole_call(oracle, thresholds_at):
    family = FAMILIES["qwen3_moe"]
    model = family.build()
    profile = thresholds_at(model, tiny_profile(model), family.inputs("text"), 0.5)
    wanted = [expected(oracle, model, profile, family.inputs("text", seed=seed)) for seed in range(2)]
    with modes_fx.attach(model, profile):
        model.compile(backend="eager", fullgraph=True)
        for seed, want in enumerate(wanted):
            got = model(**family.inputs("text", seed=seed)).logits
            torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_exported(strict, oracle, thresholds_at):
    family = FAMILIES["qwen3_moe"]
    model = family.build()
    inputs = {"input_ids": family.inputs("text")["input_ids"], "use_cache": False}
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    want = expected(oracle, model, profile, inputs)
    with modes_fx.attach(model, profile):
        program = torch.export.export(model, (), inputs, strict=strict)
    torch.testing.assert_close(program.module()(**inputs).logits, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_each_step_of_generate(cache, compiled, oracle, thresholds_at):
    model = tiny_qwen3_vl_moe()
    profile = thresholds_at(model, tiny_profile(model), PICTURE, 0.5)
    options = {**GENERATE, "cache_implementation": cache, "disable_compile": True}
    with oracle(model, profile)():
        want = model.generate(**PICTURE, **options)
    with modes_fx.attach(model, profile):
        if compiled:
            model.model.language_model.compile(backend="eager")
        got = model.generate(**PICTURE, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=ATOL, rtol=0)


@torch.no_grad()
def test_compiled_by_generate(oracle, thresholds_at):
    family = FAMILIES["internvl+qwen3_moe"]
    model = family.build()
    inputs = family.inputs("picture")
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    options = {**GENERATE, "cache_implementation": "static"}
    with oracle(model, profile)():
        want = model.generate(**inputs, **options, disable_compile=True)
    compile_config = transformers.CompileConfig(backend="eager", fullgraph=True)
    # Else only on a GPU.
    compile_config._compile_all_devices = True
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    with modes_fx.attach(model, profile):
        got = model.generate(**inputs, **options, compile_config=compile_config)
    assert counters["unique_graphs"] > 0
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["picture", "pictures", "batch", "text"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_ernie_whose_experts_see_part_of_the_tokens(kind, compiled, oracle, thresholds_at):
    family = FAMILIES["ernie4_5_vl_moe"]
    model = family.build()
    inputs = family.inputs(kind)
    profile = thresholds_at(model, tiny_profile(model), family.inputs("picture"), 0.5)
    want = expected(oracle, model, profile, inputs)
    with oracle(model, profile)():
        steps = model.generate(**inputs, **GENERATE)
    with modes_fx.attach(model, profile):
        if compiled:
            model.get_decoder().compile(backend="eager")
        torch.testing.assert_close(model(**inputs).logits, want, atol=ATOL, rtol=0)
        got = model.generate(**inputs, **GENERATE)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(steps.logits), atol=ATOL, rtol=0)


@torch.no_grad()
def test_two_models_of_one_configuration_with_two_profiles(oracle, thresholds_at):
    first = tiny_qwen3_vl_moe()
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    profiles = [thresholds_at(first, tiny_profile(first), PICTURE, skip) for skip in (0.3, 0.7)]
    plain = second(**PICTURE).logits
    wanted = [expected(oracle, first, profile, PICTURE) for profile in profiles]
    with modes_fx.attach(first, profiles[0]):
        torch.testing.assert_close(second(**PICTURE).logits, plain, atol=0, rtol=0)
        with modes_fx.attach(second, profiles[1]):
            for _ in range(2):
                for model, want in zip((first, second), wanted, strict=True):
                    torch.testing.assert_close(model(**PICTURE).logits, want, atol=ATOL, rtol=0)
        torch.testing.assert_close(first(**PICTURE).logits, wanted[0], atol=ATOL, rtol=0)
        torch.testing.assert_close(second(**PICTURE).logits, plain, atol=0, rtol=0)


def test_threads_do_not_share_a_modality(oracle, thresholds_at):
    model = tiny_qwen3_vl_moe()
    picture = tiny_inputs(text=5)
    text = tiny_inputs(text=picture["input_ids"].shape[1] - 1, grid=None)
    calls = [picture, text]
    with torch.no_grad():
        profile = thresholds_at(model, tiny_profile(model), picture, 0.5)
        wanted = [expected(oracle, model, profile, inputs) for inputs in calls]
    differences: list[list[float]] = [[], []]
    # Both are inside of a call at the same time, every time.
    barrier = threading.Barrier(2)

    def meet(*_: Any) -> None:
        barrier.wait(60)

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                difference = (model(**calls[index]).logits - wanted[index]).abs().max()
                differences[index].append(float(difference))

    model.model.language_model.register_forward_pre_hook(meet)
    with modes_fx.attach(model, profile):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(each) for each in differences] == [5, 5]
    assert max(map(max, differences)) < ATOL


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_a_call_without_ids_after_one_that_raised_skips_nothing(compiled, thresholds_at):
    family = FAMILIES["internvl+qwen3_moe"]
    model = family.build()
    inputs = family.inputs("text")
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    # No rows of the embedding, so that nothing tells what they are.
    embeds = torch.randn(*inputs["input_ids"].shape, model.get_input_embeddings().embedding_dim)
    plain = model(inputs_embeds=embeds).logits
    layer = model.get_decoder().layers[1]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    with modes_fx.attach(model, profile):
        if compiled:
            model.compile(backend="eager")
        handle = layer.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            model(**inputs)
        handle.remove()
        with pytest.warns(UserWarning, match="modality of the tokens in .* is unknown"):
            got = model(inputs_embeds=embeds).logits
        torch.testing.assert_close(got, plain, atol=ATOL, rtol=0)
        # The decoder alone has seen no call begin.
        alone = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(
        alone, model.get_decoder()(inputs_embeds=embeds).last_hidden_state, atol=ATOL, rtol=0
    )


@torch.no_grad()
def test_a_compiled_call_leaves_nothing_to_the_next(thresholds_at):
    family = FAMILIES["internvl+qwen3_moe"]
    model = family.build()
    inputs = family.inputs("text")
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    embeds = torch.randn(*inputs["input_ids"].shape, model.get_input_embeddings().embedding_dim)
    decoder = model.get_decoder()
    plain = decoder(inputs_embeds=embeds).last_hidden_state
    with modes_fx.attach(model, profile):
        torch.compile(model, backend="eager")(**inputs)
        with pytest.warns(UserWarning, match="is unknown"):
            got = decoder(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(got, plain, atol=ATOL, rtol=0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_embedded_tokens_are_told_by_their_rows(compiled, oracle, thresholds_at):
    model = FAMILIES["internvl+qwen3_moe"].build()
    inputs = FAMILIES["internvl+qwen3_moe"].inputs("text")
    profile = thresholds_at(model, tiny_profile(model), inputs, 0.5)
    want = expected(oracle, model, profile, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    # What attach returns need not be kept.
    modes_fx.attach(model, profile)
    gc.collect()
    if compiled:
        model.compile(backend="eager")
    got = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
