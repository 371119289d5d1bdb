"""The demo end to end on few samples (graphs run as they are, not through Inductor), its plots and clock."""

import functools
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

import modes_fx
from modes_fx import demo
from modes_fx.main_job import Results, run_demo
from modes_fx.profile import Profile
from modes_fx.tables import print_results
from modes_fx.timing import decode_ms, interleaved_ms


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results, str]:
    """(folder, results, what was printed) of one small run."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes_fx, "backend", functools.partial(modes_fx.backend, lowering="eager"))
        results = run_demo(out, samples=13, test_samples=13, rounds=0, progress=False, console=console)
    assert isinstance(console.file, io.StringIO)
    return out, results, console.file.getvalue()


def test_the_demo_reaches_its_target_and_the_compiled_model_agrees_with_the_simulation(ran):
    _, results, _ = ran
    profile = Profile.load(ran[0] / "demo.modes.json")
    assert profile.measured_skip == pytest.approx(0.83, abs=0.01)
    assert results.kl["calibration"] == profile.kl
    assert results.max_logit_difference < 1e-4
    assert set(results.accuracy["compiled"]) == {*demo.TASKS, "mean"}


def test_the_demo_compares_every_policy_at_every_rate(ran):
    _, results, _ = ran
    assert [(row["target"], row["policy"]) for row in results.policies] == [
        (rate, policy)
        for rate in (0.5, 0.67, 0.83)
        for policy in ("modes_fx", "reduce-k", "reduce-k, renormalised")
    ]
    ours = results.policies[6]
    assert (ours["skip"], ours["kl"]) == (results.skip["all"], results.kl["test"])
    # The compiled model and the simulated one give the same answers; a draw may fall either way, once.
    assert ours["accuracy"] == pytest.approx(results.accuracy["compiled"]["mean"], abs=1 / 13 + 1e-9)


def test_the_demo_writes_its_results_and_plots(ran):
    out, results, printed = ran
    saved = json.loads((out / "results.json").read_text())
    assert saved["skip"] == results.skip and saved["policies"] == results.policies
    for name in ("alpha", "skip", "frontier"):
        assert min(Image.open(out / f"{name}.png").size) > 300
    assert "Accuracy on 13 test samples" in printed and "layers.5.mlp" in printed
    assert "CPU time" not in printed


def test_times_are_printed_beside_their_ratio(ran):
    out, results, _ = ran
    console = Console(file=io.StringIO(), width=100)
    results.prefill_ms = {"eager": 10.0, "modes_fx": 5.0}
    results.decode_ms_per_token = {"eager": 4.0, "modes_fx": 3.0}
    print_results(results, Profile.load(out / "demo.modes.json"), console)
    assert isinstance(console.file, io.StringIO)
    assert "5.00 (0.50)" in console.file.getvalue() and "3.00 (0.75)" in console.file.getvalue()


def test_runs_are_timed_in_turn_and_by_their_median(monkeypatch):
    clock = [0.0]
    order: list[str] = []
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])

    def run(name: str, costs: list[float]) -> Any:
        left = iter(costs)

        def once() -> None:
            order.append(name)
            clock[0] += next(left)

        return once

    runs = {"a": run("a", [0.001, 0.9, 0.003]), "b": run("b", [0.002, 0.002, 0.002])}
    assert interleaved_ms(runs, 3) == pytest.approx({"a": 3.0, "b": 2.0})
    assert order == ["a", "b"] * 3


def test_decode_time_is_per_token_without_prefill(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: clock[0])

    class Model:
        def generate(self, *, max_new_tokens: int, **given: Any) -> None:
            clock[0] += 1.0 + 0.25 * (max_new_tokens - 1)

    assert decode_ms({"m": Model()}, {}, 4, 1) == pytest.approx({"m": 250.0})
