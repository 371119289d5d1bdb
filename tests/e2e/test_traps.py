"""One test for each trap of compiling a model whose layers look alike: what goes wrong silently elsewhere."""

import dataclasses
import sys

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import modes_fx
from modes_fx import passes
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

ATOL = 1e-4


def eager(profile, **options):
    return modes_fx.backend(profile, lowering="eager", **options)


def reason(raised: pytest.ExceptionInfo[BackendCompilerFailed]) -> str:
    assert isinstance(raised.value.inner_exception, modes_fx.ModesError)
    return str(raised.value.inner_exception)


@torch.no_grad()
def test_layers_that_share_one_frame_get_a_graph_each(oracle):
    # Compiled one by one, all layers have the same code; without a guard one graph would serve them all.
    model = tiny_qwen3_vl_moe(num_layers=12)
    profile = tiny_profile(model)
    inputs = tiny_inputs(grid=None)
    with oracle(model, profile)():
        want = model(**inputs).logits
    backend = eager(profile)
    for layer in model.model.language_model.layers:
        layer.compile(backend=backend)
    got = model(**inputs).logits
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    layers = [name for unit in backend.graphs for name in unit.layers()]
    assert sorted(layers) == sorted(layer.name for layer in profile.layers)


@torch.no_grad()
def test_a_layer_is_known_by_its_router_and_not_by_its_name(oracle):
    model = tiny_qwen3_vl_moe()
    profile = tiny_profile(model)
    names = ["one", "two", "three"]
    pairs = zip(profile.layers, names, strict=True)
    renamed = dataclasses.replace(
        profile, layers=tuple(dataclasses.replace(layer, name=name) for layer, name in pairs)
    )
    inputs = tiny_inputs(grid=None)
    with oracle(model, profile)():
        want = model(**inputs).logits
    backend = eager(renamed)
    model.compile(backend=backend)
    torch.testing.assert_close(model(**inputs).logits, want, atol=ATOL, rtol=0)
    assert [name for unit in backend.graphs for name in unit.layers()] == names


@torch.no_grad()
def test_a_model_that_the_profile_was_not_made_for_is_refused():
    profile = tiny_profile(tiny_qwen3_vl_moe(seed=0))
    other = torch.compile(tiny_qwen3_vl_moe(seed=1), backend=eager(profile))
    with pytest.raises(BackendCompilerFailed, match="made for another model") as raised:
        other(**tiny_inputs())
    assert "Calibrate this model" in reason(raised)


@torch.no_grad()
def test_the_modality_reaches_graphs_that_see_no_token_ids(oracle):
    model = tiny_qwen3_vl_moe()
    backend = eager(tiny_profile(model))
    torch.compile(model, backend=backend)(**tiny_inputs())
    sources = {unit.modality_source for unit in backend.graphs if unit.layers()}
    assert sources == {"another graph"}


@torch.no_grad()
def test_a_picture_of_an_earlier_call_is_not_used_again(oracle):
    model = tiny_qwen3_vl_moe()
    profile = tiny_profile(model)
    picture = tiny_inputs()
    # The same length with and without a picture, so that a stale mask would fit.
    calls = [picture, tiny_inputs(text=picture["input_ids"].shape[1] - 1, grid=None), picture]
    wanted = []
    for inputs in calls:
        with oracle(model, profile)():
            wanted.append(model(**inputs).logits)
    compiled = torch.compile(model, backend=eager(profile))
    for inputs, want in zip(calls, wanted, strict=True):
        torch.testing.assert_close(compiled(**inputs).logits, want, atol=ATOL, rtol=0)


@torch.no_grad()
def test_every_layer_runs_compiled_on_every_length():
    # With torch's own limit of 8, of 12 layers 7 ran compiled on the first length and 0 on the second.
    model = tiny_qwen3_vl_moe(num_layers=10)
    backend = eager(tiny_profile(model))
    model.model.language_model.compile(backend=backend)
    for calls, text in enumerate((5, 9), start=1):
        model(**tiny_inputs(text=text))
        assert backend.run.executed == [calls] * 10


@torch.no_grad()
def test_falling_back_to_eager_is_an_error(monkeypatch):
    # Dynamo's limit stays where it is, and the later layers run eagerly without a word.
    monkeypatch.setattr(sys.modules["modes_fx.backend"], "raise_recompile_limit", lambda num_layers: None)
    model = tiny_qwen3_vl_moe(num_layers=5)
    with torch._dynamo.config.patch(recompile_limit=4):
        model.model.language_model.compile(backend=eager(tiny_profile(model)))
        with pytest.raises(modes_fx.RewriteError, match=r"layers\.4\.mlp ran outside the compiled graphs"):
            for _ in range(3):
                model(**tiny_inputs())


@torch.no_grad()
def test_generate_of_the_wrapper_runs_the_original_and_compile_in_place_does_not():
    model = tiny_qwen3_vl_moe()
    backend = eager(tiny_profile(model))
    torch.compile(model, backend=backend).generate(**tiny_inputs(), max_new_tokens=2)
    assert backend.run.executed == [0, 0, 0]
    model.compile(backend=backend)
    model.generate(**tiny_inputs(), max_new_tokens=2)
    assert backend.run.executed == [2, 2, 2]


@torch.no_grad()
def test_eager_experts_are_an_error_that_names_the_cure():
    model = tiny_qwen3_vl_moe()
    model.set_experts_implementation("eager")
    compiled = torch.compile(model, backend=eager(tiny_profile(model)))
    with pytest.raises(BackendCompilerFailed) as raised:
        compiled(**tiny_inputs())
    assert 'set_experts_implementation("grouped_mm")' in reason(raised)


@torch.no_grad()
def test_a_wrong_rewrite_is_refused(monkeypatch):
    wrong = ("gelu(gate) * up", False)
    monkeypatch.setattr("modes_fx.passes.find_blocks.gate_formula", lambda product, gated: wrong)
    model = tiny_qwen3_vl_moe()
    compiled = torch.compile(model, backend=eager(tiny_profile(model)))
    with pytest.raises(BackendCompilerFailed) as raised:
        compiled(**tiny_inputs())
    assert "the rewrite differs from the model" in reason(raised)


@torch.no_grad()
def test_an_unknown_modality_skips_nothing_and_says_so():
    model = tiny_qwen3_vl_moe()
    profile = tiny_profile(model, tau_text=float("inf"), tau_vision=float("inf"))
    language_model = model.model.language_model
    embeds = torch.randn(1, 7, 32)
    want = language_model(inputs_embeds=embeds).last_hidden_state
    compiled = torch.compile(language_model, backend=eager(profile))
    with pytest.warns(UserWarning, match="modality of the tokens is unknown, so nothing is skipped"):
        got = compiled(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


@torch.no_grad()
def test_embedded_tokens_are_read_back_from_their_rows(oracle):
    model = tiny_qwen3_vl_moe()
    profile = tiny_profile(model)
    inputs = tiny_inputs(grid=None)
    with oracle(model, profile)():
        want = model(**inputs).logits
    backend = eager(profile)
    language_model = torch.compile(model.model.language_model, backend=backend)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model.lm_head(language_model(inputs_embeds=embeds).last_hidden_state)
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)
    assert backend.graphs[0].modality_source == "arguments of the call"


def test_the_pipeline_is_one_literal_list():
    names = [each.__name__ for each in passes.PIPELINE]
    assert names[:2] == ["provide_modality", "skip_experts"] and names[-1] == "drop_dead_code"
    assert isinstance(passes.PIPELINE, tuple) and len(set(names)) == len(names)


def test_measuring_a_model_that_was_compiled_in_place_measures_the_original():
    model = tiny_qwen3_vl_moe()
    batch = tiny_inputs()
    batch["labels"] = batch["input_ids"].where(torch.arange(batch["input_ids"].shape[1]) > 10, -100)
    options = {"special_token_ids": (0, 1, 2, 3, 4), "progress": False}
    want = modes_fx.calibrate(model, [batch], **options)
    backend = eager(tiny_profile(model, tau_text=float("inf"), tau_vision=float("inf")))
    model.compile(backend=backend)
    assert modes_fx.calibrate(model, [batch], **options).layers == want.layers
    assert backend.run.executed == [0, 0, 0]
