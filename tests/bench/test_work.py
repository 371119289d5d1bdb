"""The least work of a call, and what the ratios over it mean."""

import json

import pytest
import torch
import triton
from layers import Case, Layer, make_call, markdown, needed
from work import by_argument, count, plain, report, row

TINY = Layer("tiny", hidden=64, intermediate=32, experts=8, slots=2)

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in the interpreter")


@pytest.mark.parametrize(("skip", "kept"), [(0.0, 66), (0.5, 33), (0.88, 8), (1.0, 1)])
def test_a_call_keeps_the_wanted_share_and_at_least_a_pair(skip, kept):
    call = make_call(Case(TINY, 33, skip))
    assert call.keep().sum() == kept == needed(call).pairs
    assert (call.experts.sort().values.diff() > 0).all()
    call.check()


def test_needed_is_each_byte_once():
    call = make_call(Case(TINY, 3, 0.0))
    call = call.__class__(
        **vars(call)
        | {
            "scores": torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.1, 0.1]]),
            "experts": torch.tensor([[1, 2], [2, 3], [4, 5]]),
            "tau_text": 0.5,
        }
    )
    least = needed(call)
    assert (least.pairs, least.experts) == (3, 2)
    assert least.flops == 6 * 64 * 32 * 3
    routing = 3 * 2 * (4 + 4 + 8) + 3
    assert least.bytes == 2 * (2 * 3 * 64 * 32) + 2 * (2 * 64) + 2 * (3 * 64) + routing


@interpreted
def test_ratios_are_over_the_needed():
    counts = count(Case(TINY, 40, 0.5))
    assert counts.flop_ratio == counts.total.flops / (6 * 64 * 32 * 40) >= 1
    assert counts.byte_ratio >= counts.distinct_ratio >= 1
    assert counts.total.programs >= counts.total.working > 0
    cells = row(counts)
    assert cells[2] == "40" and cells[-1] == str(len(counts.launches))
    written = json.loads(json.dumps(plain(counts)))
    assert written["launches"][-1]["stored"] == counts.launches[-1].stored
    assert f"loaded {next(iter(counts.launches[0].loaded))}" in by_argument(counts)


@interpreted
def test_idle_programs_are_told_from_working_ones():
    full, empty = count(Case(TINY, 64, 0.0)), count(Case(TINY, 64, 1.0))
    assert full.total.programs == empty.total.programs
    assert full.total.working > empty.total.working


def test_a_table_has_a_rule_below_its_header():
    assert markdown(["a", "b"], [["x", 1]]) == "| a | b |\n|---|---:|\n| x | 1 |\n"


def test_the_report_has_a_table_for_each_model_counted():
    assert "##" not in report([])
