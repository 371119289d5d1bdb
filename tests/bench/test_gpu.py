"""What of bench/gpu.py runs without a GPU: everything but the timing of a CUDA graph."""

import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
import triton
from gpu import OURS, arguments, counted_launches, in_turns, make_runs, measure_all, percentiles, problem_of
from layers import Case, Layer, make_call, needed
from limits import timing_table

from modes_fx.kernels._masked_moe_triton import masked_moe_triton
from modes_fx.kernels.masked_moe import reference

TINY = Layer("tiny", hidden=64, intermediate=32, experts=8, slots=2)
WIDE = TINY._replace(model="wide", intermediate=64)


@pytest.fixture
def call():
    made = make_call(Case(TINY, 20, 0.5))
    gpu.randomise(made)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2():
    child = subprocess.run([sys.executable, gpu.__file__], capture_output=True, text=True)
    assert child.returncode == 2
    assert "No CUDA GPU here" in child.stderr
    assert "roofline.md" in child.stderr


def test_quick_is_a_part_and_compiles_nothing():
    options = arguments(["--quick"])
    assert options.no_compile
    assert set(options.skip) < set(arguments([]).skip)
    with pytest.raises(SystemExit):
        arguments(["--tokens", "17"])
    with pytest.raises(SystemExit):
        arguments(["--rounds", "1"])


@pytest.mark.parametrize("name", ["modes_fx", "grouped_mm", "grouped_mm, dropped", "batched_mm"])
def test_everybody_computes_the_same_layer(name, call):
    got = make_runs(call, TINY, compiled=False)[name]()
    drops = name in (OURS, "grouped_mm, dropped")
    wide = {x: getattr(call, x).float() for x in ("hidden", "weights", "gate_up", "down")}
    want = reference(**vars(call) | wide | ({} if drops else {"tau_text": 0.0}))
    torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03)
    assert (
        not torch.allclose(want, reference(**vars(call) | wide | {"tau_text": 0.0}), atol=0.03) or not drops
    )


def test_what_gathers_too_much_is_left_out(call, monkeypatch):
    monkeypatch.setattr(gpu, "MOST_GATHERED", 1000)
    assert "batched_mm" not in make_runs(call, TINY, compiled=False)


def test_compiled_peers_have_names_of_their_own(call):
    runs = make_runs(call, TINY, compiled=True)
    assert set(runs) == {OURS} | {
        name + way
        for name in ("grouped_mm", "grouped_mm, dropped", "batched_mm")
        for way in ("", ", compiled")
    }


def test_a_wrong_result_is_a_problem(call):
    right = reference(**vars(call))
    assert problem_of(call, right) == ""
    wrong = right.clone()
    wrong[3, 5] += 1
    assert "off by" in problem_of(call, wrong)
    assert "off by nan" in problem_of(call, torch.where(wrong == wrong[0, 0], torch.nan, right))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="launches in the interpreter")
def test_launches_are_counted(call):
    with counted_launches() as names:
        masked_moe_triton(call)
    assert len(names) >= 2
    with counted_launches() as none:
        pass
    masked_moe_triton(call)
    assert none == []


def test_timers_take_turns():
    order = []
    times = in_turns({name: lambda name=name: order.append(name) or 1.0 * len(order) for name in "ab"}, 3)
    assert order == list("ababab")
    assert times == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_percentiles():
    assert percentiles([float(i) for i in range(101)]) == (20, 50, 80)


@pytest.fixture
def measured(monkeypatch):
    """The whole program but for the GPU: cases of two tiny layers, and a clock of its own."""
    monkeypatch.setattr(gpu, "CASES", [Case(layer, 16, s) for layer in (TINY, WIDE) for s in (0.0, 0.5)])
    monkeypatch.setattr(gpu, "graph_timer", lambda run, flush: run() is not None and (lambda: 7.0))
    return measure_all(arguments(["--no-compile", "--rounds", "3"]), "cpu")


def test_the_report_names_gpu_and_versions():
    made = {"name": "NVIDIA H100 80GB HBM3", "day": "2030-01-01", "rounds": 100, "cuda": "13.0"}
    made |= {"transformers": gpu.transformers_version(), **gpu.versions()}
    text = gpu.INTRODUCTION.format(**made)
    assert all(str(value) in text for name, value in made.items() if name != "python")


def test_the_table_has_every_case(measured):
    timings, plain = measured
    assert [timing.case.skip for timing in timings] == [0.0, 0.5, 0.0, 0.5]
    assert timings[1].needed == needed(make_call(Case(TINY, 16, 0.5)))
    assert timings[0].spread == (7.0, 7.0)
    assert plain[0]["us"][OURS] == {"p20": 7.0, "p50": 7.0, "p80": 7.0}
    table = timing_table(timings, None, "us")
    assert table.count("### ") == 2
    assert "grouped_mm, dropped" in table


def test_nothing_wrong_is_timed(monkeypatch):
    monkeypatch.setattr(gpu, "CASES", [Case(TINY, 16, 0.5)])
    monkeypatch.setattr(gpu, "masked_moe", lambda **call: call["hidden"])
    with pytest.raises(SystemExit, match="Nothing is timed that is wrong"):
        measure_all(arguments(["--no-compile"]), "cpu")


def test_the_module_does_not_interpret():
    """bench/gpu.py must not import what counts in the interpreter: Triton would launch nothing."""
    code = "import gpu, os, sys; assert 'TRITON_INTERPRET' not in os.environ and 'work' not in sys.modules"
    environment = {"PYTHONPATH": str(Path(gpu.__file__).parent), "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
