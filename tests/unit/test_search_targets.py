"""Targets other than one skip rate: modalities, phases, KL budgets, floors of tasks; and what is refused."""

import math
from typing import Any

import pytest
import torch

from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import SearchError
from modes_fx.profile import Profile
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe
from modes_fx.threshold_search.points import Frontier, Point
from modes_fx.threshold_search.search import ThresholdSearch, search
from modes_fx.threshold_search.targets import Target


def labelled(answer: int = 5, **given: Any) -> dict[str, Any]:
    inputs = tiny_inputs(**given)
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    return {**inputs, "labels": labels}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_vl_moe(num_layers=2)


@pytest.fixture(scope="module")
def batches(model) -> list[dict[str, Any]]:
    """The answers are what the model itself finds likeliest, so that it has accuracy to lose."""
    made = [labelled(text=20, batch=8, grid=(8, 8), seed=seed) for seed in range(2)]
    for batch in made:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with torch.no_grad():
            likeliest = model(**inputs).logits.argmax(-1)
        batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] == -100, -100, likeliest[:, :-1])
        batch["task"] = ["read", "count"] * 4
    return made


@pytest.fixture(scope="module")
def calibrated(model, batches) -> Profile:
    return calibrate(model, batches, special_token_ids=SPECIAL, progress=False)


@pytest.fixture(scope="module")
def searched(model, batches, calibrated) -> ThresholdSearch:
    return ThresholdSearch(model, batches, calibrated)


@pytest.mark.parametrize(
    "target",
    [
        Target(skip_vision=0.8),
        Target(skip_text=0.3, skip_vision=0.6),
        Target(skip_prefill=0.5),
        Target(skip_decode=0.4),
        Target(skip_prefill=0.6, skip_decode=0.2),
        Target(skip=0.5, skip_vision=0.3),
    ],
    ids=str,
)
def test_every_rate_is_reached_and_one_of_them_just_so(searched, target):
    point = searched.find(target)
    assert 0 <= target.excess(point) <= 0.01
    for name, rate in target.rates.items():
        assert getattr(point, name) >= rate
    reached = [p for p in searched.points if 0 <= target.excess(p) <= 0.01]
    assert point.kl == min(p.kl for p in reached)


def test_a_rate_of_one_modality_alone_leaves_the_other_nearly_alone(searched):
    """Dropping text pairs as well would only cost."""
    assert searched.find(Target(skip_vision=0.8)).skip_text < 0.1


def test_a_kl_budget_gives_the_most_skip_within_it(searched):
    tight, wide = (searched.find(Target(kl=budget)) for budget in (0.0005, 0.003))
    assert tight.kl <= 0.0005 and wide.kl <= 0.003
    assert tight.skip < wide.skip
    for budget, point in ((0.0005, tight), (0.003, wide)):
        assert point.skip == max(p.skip for p in searched.points if p.kl <= budget)
    assert wide.kl > 0.0015
    assert searched.find(Target(kl=0.0)).kl == 0.0


def test_the_upper_end_of_the_interval_may_be_what_stays_in_the_budget(searched):
    point = searched.find(Target(kl=0.003, kl_bound="upper"))
    assert 0 < point.kl < point.kl_high <= 0.003
    assert point.skip <= searched.find(Target(kl=0.003)).skip


def test_floors_of_tasks_hold_for_each_task(searched):
    unskipped = searched.meter.unskipped.accuracy
    assert unskipped == {"read": 1.0, "count": 1.0}
    point = searched.find(Target(task_floors=0.75))
    assert min(point.accuracy.values()) >= 0.75
    assert point.skip == max(p.skip for p in searched.points if min(p.accuracy.values()) >= 0.75)
    one = searched.find(Target(task_floors={"count": 0.75}))
    assert one.accuracy["count"] >= 0.75 and one.skip >= point.skip


def test_floors_of_tasks_can_bound_the_points_of_a_skip_rate(searched):
    free = searched.find(0.3)
    floored = searched.find(Target(skip=0.3, task_floors=0.5))
    assert 0.3 <= floored.skip <= 0.31 and min(floored.accuracy.values()) >= 0.5
    assert floored.kl >= free.kl
    with pytest.raises(SearchError, match=r"No thresholds were found for skip 0\.900, task floors"):
        searched.find(Target(skip=0.9, task_floors=1.0))


def test_a_rate_and_a_budget_that_cannot_both_be_had_are_named(searched):
    with pytest.raises(SearchError, match=r"No thresholds were found for skip_text 0\.900, KL 1e-06"):
        searched.find(Target(skip_text=0.9, kl=1e-6))


def test_search_sets_what_any_target_found(model, batches, calibrated, tmp_path):
    found = search(
        *(model, batches, calibrated),
        target=Target(kl=0.003),
        exponents=[1.0, 0.5],
        save_frontier=tmp_path / "frontier.json",
        progress=False,
    )
    assert found.target_skip is None and found.kl is not None and 0.0 < found.kl <= 0.003
    assert found.kl_low < found.kl < found.kl_high
    kept = Frontier.load(tmp_path / "frontier.json")
    assert {point.exponent for point in kept.points} == {1.0, 0.5}
    assert (found.kl, found.measured_skip) in {(point.kl, point.skip) for point in kept.points}


def test_a_frontier_is_what_no_point_beats_and_survives_the_file(tmp_path):
    rates = [(0.5, 0.2), (0.6, 0.1), (0.6, 0.3), (0.7, 0.1), (0.2, 0.0), (0.9, math.inf)]
    points = tuple(Point(0.1, math.inf, skip, skip, skip, kl) for skip, kl in rates)
    found = Frontier(points)
    assert [(p.skip, p.kl) for p in found.best] == [(0.2, 0.0), (0.7, 0.1), (0.9, math.inf)]
    found.save(tmp_path / "f.json")
    assert Frontier.load(tmp_path / "f.json") == found
    for text in ("", "[]", '{"format": "modes_fx.profile"}', '{"points": [{"skip": 1}]}'):
        (tmp_path / "f.json").write_text(text)
        with pytest.raises(SearchError, match=r"f\.json is not a file that Frontier\.save wrote"):
            Frontier.load(tmp_path / "f.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "The target asks for nothing"),
        ({"skip_vision": 1.5}, "target_skip_vision must be from 0 to 1, got 1.5"),
        (
            {"skip": 0.5, "kl": 0.1},
            "A skip rate asks for the least KL there, and a KL budget for the most skip",
        ),
        ({"kl": -1.0}, "A KL budget must be a finite number of nats >= 0, got -1.0"),
        ({"kl": math.nan}, "A KL budget must be a finite number"),
        ({"kl": 0.1, "kl_bound": "lower"}, "kl_bound must be mean or upper, got 'lower'"),
        ({"task_floors": 97}, "shares of the unskipped accuracy from 0 to 1, got 97"),
        ({"task_floors": {}}, "shares of the unskipped accuracy"),
    ],
)
def test_a_target_that_cannot_be_meant_is_refused(given, message):
    with pytest.raises(SearchError, match=message):
        Target(**given)


@pytest.mark.parametrize(
    ("batch", "target", "message"),
    [
        (labelled(grid=None), Target(skip_vision=0.5), "of vision tokens is asked for, and no batch has any"),
        (labelled(answer=1), Target(skip_decode=0.5), "of the decode is asked for, and every answer has one"),
        (labelled(), Target(task_floors=0.9), "task_floors need batches that name their tasks"),
        (
            {**labelled(), "task": "read"},
            Target(task_floors={"count": 0.9}),
            r"no batch is of task count; there are \['read'\]",
        ),
    ],
)
def test_batches_without_what_the_target_is_about_are_refused_before_the_model_runs(
    model, calibrated, batch, target, message
):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(SearchError, match=message):
        search(model, [batch], calibrated, target=target, progress=False)
    handle.remove()
    assert not calls


def test_one_target_is_needed_and_no_more(model, batches, calibrated):
    for given in ({}, {"target_skip": 0.5, "target": Target(skip=0.5)}):
        with pytest.raises(SearchError, match="Give target_skip, or target=Target"):
            search(model, batches, calibrated, progress=False, **given)


def test_a_part_that_special_tokens_keep_from_its_rate_is_refused(searched):
    with pytest.raises(SearchError, match=r"A skip rate of prefill of 1\.000 cannot be reached"):
        searched.find(Target(skip_prefill=1.0))
    assert searched.find(Target(skip_text=1.0, skip_vision=1.0)).skip == searched.highest_skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "grid"}, "method must be one of guided, staircase, exhaustive, got 'grid'"),
        ({"spacing": "log"}, "spacing must be one of rank, exp, linear, got 'log'"),
        ({"tolerance": math.nan}, "tolerance and grid must be above 0"),
        ({"exponents": []}, "exponents is empty"),
    ],
)
def test_an_unknown_option_is_refused_before_the_model_runs(model, batches, calibrated, given, message):
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(SearchError, match=message):
        search(model, batches, calibrated, target_skip=0.5, progress=False, **given)
    handle.remove()
    assert not calls


def test_the_methods_agree_on_a_model(model, batches, calibrated):
    """At the same rate on the same grid; only the guided search goes on between its points."""
    searches = {name: ThresholdSearch(model, batches, calibrated) for name in ("guided", "staircase")}
    walked = searches["staircase"].find(0.6, method="staircase", grid=12, leave_grid=False)
    led = searches["guided"].find(0.6, grid=12)
    assert walked.skip >= 0.6
    assert 0.6 <= led.skip <= 0.61 and led.kl <= 1.05 * walked.kl
    paper = searches["staircase"].find(0.6, method="staircase", grid=12, spacing="linear", leave_grid=False)
    assert paper.skip >= 0.6 and paper.tau_text <= 0.71
