"""run_passes: order, counts, switches, and what it tells the outside."""

import pytest
import torch
from torch._dynamo.utils import counters

from modes_fx.passes import PIPELINE, run_passes

NAMES = [
    "provide_modality",
    "skip_experts",
    "drop_modality",
    "delete_experts",
    "narrow_slots",
    "count_dropped",
    "drop_dead_code",
]


def test_the_pipeline_is_in_the_order_that_its_comment_gives():
    assert [each.__name__ for each in PIPELINE] == NAMES


def test_counts_what_each_pass_did(prefill, profile):
    unit = prefill.unit(profile)
    nodes = len(prefill.graph.nodes)
    done = run_passes(prefill.gm, unit, PIPELINE)
    assert done is unit.counts
    assert list(done) == NAMES
    assert (done["provide_modality"], done["skip_experts"]) == (1, 3)
    # Added: the modality, its reshape, three ops.
    assert len(prefill.graph.nodes) == nodes + 5 - done["drop_dead_code"]


def test_adds_to_dynamos_counters(prefill, profile):
    before = dict(counters["modes_fx"])
    done = run_passes(prefill.gm, prefill.unit(profile), PIPELINE)
    gained = {name: counters["modes_fx"][name] - before.get(name, 0) for name in NAMES}
    assert gained == done


def test_a_pass_that_changed_nothing_does_not_count(prefill, profile):
    run_passes(prefill.gm, prefill.unit(profile), PIPELINE)
    before = dict(counters["modes_fx"])
    run_passes(prefill.gm, prefill.unit(profile), PIPELINE[1:])
    assert dict(counters["modes_fx"]) == before


@pytest.mark.parametrize("name", NAMES)
def test_switches_off_by_exact_name(prefill, profile, name):
    unit = prefill.unit(profile)
    done = run_passes(prefill.gm, unit, PIPELINE, disable=[name])
    assert list(done) == [each for each in NAMES if each != name]


def test_with_every_pass_off_the_graph_stays(prefill, profile):
    before = str(prefill.graph)
    assert run_passes(prefill.gm, prefill.unit(profile), PIPELINE, disable=NAMES) == {}
    assert str(prefill.graph) == before


@pytest.mark.parametrize("unknown", ["skip", "SKIP_EXPERTS", "passes.skip_experts"])
def test_an_unknown_name_is_an_error_that_lists_the_known(prefill, profile, unknown):
    before = str(prefill.graph)
    with pytest.raises(ValueError, match=f"No pass is named {unknown}; the passes are {', '.join(NAMES)}"):
        run_passes(prefill.gm, prefill.unit(profile), PIPELINE, disable=[unknown])
    assert str(prefill.graph) == before


def test_the_code_runs_what_the_graph_says(prefill, profile):
    run_passes(prefill.gm, prefill.unit(profile), PIPELINE)
    assert prefill.gm.code.count("modes_fx.masked_moe") == 3


def test_a_graph_that_a_pass_broke_is_refused(prefill, profile):
    def uses_before_definition(gm, unit):
        nodes = list(gm.graph.nodes)
        nodes[-2].append(next(node for node in nodes if node.op == "call_function"))
        return 1

    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        run_passes(prefill.gm, prefill.unit(profile), [uses_before_definition])


def test_a_graph_without_experts_stays(trace, profile):
    (traced,) = trace(lambda x: (x * 2).sum(1), x=torch.randn(3, 8))
    before = str(traced.graph)
    unit = traced.unit(profile)
    assert set(run_passes(traced.gm, unit, PIPELINE).values()) == {0}
    assert str(traced.graph) == before
    assert (unit.modality, unit.modality_source) == (None, None)
    assert (unit.extra_inputs, unit.gives_modality) == ([], False)


def test_logs_the_rewrites_at_info(prefill, profile, caplog):
    with caplog.at_level("INFO", logger="modes_fx.passes.runner"):
        run_passes(prefill.gm, prefill.unit(profile), PIPELINE)
    assert [message.split(",")[0] for message in caplog.messages][:2] == [
        "provide_modality: 1 rewrites",
        "skip_experts: 3 rewrites",
    ]
