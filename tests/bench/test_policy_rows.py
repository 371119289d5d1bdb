"""What bench/policies*.py record, and the tables they make of it, on tiny models and made-up records."""

from typing import Any

import numpy as np
import pytest
import torch
from kept_experts import leave_out_dropped
from policies_samples import of_tasks
from policies_tried import by_expert, by_phase, first_kept, output_lengths
from policy_rows import as_found
from policy_tables import TEMPERED, difference, load, save, tables, verdict

from modes_fx import demo
from modes_fx.blocks import find_blocks
from modes_fx.measure import Meter
from modes_fx.modality import TEXT, VISION
from modes_fx.policies.two_thresholds import dmt, tempered
from modes_fx.skipping import Tokens, thresholds
from modes_fx.testing import IMAGE, SPECIAL, VIDEO, tiny_inputs, tiny_qwen3_vl_moe

IDS = ((IMAGE, VIDEO), SPECIAL)
WEIGHTS = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2]])


def row(policy: str, kl_sums: list[float], **more: Any) -> dict[str, Any]:
    kl = sum(kl_sums) / (2 * len(kl_sums))
    figures: dict[str, Any] = {"kl": kl, "kl_low": kl / 2, "kl_high": 2 * kl}
    figures |= {"skip": 0.83, "flips": 0.01, "passes": 5.0}
    tasks = {task: [0.9, 0.8, 1.0] for task in demo.TASKS}
    figures |= {"accuracy": 0.9, "accuracy_interval": [0.8, 1.0], "tasks": tasks}
    return {"policy": policy, "rate": 0.83, **figures, "kl_sums": " ".join(map(str, kl_sums)), **more}


def test_pairs_decide_where_intervals_overlap():
    generator = np.random.default_rng(0)
    hard = generator.exponential(0.1, 200)  # what is hard is hard for both
    tokens = [2] * 200
    one, two = row("one", (hard + 0.01).tolist()), row("two", hard.tolist())
    more, low, high = difference(one, two, tokens)
    assert more == pytest.approx(0.005) and low == pytest.approx(0.005) and high == pytest.approx(0.005)
    assert verdict(low, high) == "worse"
    assert verdict(*difference(two, one, tokens)[1:]) == "better"
    noise = row("noise", (hard + generator.normal(0, 0.05, 200)).tolist())
    assert verdict(*difference(noise, two, tokens)[1:]) == "as good"
    assert difference(one, one, tokens) == (0, 0, 0)


def test_a_record_and_its_tables(tmp_path):
    generator = np.random.default_rng(0)
    hard = generator.exponential(0.1, 60)
    rows = [row(TEMPERED, hard.tolist()), row("MoDES", (hard + 0.02).tolist())]
    rows.append({"policy": "NAEE", "rate": 0.83, "unreached": "at most 0.75"})
    record = {"settings": {"passes": 5}, "about": "A model.", "answer_tokens": [2] * 60, "rows": rows}
    save(tmp_path / "record.json", record)
    assert load(tmp_path / "record.json") == record
    assert load(tmp_path / "none.json") == {}
    text = tables(record)
    assert f"| MoDES | {rows[1]['kl']:.5f} worse |" in text
    assert f"| {TEMPERED} | {rows[0]['kl']:.5f} |" in text
    assert "+0.01000, +0.01000 to +0.01000" in text
    assert "| NAEE | not reached |" in text.splitlines()
    assert "| NAEE | not reached | at most 0.75 |" in text
    for line in text.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_the_first_choice_is_kept_at_any_strength():
    of = Tokens(torch.tensor([TEXT, VISION], dtype=torch.uint8), torch.ones(2).bool())
    policy = first_kept(dmt([1.0]))
    got = policy.rule((0.0,), policy.strengths[1])(0, WEIGHTS, of)
    assert got.tolist() == [[False, True, True, True], [True, False, True, True]]


def test_changed_policies_are_the_plain_ones_where_the_change_is_nothing():
    of = Tokens(
        torch.tensor([TEXT, VISION], dtype=torch.uint8),
        torch.ones(2).bool(),
        phase=torch.tensor([1, 0], dtype=torch.uint8),
        experts=torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]),
    )
    alphas = [(0.3, 0.7)]
    plain = tempered(alphas).rule((-0.5, 0.25), -1.2)(0, WEIGHTS, of)
    phases = by_phase(alphas)
    assert torch.equal(phases.rule((-0.5, -0.5, 0.25), -1.2)(0, WEIGHTS, of), plain)
    decoded_go = phases.rule((-0.5, 9.0, 0.25), -1.2)(0, WEIGHTS, of)
    assert decoded_go[0].all() and torch.equal(decoded_go[1], plain[1])
    lengths = [torch.tensor([0.1, 1.0, 1.0, 1.9])]
    assert torch.equal(by_expert(alphas, lengths).rule((-0.5, 0.25, 0.0), -1.2)(0, WEIGHTS, of), plain)
    assert by_expert(alphas, lengths).rule((-0.5, 0.25, 9.0), -1.2)(0, WEIGHTS, of)[0, 0]
    limits = torch.tensor([[0.2, float("inf")]])
    found = as_found(limits).rule((), 0.0)(0, WEIGHTS, of)
    assert found.tolist() == [[False, False, False, True], [True] * 4]


def test_leaving_dropped_pairs_out_measures_the_same():
    inputs = tiny_inputs(text=13, batch=3, grid=(8, 8), seed=0)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    batches = [{**inputs, "labels": labels}]
    rule = thresholds([(1.0, 1.0)] * 2, 0.25, 0.3)
    model = tiny_qwen3_vl_moe(num_layers=2)
    plain = Meter(model, batches, *IDS).measure(rule)
    lengths = output_lengths(find_blocks(model), [torch.ones(5, model.config.text_config.hidden_size)] * 2)
    leave_out_dropped(model)
    left_out = Meter(model, batches, *IDS).measure(rule)
    assert 0.2 < plain.skip < 0.9
    assert torch.equal(left_out.counts.dropped, plain.counts.dropped)
    assert left_out.kl == pytest.approx(plain.kl, rel=1e-3)
    again = output_lengths(find_blocks(model), [torch.ones(5, model.config.text_config.hidden_size)] * 2)
    assert torch.allclose(torch.stack(lengths), torch.stack(again), rtol=1e-3)
    assert all(each.mean().item() == pytest.approx(1) for each in lengths)


def test_samples_of_some_tasks():
    batches = of_tasks(("color", "easyvqa"), 7, 3)
    assert sorted(task for batch in batches for task in batch["task"]) == ["color"] * 4 + ["easyvqa"] * 3
    assert [len(batch["labels"]) for batch in batches] == [3, 1, 3]
    assert len({batch["input_ids"].shape[1] for batch in batches}) == 1
    for batch in batches:
        assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(-1).sum())
