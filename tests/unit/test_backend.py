"""`modes_fx.backend`: what it accepts, what it refuses and in which words, and the state that it keeps."""

import copy
import dataclasses
import math
import warnings
from collections import Counter

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import modes_fx
from modes_fx.backend import raise_recompile_limit
from modes_fx.errors import ProfileError, RewriteError
from modes_fx.passes.unit import Fingerprints
from modes_fx.profile import fingerprint
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def profile(model):
    return tiny_profile(model)


@pytest.fixture
def input_ids():
    return tiny_inputs()["input_ids"]


def hidden(decoder, input_ids, backend=None):
    """Of the decoder alone: one graph, so it compiles quickly."""
    call = decoder.forward if backend is None else torch.compile(decoder.forward, backend=backend)
    return call(input_ids=input_ids, use_cache=False).last_hidden_state


def drop_all(profile):
    """Nothing is left of text and vision, so the answer shows that the profile was used."""
    return profile.with_thresholds(tau_text=math.inf, tau_vision=math.inf)


def drop_none(profile):
    return profile.with_thresholds(tau_text=-math.inf, tau_vision=-math.inf)


def differ(a, b):
    return (a - b).abs().max() > 0.1


# What it takes.


def test_takes_a_profile_or_the_path_of_one(profile, tmp_path):
    path = tmp_path / "tiny.modes.json"
    profile.save(path)
    for given in (profile, path, str(path)):
        assert modes_fx.backend(given).profile == profile


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ProfileError, match="not a modes_fx profile"):
        modes_fx.backend(path)


def test_an_unknown_lowering_is_refused(profile):
    with pytest.raises(ValueError, match='lowering must be "inductor" or "eager", got \'tensorrt\''):
        modes_fx.backend(profile, lowering="tensorrt")


def test_an_unknown_pass_is_refused_before_anything_is_compiled(profile):
    with pytest.raises(ValueError, match="No pass is named nothing; the passes are provide_modality, skip_"):
        modes_fx.backend(profile, disable=["nothing"])


# What it does.


def test_rewrites_every_layer_and_reports_it(model, profile, input_ids):
    backend = modes_fx.backend(profile, lowering="eager")
    with torch.no_grad():
        hidden(model.get_decoder(), input_ids, backend)
    (unit,) = backend.graphs
    assert unit.layers() == [layer.name for layer in profile.layers]
    assert backend.run.executed == [1, 1]


def test_example_inputs_are_not_kept_after_compiling(model, profile, input_ids):
    backend = modes_fx.backend(profile, lowering="eager")
    with torch.no_grad():
        hidden(model.get_decoder(), input_ids, backend)
    assert [unit.inputs for unit in backend.graphs] == [[]]


def test_a_router_is_hashed_once_however_often_it_is_compiled(model, profile, input_ids, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "modes_fx.passes.unit.fingerprint", lambda weight: hashed.append(weight) or fingerprint(weight)
    )
    backend = modes_fx.backend(profile, lowering="eager")
    decoder = model.get_decoder()
    compiled = torch.compile(decoder, backend=backend, dynamic=False)
    with torch.no_grad():
        for length in (4, 7, 9):
            compiled(input_ids=input_ids[:, :length], use_cache=False)
    assert len(backend.graphs) == 3
    routers = [layer.mlp.gate.weight for layer in decoder.layers]
    times = Counter(map(id, hashed))
    # What has about as many rows as a router is hashed too, and also once.
    assert set(times.values()) == {1}
    assert times.keys() >= {id(router) for router in routers}


def test_a_router_that_was_changed_is_hashed_again(model):
    router = torch.nn.Parameter(torch.randn(8, 32))
    fingerprints = Fingerprints()
    before = fingerprints(router)
    with torch.no_grad():
        router[3] += 1
    assert fingerprints(router) == fingerprint(router) != before


def test_thresholds_of_minus_infinity_give_the_eager_model(model, profile, input_ids):
    with torch.no_grad():
        got = hidden(model.get_decoder(), input_ids, modes_fx.backend(drop_none(profile), lowering="eager"))
        want = hidden(model.get_decoder(), input_ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_with_gradients_on_it_runs_and_gives_outputs_without(model, profile, input_ids):
    assert torch.is_grad_enabled() and next(model.parameters()).requires_grad
    backend = modes_fx.backend(profile, lowering="eager")
    compiled = torch.compile(model.get_decoder().forward, backend=backend)
    got = compiled(input_ids=input_ids, use_cache=False).last_hidden_state
    assert not got.requires_grad
    with torch.no_grad():
        again = compiled(input_ids=input_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, again)


def test_graphs_that_are_not_rewritten_give_outputs_without_gradients_too(profile):
    head = torch.nn.Linear(4, 4)
    got = torch.compile(head, backend=modes_fx.backend(profile, lowering="eager"))(torch.randn(2, 4))
    assert not got.requires_grad
    assert torch.is_grad_enabled()


def test_two_profiles_on_two_models_in_one_process(model, profile, input_ids):
    other = tiny_qwen3_vl_moe(num_layers=2, seed=1)
    backends = (
        modes_fx.backend(drop_all(profile), lowering="eager"),
        modes_fx.backend(drop_none(tiny_profile(other)), lowering="eager"),
    )
    decoders = (model.get_decoder(), other.get_decoder())
    with torch.no_grad():
        plain = [hidden(decoder, input_ids) for decoder in decoders]
        calls = [torch.compile(d.forward, backend=b) for d, b in zip(decoders, backends, strict=True)]
        for _ in range(2):
            first, second = (call(input_ids=input_ids, use_cache=False).last_hidden_state for call in calls)
            assert differ(first, plain[0])
            torch.testing.assert_close(second, plain[1], rtol=1e-4, atol=1e-4)
    assert [backend.run.executed for backend in backends] == [[2, 2], [2, 2]]


def test_two_profiles_on_one_model_in_one_process(model, profile, input_ids):
    decoder = model.get_decoder()
    with torch.no_grad():
        plain = hidden(decoder, input_ids)
        all_gone = hidden(decoder, input_ids, modes_fx.backend(drop_all(profile), lowering="eager"))
        all_kept = hidden(decoder, input_ids, modes_fx.backend(drop_none(profile), lowering="eager"))
    assert differ(all_gone, plain)
    torch.testing.assert_close(all_kept, plain, rtol=1e-4, atol=1e-4)


def test_a_profile_of_the_float32_model_serves_the_bfloat16_one(profile, input_ids):
    model = tiny_qwen3_vl_moe(num_layers=2, dtype=torch.bfloat16)
    backend = modes_fx.backend(profile, lowering="eager")
    with torch.no_grad():
        hidden(model.get_decoder(), input_ids, backend)
    assert backend.run.executed == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_fingerprint_does_not_depend_on_the_dtype(dtype):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    assert fingerprint(weight.to(dtype)) == fingerprint(weight)


# What it refuses. Dynamo wraps what a backend raises; the message is the same and the error is inside.


def refusal(decoder, input_ids, backend):
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        hidden(decoder, input_ids, backend)
    return caught.value.inner_exception


@pytest.mark.parametrize("strict", [True, False])
def test_a_profile_of_another_model_is_refused(profile, input_ids, strict):
    other = tiny_qwen3_vl_moe(num_layers=2, seed=1)
    backend = modes_fx.backend(profile, lowering="eager", strict=strict)
    error = refusal(other.get_decoder(), input_ids, backend)
    assert isinstance(error, ProfileError)
    assert "The profile was made for another model" in str(error) and "Calibrate this model" in str(error)


def test_experts_that_run_eagerly_are_refused_with_what_to_call(profile, input_ids):
    model = tiny_qwen3_vl_moe(num_layers=2)
    model.set_experts_implementation("eager")
    error = refusal(model.get_decoder(), input_ids, modes_fx.backend(profile, lowering="eager"))
    assert isinstance(error, RewriteError)
    assert 'set_experts_implementation("grouped_mm")' in str(error)


def test_without_strict_a_block_that_does_not_match_warns_and_runs_as_it_was(profile, input_ids):
    model = tiny_qwen3_vl_moe(num_layers=2)
    for layer in model.get_decoder().layers:
        layer.mlp.experts.act_fn = torch.nn.Softmax(-1)
    backend = modes_fx.backend(drop_all(profile), lowering="eager", strict=False)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"layers\.0\.mlp was not rewritten: .*unskipped"):
            got = hidden(model.get_decoder(), input_ids, backend)
        want = hidden(model.get_decoder(), input_ids)
    torch.testing.assert_close(got, want)
    assert backend.run.executed == [0, 0]


def test_a_block_that_does_not_match_is_an_error(profile, input_ids):
    model = tiny_qwen3_vl_moe(num_layers=2)
    model.get_decoder().layers[1].mlp.experts.act_fn = torch.nn.Softmax(-1)
    error = refusal(model.get_decoder(), input_ids, modes_fx.backend(profile, lowering="eager"))
    assert isinstance(error, RewriteError)
    assert "layers.1.mlp was not rewritten: " in str(error)
    assert "strict=False" in str(error)


def test_a_layer_of_other_sizes_than_the_profiles_is_an_error(model, profile, input_ids):
    layers = (dataclasses.replace(profile.layers[0], top_k=2), *profile.layers[1:])
    wrong = dataclasses.replace(profile, layers=layers)
    error = refusal(model.get_decoder(), input_ids, modes_fx.backend(wrong, lowering="eager"))
    assert "the profile has 8 experts, top 2, the graph 8, top 4" in str(error)


def test_with_the_rewrite_switched_off_the_model_runs_as_it_was_and_says_nothing(model, profile, input_ids):
    backend = modes_fx.backend(drop_all(profile), lowering="eager", disable=["skip_experts"])
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = hidden(model.get_decoder(), input_ids, backend)
        want = hidden(model.get_decoder(), input_ids)
    torch.testing.assert_close(got, want)
    assert [str(w.message) for w in said if "unskipped" in str(w.message)] == []


# By name: torch.compile(model, backend="modes_fx", options=...).


@pytest.fixture
def saved(profile, tmp_path):
    path = tmp_path / "tiny.modes.json"
    drop_all(profile).save(path)
    return path


@torch.no_grad()
def named(decoder, input_ids, **options):
    torch._dynamo.reset()
    compiled = torch.compile(decoder.forward, backend="modes_fx", options=options or None)
    return compiled(input_ids=input_ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    "kind", [str, lambda path: path, modes_fx.Profile.load], ids=["str", "path", "profile"]
)
def test_by_name_with_a_profile_among_the_options(model, profile, saved, input_ids, kind):
    decoder = model.get_decoder()
    want = hidden(decoder, input_ids, modes_fx.backend(drop_all(profile), lowering="eager"))
    got = named(decoder, input_ids, profile=kind(saved), lowering="eager")
    torch.testing.assert_close(got, want)
    assert differ(got, hidden(decoder, input_ids))


def test_by_name_torch_lists_it():
    assert "modes_fx" in torch._dynamo.list_backends()


@pytest.mark.parametrize("options", [{}, {"lowering": "eager"}])
def test_by_name_without_a_profile_says_what_to_write(model, input_ids, options):
    with pytest.raises(BackendCompilerFailed) as raised:
        named(model.get_decoder(), input_ids, **options)
    assert isinstance(raised.value.inner_exception, ProfileError)
    assert 'backend="modes_fx" needs a profile: torch.compile(model, ' in str(raised.value)


def test_by_name_the_other_options_are_of_the_backend(model, saved, input_ids):
    decoder = model.get_decoder()
    left = named(decoder, input_ids, profile=saved, lowering="eager", disable=["skip_experts"])
    torch.testing.assert_close(left, hidden(decoder, input_ids))
    with pytest.raises(BackendCompilerFailed, match="lowering must be"):
        named(decoder, input_ids, profile=saved, lowering="tensorrt")


def inductor_config(monkeypatch):
    """What Inductor is set to, while each graph is compiled."""
    seen = []

    def look(self, gm, example_inputs):
        seen.append(torch._inductor.config.save_config_portable())
        return gm.forward

    monkeypatch.setattr(modes_fx.Backend, "_compile", look)
    return seen


def test_by_name_what_is_left_is_inductors(model, saved, input_ids, monkeypatch):
    seen = inductor_config(monkeypatch)
    named(model.get_decoder(), input_ids, profile=saved, epilogue_fusion=False, mode="max-autotune")
    assert all(config["max_autotune"] and not config["epilogue_fusion"] for config in seen) and seen


def test_a_mode_is_inductors(model, profile, input_ids, monkeypatch):
    seen = inductor_config(monkeypatch)
    compiled = torch.compile(
        model.get_decoder().forward, backend=modes_fx.backend(profile), mode="max-autotune-no-cudagraphs"
    )
    with torch.no_grad():
        compiled(input_ids=input_ids, use_cache=False)
    assert all(config["max_autotune"] for config in seen) and seen


def made_backends(monkeypatch):
    made = []
    compile_graph = modes_fx.Backend._compile

    def note(self, gm, example_inputs):
        made.append(self)
        return compile_graph(self, gm, example_inputs)

    monkeypatch.setattr(modes_fx.Backend, "_compile", note)
    return made


@torch.no_grad()
def test_by_name_layers_compiled_one_by_one_share_a_backend(profile, saved, input_ids, monkeypatch):
    made = made_backends(monkeypatch)
    model = tiny_qwen3_vl_moe(num_layers=2)
    want = hidden(model.get_decoder(), input_ids, modes_fx.backend(drop_all(profile), lowering="eager"))
    del made[:]
    for layer in model.get_decoder().layers:
        layer.compile(backend="modes_fx", options={"profile": str(saved), "lowering": "eager"})
    got = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, want)
    assert len(made) == 2 and made[0] is made[1]
    assert made[0].run.executed == [1, 1]


@torch.no_grad()
def test_by_name_a_profile_written_anew_is_read_by_the_next_compile_alone(
    model, profile, saved, input_ids, monkeypatch
):
    made = made_backends(monkeypatch)
    decoder, options = model.get_decoder(), {"profile": saved, "lowering": "eager"}
    first = torch.compile(decoder.forward, backend="modes_fx", options=options)
    first(input_ids=input_ids, use_cache=False)
    drop_none(profile).save(saved)
    first(input_ids=input_ids[:, :-3], use_cache=False)
    named(decoder, input_ids, **options)
    assert len(made) == 3
    assert made[0] is made[1] and made[2] is not made[0]
    assert [each.profile.tau_text for each in made] == [math.inf, math.inf, -math.inf]


def test_a_deep_copy_is_the_backend_itself(profile):
    backend = modes_fx.backend(profile)
    assert copy.deepcopy({"backend": backend})["backend"] is backend


# The recompile limit.


def test_the_recompile_limit_is_raised_with_the_number_of_layers():
    raise_recompile_limit(12)
    config = torch._dynamo.config
    assert config.recompile_limit >= 12 * 8
    assert config.accumulated_recompile_limit >= config.recompile_limit


def test_the_recompile_limit_is_never_lowered(profile):
    with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000):
        modes_fx.backend(profile)
        assert torch._dynamo.config.recompile_limit == 10_000
        assert torch._dynamo.config.accumulated_recompile_limit == 100_000


def test_making_a_backend_raises_the_limit(profile):
    modes_fx.backend(profile)
    assert torch._dynamo.config.recompile_limit > 8
