"""The runner of bench/run.py on tiny shapes: what is timed is right, and what is said follows from it."""

import importlib.util
import json
from dataclasses import replace

import block_peers
import model_peers
import pytest
import run
import torch
from cases import FAMILIES, Case, quick
from compare import compare
from interleave import Run, interleave, ratios, spread
from kt_peer import Absent, Pool
from memory import Regions
from plot_speed import plot
from report import markdown, speedup_table, tables
from routing import prescribe
from targets import TARGETS, Target, check_targets, falls, over, over_limit, render_targets

from modes_fx.kernels.masked_moe import keep_mask
from modes_fx.skipping import simulate

PEERS = (
    "grouped_mm",
    "grouped_mm, dropped",
    "grouped_mm, zeroed",
    "batched_mm",
    "eager, dropped",
    "pure read",
)
TINY = Case("block-decode", "block", "float32", "native", 32, 16, 8, 4, 6, 0.0, 0.5, only=PEERS, budget_s=0.0)
MODEL = Case("model-decode", "model", "float32", "native", 128, 16, 8, 4, 1, 0.5, 0.5, layers=2, prompt=16)


def routed(**changes):
    options = {"tokens": 64, "num_experts": 16, "top_k": 4, "hidden": 8, "skip": 0.75, "vision": 0.5}
    options |= {"dtype": torch.float32, "generator": torch.Generator().manual_seed(0), **changes}
    return prescribe(**options)


def entry(name="a", skip=0.0, ours=(1.0, 1.0, 1.0), over_ours=None, **case):
    return {
        "id": f"{name} T1 skip {skip}",
        "case": {"family": name, "skip": skip, **case},
        "ms": {"modes_fx": list(ours)},
        "over_ours": over_ours or {},
    }


def test_passes_go_forth_and_back():
    order = []
    runs = {name: Run(lambda sample, name=name: order.append((name, sample))) for name in "abc"}
    spent = interleave(runs, budget_s=0, least=3)
    assert "".join(name for name, _ in order) == "abccbaabc"
    assert [sample for _, sample in order] == [0] * 3 + [1] * 3 + [2] * 3
    assert {name: len(values) for name, values in spent.items()} == {"a": 3, "b": 3, "c": 3}


def test_what_prepares_a_call_is_not_timed():
    now = [0.0]

    def takes(seconds):
        return lambda sample: now.__setitem__(0, now[0] + seconds)

    spent = interleave({"a": Run(takes(1), takes(5), clock=lambda: now[0])}, budget_s=0)
    assert spent["a"] == [1000.0] * 4


def test_the_best_of_several_calls_is_a_sample():
    now, seconds = [0.0], iter([3, 1, 2] * 4)

    def call(sample):
        now[0] += next(seconds)

    assert interleave({"a": Run(call, clock=lambda: now[0], best_of=3)}, budget_s=0)["a"] == [1000.0] * 4


def test_ratios_are_taken_pass_by_pass():
    # The machine was twice as slow in the second pass; the ratio knows nothing of it.
    assert ratios([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [2.0, 3.5, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_drops_what_was_asked_for_and_as_the_rule_does(dtype):
    routing = routed(dtype=dtype)
    assert all(len(set(row)) == 4 for row in routing.experts.tolist())
    taus = 1.0, 1.0, routing.tau, routing.tau
    assert torch.equal(routing.keep, keep_mask(routing.weights, routing.modality, *taus))
    kept = int(routing.keep.sum())
    assert kept == 64 if dtype == torch.float32 else 64 <= kept < 72  # with ties


def test_one_token_keeps_a_whole_number_of_its_experts():
    for dropped in range(4):
        assert int(routed(tokens=1, skip=dropped / 4).keep.sum()) == 4 - dropped


def test_a_skip_rate_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="leaves none of 4 pairs"):
        routed(tokens=1, skip=0.95)


def test_a_read_reads_every_byte():
    # The last is read in several places at once, and leaves a rest.
    tensors = [torch.arange(8), torch.arange(100, 116), torch.arange((1 << 17) + 13)]
    regions = Regions(tensors)
    assert regions.bytes == 8 * (8 + 16 + (1 << 17) + 13)
    assert regions.read() == sum(int(tensor.sum()) for tensor in tensors)


def test_an_evicted_tensor_is_what_it_was():
    tensor = torch.arange(4096)
    Regions([tensor]).evict()
    assert torch.equal(tensor, torch.arange(4096))


@pytest.fixture(scope="module")
def entries():
    cases = [TINY, replace(TINY, skip=0.5), replace(TINY, skip=0.875)]
    with torch.no_grad():
        return run.run_block_cases(cases, None, lambda line: None)


def test_a_block_is_timed_beside_every_peer_that_is_asked_for(entries):
    full, half, most = entries
    assert set(full["ms"]) == {"modes_fx", "grouped_mm", "batched_mm", "pure read"}
    assert set(half["ms"]) == {*full["ms"], "grouped_mm, dropped", "eager, dropped"}
    assert set(most["ms"]) == {*half["ms"], "grouped_mm, zeroed"}
    assert [entry["kept_pairs"] for entry in entries] == [24, 12, 3]
    assert all(low <= middle <= high for low, middle, high in most["over_ours"].values())
    assert all(error < 1e-5 for entry in entries for error in entry["errors"].values())
    assert set(most["absent"].values()) == {block_peers.LEFT_OUT}


def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.setattr(block_peers, "_dropped", lambda module, sample: sample.routing.hidden)
    with torch.no_grad():
        (timed,) = run.run_block_cases([replace(TINY, skip=0.5)], None, lambda line: None)
    assert timed["absent"]["eager, dropped"].startswith("wrong, by")
    assert "eager, dropped" not in timed["ms"]


def test_nothing_is_timed_where_ours_is_wrong(monkeypatch):
    monkeypatch.setattr(block_peers, "_masked_moe", lambda weights, sample: sample.routing.hidden)
    with torch.no_grad(), pytest.raises(SystemExit, match="modes_fx is wrong"):
        run.run_block_cases([TINY], None, lambda line: None)


@pytest.mark.skipif(importlib.util.find_spec("kt_kernel") is not None, reason="it is installed")
def test_kt_kernel_is_absent_where_it_is_not_installed():
    with pytest.raises(Absent, match="not installed"):
        Pool(None)


def test_a_record_is_rendered_and_drawn(entries, tmp_path):
    record = {
        "command": "python bench/run.py",
        "date": "today",
        "machine": {"cpu": "a", "flags": ["avx2"], "cores": 1, "caches": {}, "memory_gib": 1},
        "versions": {"torch": "2.13"},
        "rates": {},
        "entries": json.loads(json.dumps(entries)),
        "targets": check_targets(entries),
    }
    text = markdown(record, "speed.png")
    assert "| grouped_mm, dropped / modes_fx | - |" in text
    assert len(tables(entries)) == 1
    header = speedup_table(entries).splitlines()[2]
    assert header == "| | 0 % | 50 % | 87.5 % |"
    plot(record, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_targets_are_judged_by_their_worst_case():
    target = Target("quick", {"family": ("a",)}, over("b"), least=2)
    good, bad = entry(skip=0.0, over_ours={"b": [2, 3, 4]}), entry(skip=0.5, over_ours={"b": [1, 1.9, 4]})
    other = entry("c", over_ours={"b": [0.1, 0.1, 0.1]})
    (result,) = check_targets([good, bad, other], [target])
    assert result["met"] is False
    assert (result["case"], result["value"], result["missed"]) == (bad["id"], [1, 1.9, 4], [bad["id"]])
    assert check_targets([good, other], [target])[0]["met"] is True


def test_what_was_not_measured_is_neither_met_nor_missed():
    (result,) = check_targets([entry()], [Target("quick", {"family": ("z",)}, over("b"), least=2)])
    assert result["met"] is None
    assert "not measured" in render_targets([result])


def test_no_slower_is_met_within_the_spread():
    even = Target("even", {"family": ("a",)}, over(), least=1, even=True)
    assert check_targets([entry(over_ours={"b": [0.9, 0.97, 1.01]})], [even])[0]["met"]
    assert not check_targets([entry(over_ours={"b": [0.9, 0.97, 0.99]})], [even])[0]["met"]


def test_the_fastest_peer_is_none_of_the_limits():
    assert over()(entry(over_ours={"b": [2, 2, 2], "dense GEMM": [1, 1, 1]}), []) == [2, 2, 2]


def test_a_limit_is_read_the_other_way_round():
    near = Target("near", {"family": ("a",)}, over_limit("pure read"), most=1.25)
    assert check_targets([entry(over_ours={"pure read": [0.5, 0.8, 1.0]})], [near])[0]["met"]
    (result,) = check_targets([entry(over_ours={"pure read": [0.5, 0.79, 1.0]})], [near])
    assert result["value"] == pytest.approx([1, 1 / 0.79, 2])
    assert not result["met"]


def test_what_the_slowest_limit_allows_is_said():
    ratios = {"b": [6, 6, 6], "dense GEMM": [0.1, 0.2, 0.3], "pure read": [0.5, 0.75, 0.8]}
    many, few = entry(over_ours=ratios, tokens=64), entry(over_ours=ratios, tokens=1)
    quick = Target("quick", {"family": ("a",)}, over("b"), least=7)
    assert check_targets([many], [quick])[0]["limit_allows"] == 8
    ratios["dense GEMM"] = [0.9, 0.96, 1.0]
    assert check_targets([many], [quick])[0]["limit_allows"] == 6 / 0.96
    assert check_targets([few], [quick])[0]["limit_allows"] == 8  # a product of one row is no limit


def test_falls_compares_a_case_with_the_same_without_skipping():
    full, most = entry(ours=(8, 9, 10)), entry(skip=0.5, ours=(1, 3, 4))
    assert falls(most, [full, most]) == [2, 3, 10]
    assert falls(most, [most]) is None


def test_every_target_has_cases():
    cases = [{"case": vars(case)} for family in FAMILIES.values() for case in family]
    for target in TARGETS:
        assert any(target.picks(case) for case in cases), target.claim


def test_case_names_are_distinct_and_the_quick_ones_are_among_them():
    cases = [case for family in FAMILIES.values() for case in family]
    names = [case.id for case in cases]
    assert len(set(names)) == len(names)
    small = [made.id for case in cases if (made := quick(case)) is not None]
    assert set(small) < set(names)
    assert {case.family for case in cases} == {name.split()[0] for name in small}


def test_compare_marks_what_the_spread_does_not_cover():
    base = {"entries": [entry("a", ours=(9, 10, 11)), entry("b", ours=(9, 10, 11)), entry("c")]}
    head = {"entries": [entry("a", ours=(4, 5, 6)), entry("b", ours=(10, 12, 14)), entry("d")]}
    rows = compare(base, head)
    assert [(row["id"][0], row["ratio"], row["change"]) for row in rows] == [
        ("a", 0.5, "quicker"),
        ("b", 1.2, ""),
    ]


@pytest.fixture(scope="module", params=["model-prefill", "model-decode"])
def subject(request):
    prefill = replace(MODEL, family="model-prefill", tokens=16, prompt=0)
    with torch.no_grad():
        yield model_peers.Subject(MODEL if request.param == "model-decode" else prefill)


def test_routing_of_a_model_is_spread_over_its_experts(subject):
    for layer in range(MODEL.layers):
        chosen = torch.cat([routing[layer][1].flatten() for routing in subject.routed])
        assert len(chosen.unique()) == MODEL.num_experts
    first, second = (torch.cat([routing[layer][1] for routing in subject.routed]) for layer in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("skip", [0.0, 0.5, 0.75])
def test_each_layer_of_a_model_skips_what_was_asked_for(subject, skip):
    quantiles = subject.quantiles(skip)
    with simulate(subject.model, subject.profile(quantiles)) as counts:
        for number in range(len(subject.routed)):
            subject.call(subject.model, number)
    for modality in (0, 1):
        if counts.pairs[:, modality].sum():
            rates = counts.skip_per_block(modality)
            assert rates == pytest.approx([skip] * MODEL.layers, abs=0.05)


@pytest.mark.parametrize(("experts", "dropped_to"), [("eager", 8), ("grouped_mm", 8), ("batched_mm", None)])
def test_peers_of_a_model_skip_the_same_pairs(subject, experts, dropped_to):
    quantiles = subject.quantiles(0.5)
    with simulate(subject.model, subject.profile(quantiles)):
        wanted = subject.call(subject.model, 0)
    model = model_peers.skipping_copy(subject, experts, dropped_to)
    model_peers.set_thresholds(model, subject, quantiles)
    torch.testing.assert_close(subject.call(model, 0), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - subject.call(subject.model, 0)).norm() > 1e-2 * wanted.norm()
    shared = model.get_decoder().layers[0].mlp.experts.gate_up_proj
    assert shared is subject.model.get_decoder().layers[0].mlp.experts.gate_up_proj
