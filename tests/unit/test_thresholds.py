"""Thresholds that move while a model runs, compiled or attached, and the count of its pairs."""

import copy
import dataclasses
import itertools
import math
import threading

import pytest
import torch

import modes_fx
from modes_fx.skipping import simulate
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe
from modes_fx.thresholds import PairCounter, Thresholds

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def profile(model):
    return tiny_profile(model)


@pytest.fixture(scope="module")
def input_ids():
    return tiny_inputs()["input_ids"]


# Forth and back, and out of what no factor leads out of.
TAUS = [(0.1, 0.03), (math.inf, 0.0), (0.1, 0.03)]


def at(profile, taus):
    return profile.with_thresholds(tau_text=taus[0], tau_vision=taus[1])


# The tensors.


def test_a_threshold_is_one_tensor_written_in_place(profile):
    thresholds = Thresholds(profile)
    tensor = thresholds.on(CPU)
    address = tensor.data_ptr()
    assert tensor.tolist() == torch.tensor([profile.tau_text, profile.tau_vision]).tolist()
    thresholds.set(text=0.5)
    thresholds.set(vision=math.inf)
    assert thresholds.on(CPU) is tensor and tensor.data_ptr() == address
    assert tensor.tolist() == [0.5, math.inf] == [thresholds.text, thresholds.vision]


def test_it_is_written_in_and_out_of_inference_mode(profile):
    thresholds = Thresholds(profile)
    with torch.inference_mode():
        tensor = thresholds.on(CPU)
        thresholds.set(text=0.5)
    thresholds.set(text=0.25)
    assert tensor[0] == 0.25 and not tensor.is_inference()


@pytest.mark.parametrize(
    "wrong", [{"text": math.nan}, {"vision": 0.2}, {"text": 0.01}, {"text": 0.05, "vision": 9.0}]
)
def test_what_is_out_of_bounds_changes_nothing(profile, wrong):
    thresholds = Thresholds(profile, (0.5, 2.0))
    before = thresholds.on(CPU).clone()
    with pytest.raises(ValueError, match=r"The threshold of (text|vision) must be from"):
        thresholds.set(**wrong)
    assert torch.equal(thresholds.on(CPU), before) and thresholds.text == profile.tau_text


@pytest.mark.parametrize("factors", [(0.0, 2.0), (1.5, 2.0), (0.5, 0.9), (math.nan, 2.0)], ids=str)
def test_factors_hold_one(profile, factors):
    with pytest.raises(ValueError, match="factors"):
        modes_fx.backend(profile, adjustable=factors)


def test_factors_want_thresholds_that_are_not_below_zero(profile):
    with pytest.raises(ValueError, match="factors"):
        modes_fx.backend(at(profile, (0.1, -0.1)), adjustable=(0.5, 2.0))


def test_zero_and_infinity_have_no_other_multiples(profile):
    assert Thresholds(at(profile, (0.0, math.inf)), (0.5, 2.0)).bounds == ((0.0, 0.0), (math.inf, math.inf))


# Compiled.


def compiled(model, backend, **options):
    call = torch.compile(model.get_decoder().forward, backend=backend, **options)
    return lambda ids: call(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def test_thresholds_move_without_a_recompile_to_the_bits_of_a_new_profile(model, profile, input_ids):
    backend = modes_fx.backend(profile, lowering="eager", adjustable=True)
    moving = compiled(model, backend)
    for taus in TAUS:
        backend.thresholds.set(text=taus[0], vision=taus[1])
        got = moving(input_ids)
        want = compiled(model, modes_fx.backend(at(profile, taus), lowering="eager"))(input_ids)
        assert torch.equal(got, want), taus
    assert len(backend.compile_ids) == 1
    assert backend.run.executed == [len(TAUS)] * 2


@torch.no_grad()
def test_inductor_reads_the_tensor_at_each_run(profile, input_ids):
    model = tiny_qwen3_vl_moe(num_layers=1)
    profile = tiny_profile(model)
    backend = modes_fx.backend(profile, adjustable=True, counting=True)
    moving, graphs = compiled(model, backend), torch._dynamo.utils.counters["stats"]
    seen, before = backend.counts(), graphs["unique_graphs"]
    for taus in TAUS:
        backend.thresholds.set(text=taus[0], vision=taus[1])
        got = moving(input_ids)
        with simulate(model.get_decoder(), at(profile, taus)) as counts:
            want = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        now = backend.counts()
        assert torch.equal(now.pairs - seen.pairs, counts.pairs)
        assert torch.equal(now.dropped - seen.dropped, counts.dropped)
        seen = now
    assert graphs["unique_graphs"] - before == len(backend.compile_ids) == 1


@torch.no_grad()
def test_counts_are_those_of_the_simulation_in_every_graph(model, profile):
    backend = modes_fx.backend(profile, lowering="eager", counting=True)
    # As many graphs as layers, and the modality from their caller.
    for layer in (decoder := copy.deepcopy(model).get_decoder()).layers:
        layer.compile(backend=backend)
    with simulate(model.get_decoder(), profile) as want:
        for length in (16, 5):
            ids = tiny_inputs(batch=2)["input_ids"][:, :length]
            decoder(input_ids=ids, use_cache=False)
            model.get_decoder()(input_ids=ids, use_cache=False)
    got = backend.counts()
    assert torch.equal(got.pairs, want.pairs) and torch.equal(got.dropped, want.dropped)
    assert want.dropped[:, 2].sum() == 0 < want.pairs[:, 2].sum() and 0.1 < want.skip() < 0.9


@torch.no_grad()
@pytest.mark.parametrize("adjustable", [False, True])
def test_a_text_only_model_is_counted_as_text(model, profile, input_ids, adjustable):
    text_only = dataclasses.replace(profile, visual_token_ids=(), special_token_ids=())
    backend = modes_fx.backend(text_only, lowering="eager", counting=True, adjustable=adjustable)
    compiled(model, backend)(input_ids)
    assert [block.specialised[0] for block in backend.graphs[0].blocks] == ["no mask"] * 2
    counts = backend.counts()
    assert counts.pairs.tolist() == [[4 * input_ids.numel(), 0, 0]] * 2
    assert 0 < counts.skip() == counts.skip(0) < 1


@torch.no_grad()
def test_by_name_the_thresholds_are_those_of_the_options(model, profile, input_ids, monkeypatch):
    made = []
    init = modes_fx.Backend.__init__
    monkeypatch.setattr(
        modes_fx.Backend,
        "__init__",
        lambda self, *args, **kwargs: made.append(self) or init(self, *args, **kwargs),
    )
    options = {"profile": profile, "lowering": "eager"}
    for adjustable in (False, True):
        compiled(model, "modes_fx", options={**options, "adjustable": adjustable})(input_ids)
        torch._dynamo.reset()
    assert [backend.thresholds is None for backend in made] == [True, False]


# Attached.


@torch.no_grad()
def test_attached_thresholds_move_to_the_bits_of_a_new_profile(model, profile):
    inputs = tiny_inputs()
    got = []
    with modes_fx.attach(model, profile, adjustable=True, counting=True) as attached:
        for taus in TAUS:
            before = attached.counts()
            attached.thresholds.set(text=taus[0], vision=taus[1])
            got.append(model(**inputs).logits)
            after = attached.counts()
            got.append(after.dropped - before.dropped)
    for index, taus in enumerate(TAUS):
        with modes_fx.attach(model, at(profile, taus)):
            assert torch.equal(model(**inputs).logits, got[2 * index]), taus
        with simulate(model, at(profile, taus)) as counts:
            model(**inputs)
        assert torch.equal(counts.dropped, got[2 * index + 1])


@torch.no_grad()
def test_attached_and_compiled_by_others_the_tensor_is_read_at_each_run(model, profile):
    inputs = tiny_inputs(grid=None)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    with modes_fx.attach(model, profile, adjustable=True, counting=True) as attached:
        # aot_eager functionalises, as Inductor has it done.
        call = torch.compile(model, backend="aot_eager")
        compiled_once = None
        for taus in TAUS:
            attached.thresholds.set(text=taus[0], vision=taus[1])
            counts = [attached.counts()]
            logits = []
            for each in (call, model):
                logits.append(each(**inputs).logits)
                counts.append(attached.counts())
            torch.testing.assert_close(*logits)
            dropped = [after.dropped - before.dropped for before, after in itertools.pairwise(counts)]
            assert torch.equal(*dropped)
            compiled_once = compiled_once or graphs["unique_graphs"]
        assert graphs["unique_graphs"] == compiled_once > before


# Counting by threads.


def test_threads_count_into_tensors_of_their_own():
    counter = PairCounter(3)
    ones = torch.ones(2, 2, 3, dtype=torch.int64)
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(500):
            counter.add(torch.tensor([0, 2]), ones)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = counter.read()
    assert counts.pairs.tolist() == counts.dropped.tolist() == [[2000] * 3, [0] * 3, [2000] * 3]


def test_counting_starts_in_inference_mode_and_goes_on_without():
    counter = PairCounter(1)
    for mode in (True, False):
        with torch.inference_mode(mode):
            counter.add(torch.tensor([0]), torch.ones(1, 2, 3, dtype=torch.int64))
    assert counter.read().pairs.tolist() == [[2, 2, 2]]
