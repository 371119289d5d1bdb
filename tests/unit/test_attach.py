"""`attach`: what it leaves behind, what it refuses, and how the modality of a call is kept."""

import dataclasses
import threading
import warnings

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx import call_modality as calls
from modes_fx.blocks import find_blocks
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.testing import FAMILIES, IMAGE, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

MODEL = -7  # a number that no attached model has


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def profile(model):
    return tiny_profile(model)


@pytest.fixture(autouse=True)
def no_call():
    calls.forget(MODEL)
    yield
    calls.forget(MODEL)


def hooks(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def attributes(model):
    return [dict(vars(block.experts)) for block in find_blocks(model)]


@torch.no_grad()
def test_detaching_leaves_the_model_as_it_was(model, profile):
    inputs = tiny_inputs()
    before = (hooks(model), attributes(model), list(model.state_dict()), model.config.to_dict())
    plain = model(**inputs).logits
    attached = modes_fx.attach(model, profile)
    assert list(model.state_dict()) == before[2]
    assert model.config.to_dict() == before[3]
    assert not torch.equal(model(**inputs).logits, plain)
    attached.detach()
    attached.detach()
    assert (hooks(model), attributes(model), list(model.state_dict()), model.config.to_dict()) == before
    assert torch.equal(model(**inputs).logits, plain)


def test_a_profile_can_be_a_path_and_the_model_compiled(model, profile, tmp_path):
    profile.save(tmp_path / "p.json")
    with modes_fx.attach(torch.compile(model, backend="eager"), tmp_path / "p.json") as attached:
        assert attached.profile == profile
        assert attached.layers == tuple(layer.name for layer in profile.layers)
        assert attached.declined == {}


def test_thresholds_of_zero_leave_every_pair(model, profile):
    inputs = tiny_inputs()
    with torch.no_grad():
        plain = model(**inputs).logits
        with modes_fx.attach(model, profile.with_thresholds(tau_text=0.0, tau_vision=0.0)):
            torch.testing.assert_close(model(**inputs).logits, plain, atol=1e-5, rtol=0)


def test_a_model_is_attached_once(model, profile):
    with modes_fx.attach(model, profile):
        before = (hooks(model), attributes(model))
        with pytest.raises(modes_fx.ModesError, match="is attached already; call detach"):
            modes_fx.attach(model, profile)
        assert (hooks(model), attributes(model)) == before


def test_a_profile_of_another_model_is_refused(model):
    other = tiny_profile(tiny_qwen3_vl_moe(num_layers=2, seed=1))
    with pytest.raises(modes_fx.ProfileError, match="made for another model"):
        modes_fx.attach(model, other)


def test_experts_that_do_not_match_are_refused_or_left_alone(model, profile):
    experts = find_blocks(model)[1].experts
    name = "model.language_model.layers.1.mlp.experts"
    stock = type(experts)._apply_gate
    # A gate that no formula can be: it mixes the columns.
    experts._apply_gate = lambda y: stock(experts, y.cumsum(-1))
    inputs = tiny_inputs(grid=None)
    try:
        with pytest.raises(modes_fx.RewriteError, match=rf"{name} cannot skip: .*strict=False"):
            modes_fx.attach(model, profile)
        with pytest.warns(UserWarning, match=f"{name} cannot skip: .* It runs as it is"):
            attached = modes_fx.attach(model, profile, strict=False)
        assert attached.layers == (profile.layers[0].name,)
        assert list(attached.declined) == [name]
        with torch.no_grad():
            model(**inputs)
        assert experts.config is model.config.text_config
        attached.detach()
    finally:
        del experts._apply_gate


def test_a_gate_of_ones_own_is_matched_from_what_it_computes(model, profile):
    experts = find_blocks(model)[0].experts
    # Neither the name of the class nor the configuration says so.
    experts._apply_gate = lambda y: torch.relu(y[:, 16:]) * y[:, :16]
    try:
        inputs = tiny_inputs(grid=None)
        with torch.no_grad():
            plain = model(**inputs).logits
            with modes_fx.attach(model, profile.with_thresholds(tau_text=0.0, tau_vision=0.0)):
                got = model(**inputs).logits
        torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)
    finally:
        del experts._apply_gate


def test_experts_of_another_number_of_slots_are_refused(model, profile):
    layers = (dataclasses.replace(profile.layers[0], top_k=2), *profile.layers[1:])
    with pytest.raises(modes_fx.RewriteError, match="profile has 8 experts, top 2, the model 8, top 4"):
        modes_fx.attach(model, dataclasses.replace(profile, layers=layers))


def test_undecorated_experts_are_refused():
    llama = FAMILIES["llama4"].build()
    with pytest.raises(modes_fx.RewriteError, match="does not run it through its ExpertsInterface"):
        modes_fx.attach(llama, tiny_profile(llama))


def test_a_call_with_gradients_runs(model, profile):
    inputs = tiny_inputs(grid=None)
    with modes_fx.attach(model, profile):
        with torch.no_grad():
            want = model(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits.detach(), want, atol=1e-5, rtol=0)


# What a call leaves behind, without a model.

IDS = torch.tensor([[9, IMAGE, 1]])
KINDS = [TEXT, VISION, OTHER]
HIDDEN = torch.randn(3, 4)


def begin(ids: torch.Tensor = IDS) -> None:
    calls.begin(ids, MODEL, [IMAGE], [1])


def modality(hidden: torch.Tensor = HIDDEN, name: str = "experts") -> list[int]:
    return calls.call_modality(hidden, MODEL, name).tolist()


def test_each_experts_module_gets_the_modality_of_the_call():
    begin()
    assert modality(name="a") == modality(name="b") == KINDS


@pytest.mark.filterwarnings("ignore:The modality")
def test_a_second_time_belongs_to_a_call_that_nobody_saw():
    begin()
    assert modality() == KINDS
    assert modality() == [OTHER] * 3
    # Nor do the layers after it get what was left.
    assert modality(name="another") == [OTHER] * 3


@pytest.mark.filterwarnings("ignore:The modality")
def test_a_call_of_another_length_gets_nothing():
    begin()
    assert modality(torch.randn(2, 4)) == [OTHER] * 2
    assert modality(torch.randn(5, 4), "tower") == [OTHER] * 5
    assert modality(name="later") == KINDS


@pytest.mark.filterwarnings("ignore:The modality")
def test_the_next_call_starts_from_nothing():
    begin()
    calls.begin(None, MODEL, [IMAGE], [1])
    assert modality() == [OTHER] * 3
    begin()
    calls.begin(torch.randn(1, 3, 4), MODEL, [IMAGE], [1])
    assert modality() == [OTHER] * 3
    begin()
    calls.end(MODEL)
    assert modality() == [OTHER] * 3


@pytest.mark.filterwarnings("ignore:The modality")
def test_another_thread_gets_nothing():
    begin()
    seen: list[list[int]] = []
    thread = threading.Thread(target=lambda: seen.append(modality()))
    thread.start()
    thread.join()
    assert seen == [[OTHER] * 3]
    assert modality() == KINDS


def test_an_unknown_modality_is_told_once():
    with pytest.warns(UserWarning, match="modality of the tokens in experts is unknown"):
        modality()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modality()


def test_part_of_the_tokens_is_told_by_the_module_around():
    begin()
    around = torch.randn(1, 3, 4)
    calls.enter("block", around, MODEL)
    assert modality(around[0, [2, 0]], "block.text") == [OTHER, TEXT]
    assert modality(around[0, [1]], "block.vision") == [VISION]


def test_the_ops_are_what_they_say():
    begin()
    tests = ("test_schema", "test_faketensor")
    constants = (MODEL, [IMAGE], [1])
    torch.library.opcheck(calls.begin_call, (IDS, *constants), test_utils=tests)
    torch.library.opcheck(calls.begin_call, (torch.randn(1, 3, 4), *constants), test_utils=tests)
    torch.library.opcheck(calls.enter_module, (torch.randn(1, 3, 4), MODEL, "a"), test_utils=tests)
    for op in (calls.begin_call, calls.enter_module, calls.call_modality):
        # A CUDA graph would replay the first call's modality.
        assert torch.Tag.cudagraph_unsafe in op.tags


def test_a_module_without_tokens_can_be_attached_to():
    class Alone(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.block(hidden)

    block = Alone(tiny_qwen3_vl_moe(num_layers=1).get_decoder().layers[0].mlp)
    whole = tiny_qwen3_vl_moe(num_layers=1)
    profile = tiny_profile(whole)
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        plain = block(hidden)
        with modes_fx.attach(block, profile), pytest.warns(UserWarning, match="is unknown"):
            got = block(hidden)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=0)
