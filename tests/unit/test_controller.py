"""`Controller`: thresholds that follow a target, within bounds, from counts alone."""

import dataclasses
import json
import math
import statistics
import threading

import pytest
import torch

import modes_fx
from modes_fx.controller import Controller
from modes_fx.errors import ProfileError
from modes_fx.profile import Layer, Profile
from modes_fx.skipping import Counts
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe
from modes_fx.thresholds import Thresholds

TEXT, VISION, SPECIAL = 10, 5, 1


@pytest.fixture
def profile():
    return Profile(
        layers=(Layer("mlp", 1.0, 1.0, 8, 4, "0" * 64),),
        tau_text=0.1,
        tau_vision=0.2,
        visual_token_ids=(VISION,),
        special_token_ids=(SPECIAL,),
        vocab_size=20,
        hidden_size=8,
        target_skip=0.5,
    )


class Traffic:
    """A model that is nothing but its skip rate: pairs of text and vision, whose weights are uniform in
    log(w) over [low, 1], so that the skip rate at tau is known."""

    def __init__(self, profile, adjustable=True):
        self.profile = profile
        self.thresholds = Thresholds(profile, adjustable)
        self.counting = True
        self.total = Counts.zero(1)

    def call(self, text, vision, low_text=1e-3, low_vision=1e-2, special=50):
        pairs = torch.tensor([text, vision, special])
        rates = [
            min(max(1 - math.log(tau) / math.log(low), 0.0), 1.0)
            for tau, low in ((self.thresholds.text, low_text), (self.thresholds.vision, low_vision))
        ]
        dropped = torch.tensor([round(text * rates[0]), round(vision * rates[1]), 0])
        self.total = Counts(self.total.pairs + pairs, self.total.dropped + dropped)
        return float(dropped.sum() / (text + vision))

    def counts(self):
        return self.total


@pytest.fixture
def traffic(profile):
    return Traffic(profile)


def hold(controller, traffic, calls, *mix, **weights):
    skips = []
    for _ in range(calls):
        skips.append(traffic.call(*mix, **weights))
        controller.step()
    return skips


def test_the_skip_rate_returns_to_the_target_when_the_mix_drifts(traffic):
    controller = Controller(traffic, 0.7, every=2, min_pairs=1)
    for mix in ((1000, 9000), (9000, 1000), (0, 5000), (5000, 0)):
        skips = hold(controller, traffic, 60, *mix)
        assert all(abs(skip - 0.7) < 0.002 for skip in skips[-10:]), (mix, skips[-3:])


def test_the_mean_error_is_bounded_whatever_the_traffic_does(traffic):
    controller = Controller(traffic, 0.7, every=1, min_pairs=1, gain=0.5)
    generator = torch.Generator().manual_seed(0)
    errors, bounds = [], []
    for _ in range(400):
        text, vision = torch.randint(1, 5000, (2,), generator=generator).tolist()
        traffic.call(text, vision, low_text=10.0 ** -float(torch.rand(1, generator=generator) * 3 + 1))
        reading = controller.step()
        errors.append(0.7 - reading.skip)
        bounds.append(reading.at_bound)
    assert not any(bounds)
    assert max(map(abs, errors)) > 0.1
    assert abs(math.fsum(errors) / 400) <= controller.length / (0.5 * 400)


def test_until_the_first_reading_the_thresholds_are_the_profiles(traffic, profile):
    controller = Controller(traffic, 0.9, every=3, min_pairs=1)
    for _ in range(2):
        traffic.call(100, 100)
        assert controller.step() is None
        assert (traffic.thresholds.text, traffic.thresholds.vision) == (profile.tau_text, profile.tau_vision)
    traffic.call(100, 100)
    assert controller.step().tau_text > profile.tau_text


def test_the_ratio_of_text_to_vision_stays_the_profiles(traffic):
    controller = Controller(traffic, 0.9, every=1, min_pairs=1)
    for _ in range(5):
        traffic.call(500, 100)
        reading = controller.step()
        assert reading.tau_vision / reading.tau_text == pytest.approx(2)


def test_a_reading_of_few_pairs_waits_for_more(traffic):
    controller = Controller(traffic, 0.9, every=1, min_pairs=250)
    readings = []
    for _ in range(6):
        traffic.call(50, 50)
        readings.append(controller.step())
    assert [reading is not None for reading in readings] == [False, False, True] * 2
    assert readings[2].pairs == readings[5].pairs == 300


def test_at_a_bound_it_stops_and_comes_back_at_once(traffic, profile):
    controller = Controller(traffic, 0.7, bounds=(0.5, 2.0), every=1, min_pairs=1, gain=1.0)
    # Weights so small that more than the target is dropped at the least thresholds.
    for _ in range(50):
        traffic.call(1000, 0, low_text=1e-30)
        reading = controller.step()
    assert reading.at_bound and (reading.tau_text, reading.tau_vision) == (0.05, 0.1)
    traffic.call(1000, 0, low_text=0.01)
    before, reading = controller.place, controller.step()
    assert not reading.at_bound and controller.place == before + (0.7 - reading.skip)


def test_a_path_is_followed_from_the_point_next_to_the_profiles(traffic):
    path = [(0.05, 0.2), (0.1, 0.2), (0.1, 0.8)]
    controller = Controller(traffic, 1.0, path=path, every=1, min_pairs=1, gain=0.3)
    assert controller.place == pytest.approx(math.log(2))
    seen = []
    for _ in range(40):
        traffic.call(1000, 1000)
        reading = controller.step()
        seen.append((reading.tau_text, reading.tau_vision))
    assert all(text == pytest.approx(0.1) for text, _ in seen)
    assert [vision for _, vision in seen] == sorted(vision for _, vision in seen)
    assert seen[-1] == (0.1, 0.8) and reading.at_bound
    controller.target_skip = 0.0
    hold(controller, traffic, 40, 1000, 1000)
    assert (traffic.thresholds.text, traffic.thresholds.vision) == (0.05, 0.2)


@pytest.mark.parametrize("fixed", [0.0, math.inf])
def test_a_threshold_without_multiples_stays_and_the_other_moves(profile, fixed):
    traffic = Traffic(profile.with_thresholds(tau_vision=fixed))
    controller = Controller(traffic, 0.5, every=1, min_pairs=1)
    assert controller.place == pytest.approx(math.log(4))
    for dropped, factor in ((0, math.exp(0.5)), (100, 1.0)):
        traffic.total = Counts(
            traffic.total.pairs + torch.tensor([100, 0, 0]),
            traffic.total.dropped + torch.tensor([dropped, 0, 0]),
        )
        reading = controller.step()
        assert (reading.tau_text, reading.tau_vision) == (pytest.approx(0.1 * factor), fixed)


def test_special_tokens_are_left_out(traffic):
    controller = Controller(traffic, 0.7, every=1, min_pairs=1)
    traffic.call(100, 100, special=10**6)
    reading = controller.step()
    assert reading.pairs == 200 and reading.skip == pytest.approx(0.655, abs=0.01)


def test_what_was_counted_before_is_not_read(traffic):
    traffic.call(10**6, 0, low_text=0.5)
    controller = Controller(traffic, 0.7, every=1, min_pairs=1)
    traffic.call(0, 100)
    assert controller.step().pairs == 100


def test_threads_count_each_call_once(traffic):
    controller = Controller(traffic, 0.5, every=10, min_pairs=1)
    traffic.call(100, 100)
    readings = []

    def work():
        for _ in range(100):
            reading = controller.step()
            if reading is not None:
                readings.append(reading)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(readings) == controller.readings == 1
    traffic.call(100, 100)
    assert [controller.step() is not None for _ in range(10)] == [False] * 9 + [True]


# State.


def test_a_saved_state_goes_on_where_it_was(traffic, profile, tmp_path):
    controller = Controller(traffic, 0.8, every=1, min_pairs=1)
    hold(controller, traffic, 7, 1000, 300)
    controller.save(tmp_path / "state.json")
    other = Traffic(profile)
    resumed = Controller(other, 0.8, every=1, min_pairs=1)
    resumed.load(tmp_path / "state.json")
    assert resumed.readings == 7
    assert resumed.place == pytest.approx(controller.place, abs=1e-12)
    assert hold(resumed, other, 20, 300, 1000) == hold(controller, traffic, 20, 300, 1000)


def test_a_state_of_another_profile_or_of_nothing_is_refused(traffic, profile, tmp_path):
    controller = Controller(traffic, 0.8, every=1, min_pairs=1)
    path = tmp_path / "state.json"
    controller.save(path)
    state = json.loads(path.read_text())
    other = Controller(Traffic(dataclasses.replace(profile, kl=0.5)), 0.8)
    with pytest.raises(ProfileError, match="another profile"):
        other.load(path)
    for text in ("", "[1]", "\x00", json.dumps({**state, "version": 2})):
        path.write_text(text)
        with pytest.raises(ProfileError, match="holds no state"):
            controller.load(path)
    for damage in ({"tau_text": None}, {"tau_vision": math.nan}, {"readings": -1}, {"tau_text": -1.0}):
        path.write_text(json.dumps({**state, **damage}))
        with pytest.raises(ProfileError, match="is damaged"):
            controller.load(path)
    assert traffic.thresholds.text == profile.tau_text and controller.readings == 0


# What it refuses.


def test_a_model_that_is_not_adjustable_or_does_not_count_is_refused(profile):
    for options in ({}, {"adjustable": True}, {"counting": True}):
        with pytest.raises(ValueError, match="adjustable=True and counting=True"):
            Controller(modes_fx.backend(profile, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_skip": 1.5}, "target_skip must be from 0 to 1, got 1.5"),
        ({"every": 0}, "every, min_pairs and gain must be above zero"),
        ({"gain": -1.0}, "every, min_pairs and gain must be above zero"),
        ({"gain": math.nan}, "every, min_pairs and gain must be above zero"),
        ({"bounds": (2.0, 4.0)}, "bounds must be factors"),
        ({"bounds": (1.0, 1.0)}, "bounds must be factors"),
        ({"path": [(0.1, 0.2)]}, "two points or more"),
        ({"path": [(0.0, 0.2), (0.1, 0.2)]}, "finite and above zero"),
        ({"path": [(0.1, 0.2), (0.1, 0.2)]}, "one threshold that changes"),
        ({"path": [(0.1, 0.2), (0.1, 0.2), (0.2, 0.2)]}, "must differ"),
        ({"bounds": (0.1, 2.0)}, "out of the bounds that the model was compiled with"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(profile, options, message):
    with pytest.raises(ValueError, match=message):
        Controller(Traffic(profile, (0.25, 4.0)), **options)


def test_a_profile_without_target_or_thresholds_is_refused(profile):
    with pytest.raises(ValueError, match="target_skip must be from 0 to 1, got None"):
        Controller(Traffic(profile.with_thresholds()))
    with pytest.raises(ValueError, match="Has the profile been searched"):
        Controller(Traffic(profile.with_thresholds(tau_text=0.0, tau_vision=0.0)), 0.5)


def test_the_bounds_of_the_model_can_be_those_of_the_controller(profile):
    bounds = (0.3, 2.7)
    traffic = Traffic(profile, bounds)
    controller = Controller(traffic, 0.0, bounds=bounds, every=1, min_pairs=1)
    hold(controller, traffic, 30, 1000, 1000)
    assert controller.place == 0.0
    controller.target_skip = 1.0
    hold(controller, traffic, 60, 1000, 1000)
    assert controller.place == controller.length


# A real model.


@torch.no_grad()
def test_a_model_whose_traffic_drifts_keeps_its_skip_rate():
    model = tiny_qwen3_vl_moe(num_layers=2)
    profile = tiny_profile(model, tau_text=0.03, tau_vision=0.12)
    picture, text = {"grid": (8, 8), "text": 6}, {"grid": None, "text": 30}
    phases = ([text, picture] * 15, [text] * 40, [picture] * 40)

    def run(target):
        """Skip rate of each pair of calls, a list for each phase."""
        with modes_fx.attach(model, profile, adjustable=True, counting=True) as attached:
            # Without a target it only looks.
            gain = 1e-9 if target is None else None
            controller = Controller(attached, target or 0.5, every=2, min_pairs=1, gain=gain)
            skips = []
            for kinds in phases:
                readings = []
                for seed, kind in enumerate(kinds):
                    model(**tiny_inputs(seed=seed, **kind))
                    readings.append(controller.step())
                skips.append([reading.skip for reading in readings if reading is not None])
            return skips

    mean = statistics.mean
    first, *fixed = run(None)
    target = mean(first)
    controlled = run(target)
    # Fixed thresholds are 9 points below the target on text and 13 above it on pictures.
    assert mean(fixed[0]) < target - 0.07 and mean(fixed[1]) > target + 0.1
    for skips in controlled:
        settled = skips[-12:]
        assert abs(mean(settled) - target) < 0.01
        assert max(abs(skip - target) for skip in settled) < 0.05
