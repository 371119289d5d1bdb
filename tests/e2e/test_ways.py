"""Every way to compile gives what the oracle gives, with every layer rewritten in every call."""

import dataclasses
import threading

import pytest
import torch
from torch import nn
from transformers import CompileConfig

import modes_fx
from modes_fx.testing import IMAGE, PAD, VIDEO, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

ATOL = 1e-4


def named_as_in(decoder, profile):
    """The profile of the whole model, with its layers' names as the decoder alone has them."""
    layers = (
        dataclasses.replace(layer, name=layer.name.removeprefix("model.language_model."))
        for layer in profile.layers
    )
    return profile if hasattr(decoder, "lm_head") else dataclasses.replace(profile, layers=tuple(layers))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return tiny_qwen3_vl_moe()


@pytest.fixture
def profile(model, thresholds_at):
    return thresholds_at(model, tiny_profile(model), tiny_inputs(), 0.5)


@pytest.fixture
def logits(oracle, profile):
    """`logits(model, **inputs)` as they must be."""

    def of(model, **inputs):
        with oracle(model, named_as_in(model, profile))() as truth:
            out = model(**inputs)
        assert truth.dropped > 0
        return out.logits if "logits" in out else out.last_hidden_state

    return of


@pytest.fixture
def backend(profile):
    return modes_fx.backend(profile, lowering="eager")


def equal(got, want):
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


# Whole, and in parts.


def test_by_name_in_place(model, profile, logits, tmp_path):
    profile.save(tmp_path / "p.json")
    decoder, ids = model.get_decoder(), tiny_inputs()["input_ids"]
    want = logits(decoder, input_ids=ids)
    decoder.compile(backend="modes_fx", options={"profile": tmp_path / "p.json", "lowering": "eager"})
    equal(decoder(input_ids=ids).last_hidden_state, want)


def test_by_name_through_inductor(model, profile, logits, tmp_path):
    profile.save(tmp_path / "p.json")
    decoder, ids = model.get_decoder(), tiny_inputs()["input_ids"]
    want = logits(decoder, input_ids=ids)
    compiled = torch.compile(decoder, backend="modes_fx", options={"profile": str(tmp_path / "p.json")})
    equal(compiled(input_ids=ids).last_hidden_state, want)


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_fullgraph_and_dynamic(model, backend, logits, dynamic):
    decoder = model.get_decoder()
    calls = [tiny_inputs(text=text)["input_ids"] for text in (9, 14, 5)]
    wanted = [logits(decoder, input_ids=ids) for ids in calls]
    compiled = torch.compile(decoder, backend=backend, fullgraph=True, dynamic=dynamic)
    for ids, want in zip(calls, wanted, strict=True):
        equal(compiled(input_ids=ids).last_hidden_state, want)
    assert backend.run.executed == [3, 3, 3]
    if dynamic:
        assert len(backend.graphs) == 1


def parts(model, what):
    decoder = model.get_decoder()
    return decoder.layers if what == "layers" else [layer.mlp for layer in decoder.layers]


@pytest.mark.parametrize("what", ["layers", "blocks"])
@pytest.mark.parametrize("picture", [True, False])
def test_regions(model, backend, logits, what, picture):
    calls = [tiny_inputs(), tiny_inputs(text=12)] if picture else [tiny_inputs(grid=None)]
    wanted = [logits(model, **inputs) for inputs in calls]
    for part in parts(model, what):
        part.compile(backend=backend)
    for inputs, want in zip(calls, wanted, strict=True):
        equal(model(**inputs).logits, want)
    assert backend.run.executed == [len(calls)] * 3


def dense_first(**sizes):
    """Two dense layers, then layers with experts, as in DeepSeek, GLM and Kimi."""
    model = tiny_qwen3_vl_moe(num_layers=4, **sizes)
    for layer in model.get_decoder().layers[:2]:
        layer.mlp = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)).eval()
    return model


@pytest.mark.parametrize("compiled", ["all layers", "layers with experts"])
def test_regions_where_the_first_layers_have_no_experts(oracle, compiled):
    model = dense_first()
    profile = tiny_profile(model)
    assert len(profile.layers) == 2
    calls = [tiny_inputs(), tiny_inputs(grid=None, text=15), tiny_inputs()]
    wanted = []
    for inputs in calls:
        with oracle(model, profile)():
            wanted.append(model(**inputs).logits)
    backend = modes_fx.backend(profile, lowering="eager")
    for layer in model.get_decoder().layers[0 if compiled == "all layers" else 2 :]:
        layer.compile(backend=backend)
    for inputs, want in zip(calls, wanted, strict=True):
        equal(model(**inputs).logits, want)
    assert backend.run.executed == [3, 3]


def test_regions_called_with_embedded_tokens_alone(model, backend, logits):
    ids = tiny_inputs(grid=None)["input_ids"]
    want = logits(model, input_ids=ids)
    for part in parts(model, "blocks"):
        part.compile(backend=backend)
    equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, want)
    assert backend.graphs[0].modality_source == "arguments of the call"


def test_layers_that_are_not_called_through_the_model_skip_nothing_and_name_the_cure(model, profile):
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))
    block = model.get_decoder().layers[1].mlp
    want = block(hidden)
    strict = modes_fx.backend(profile, lowering="eager", strict=False)
    block.compile(backend=strict)
    with pytest.warns(UserWarning, match="nothing is skipped.*call the layers through the model"):
        equal(block(hidden), want)


# generate().

GENERATE = {
    **{"max_new_tokens": 5, "do_sample": False},
    **{"output_logits": True, "return_dict_in_generate": True},
}


def compile_config(backend, **options):
    config = CompileConfig(backend=backend, **options)
    # transformers compiles by itself on accelerators alone.
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize("way", ["backend", "by name", "through inductor"])
def test_a_compile_config_skips_in_decode(model, profile, oracle, way, tmp_path):
    inputs = tiny_inputs()
    plain = model.generate(**inputs, **GENERATE, cache_implementation="static", disable_compile=True)
    backend = None
    if way == "by name":
        profile.save(tmp_path / "p.json")
        options = {"profile": str(tmp_path / "p.json"), "lowering": "eager"}
        config = compile_config("modes_fx", mode=None, options=options)
    else:
        backend = modes_fx.backend(profile, lowering="eager" if way == "backend" else "inductor")
        config = compile_config(backend)
    got = model.generate(**inputs, **GENERATE, cache_implementation="static", compile_config=config)
    # transformers leaves prefill to the model as it is, and compiles each step after it.
    equal(got.logits[0], plain.logits[0])
    cache = model(**inputs, use_cache=True).past_key_values
    first = got.sequences[:, inputs["input_ids"].shape[1], None]
    step = {"input_ids": first, "past_key_values": cache, "position_ids": None}
    with oracle(model, profile)():
        want = model(**step).logits[:, -1]
    equal(got.logits[1], want)
    if backend is not None:
        assert backend.run.executed == [4, 4, 4]


@pytest.mark.parametrize("grid", [(4, 4), None], ids=["picture", "text"])
def test_a_compile_config_and_the_model_compiled_in_place_skip_in_all_steps(
    model, profile, backend, oracle, grid
):
    inputs = tiny_inputs(grid=grid)
    with oracle(model, profile)():
        want = model.generate(**inputs, **GENERATE, cache_implementation="static", disable_compile=True)
    model.compile(backend=backend)
    got = model.generate(
        **inputs, **GENERATE, cache_implementation="static", compile_config=compile_config(backend)
    )
    equal(torch.stack(got.logits), torch.stack(want.logits))
    assert backend.run.executed == [5, 5, 5]


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate_with_layers_compiled_one_by_one(model, profile, backend, oracle, cache):
    inputs = tiny_inputs()
    options = {**GENERATE, "cache_implementation": cache, "disable_compile": True}
    with oracle(model, profile)():
        want = model.generate(**inputs, **options)
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend)
    got = model.generate(**inputs, **options)
    equal(torch.stack(got.logits), torch.stack(want.logits))
    assert backend.run.executed == [5, 5, 5]


# What comes in. The decoder's layers alone are compiled: the vision tower has no experts.


@pytest.fixture
def compiled(model, backend):
    def compile_layers():
        model.get_decoder().compile(backend=backend)
        return model

    return compile_layers


def padded():
    """Two prompts of unequal length, padded on the left."""
    long, short = tiny_inputs(), tiny_inputs(text=4, seed=3)
    missing = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    inputs = {}
    for name, fill in (("input_ids", PAD), ("attention_mask", 0), ("mm_token_type_ids", 0)):
        left = torch.full((1, missing), fill)
        inputs[name] = torch.cat([long[name], torch.cat([left, short[name]], dim=1)])
    for name in ("pixel_values", "image_grid_thw"):
        inputs[name] = torch.cat([long[name], short[name]])
    return inputs


def several_pictures():
    """Two pictures in one prompt."""
    first, second = tiny_inputs(), tiny_inputs(grid=(4, 8), seed=2)
    dim = {"pixel_values": 0, "image_grid_thw": 0}
    return {name: torch.cat([first[name], second[name]], dim=dim.get(name, 1)) for name in first}


def a_video():
    """A picture and a video of two frames."""
    picture, frames = tiny_inputs(), [tiny_inputs(seed=seed) for seed in (2, 3)]
    ids = [frame["input_ids"].where(frame["input_ids"] != IMAGE, VIDEO) for frame in frames]
    types = [2 * frame["mm_token_type_ids"] for frame in frames]
    return {
        "input_ids": torch.cat([picture["input_ids"], *ids], dim=1),
        "attention_mask": torch.cat([picture["attention_mask"]] * 3, dim=1),
        "mm_token_type_ids": torch.cat([picture["mm_token_type_ids"], *types], dim=1),
        "pixel_values": picture["pixel_values"],
        "image_grid_thw": picture["image_grid_thw"],
        "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in frames]),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


@pytest.mark.parametrize("inputs", [padded, several_pictures, a_video], ids=lambda f: f.__name__)
def test_inputs_of_every_shape(model, compiled, backend, logits, inputs):
    call = inputs()
    want = logits(model, **call)
    equal(compiled()(**call).logits, want)
    assert backend.run.executed == [1, 1, 1]


def test_embedded_tokens_without_ids(model, compiled, backend, logits):
    ids = tiny_inputs(grid=None)["input_ids"]
    want = logits(model, input_ids=ids)
    equal(compiled()(inputs_embeds=model.get_input_embeddings()(ids)).logits, want)
    assert {unit.modality_source for unit in backend.graphs} == {"arguments of the call"}


# Several models, several threads.


def test_two_models_with_two_profiles_take_turns(model, profile, logits, oracle):
    other = tiny_qwen3_vl_moe(seed=1)
    other_profile = tiny_profile(other, tau_text=0.09, tau_vision=0.02)
    ids = tiny_inputs()["input_ids"]
    with oracle(other.get_decoder(), named_as_in(other.get_decoder(), other_profile))():
        wanted = [logits(model.get_decoder(), input_ids=ids), other.get_decoder()(input_ids=ids)[0]]
    backends = [modes_fx.backend(each, lowering="eager") for each in (profile, other_profile)]
    decoders = [model.get_decoder(), other.get_decoder()]
    for decoder, backend in zip(decoders, backends, strict=True):
        decoder.compile(backend=backend)
    for _ in range(2):
        for decoder, want in zip(decoders, wanted, strict=True):
            equal(decoder(input_ids=ids).last_hidden_state, want)
    assert [backend.run.executed for backend in backends] == [[2, 2, 2], [2, 2, 2]]


def test_threads_that_compile_and_run_at_once(model, backend, logits):
    decoder = model.get_decoder()
    calls = [tiny_inputs(text=text, seed=text)["input_ids"] for text in (5, 9, 13)]
    wanted = [logits(decoder, input_ids=ids) for ids in calls]
    decoder.compile(backend=backend)
    barrier = threading.Barrier(len(calls), timeout=120)
    results = {}

    def work(index):
        with torch.no_grad():
            for _ in range(2):
                barrier.wait()
                results.setdefault(index, []).append(decoder(input_ids=calls[index]).last_hidden_state)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [0, 1, 2]
    for index, want in enumerate(wanted):
        for got in results[index]:
            equal(got, want)
