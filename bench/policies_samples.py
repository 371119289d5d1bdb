"""How many calibration samples are enough, and of what: `python bench/policies_samples.py`.

The ablations of MoDES over the number and the kind of calibration samples (its Table III and what goes with
it; method notes 2.6), on the demo. alpha, the thresholds and all that a policy tunes come from the named
samples alone; skip rate and KL are measured on the same fresh samples of the test split, all tasks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from policies import RESULTS
from policy_rows import Subject, Tuning, said, test_bench
from policy_tables import MARGINAL, Row, load, markdown, save

from modes_fx import demo
from modes_fx.batches import Batch
from modes_fx.policies.policy import Bench
from modes_fx.policies.two_thresholds import tempered
from modes_fx.profile import write_atomically

COUNTS = (13, 26, 65, 130, 260)
DRAWS = 2  # of the smaller numbers
OF_A_KIND = 130
KINDS: dict[str, tuple[str, ...]] = {
    "colour questions": ("color", "tone"),
    "reading": ("digit", "read"),
    "counting and places": ("count", "exist", "spatial", "row"),
    "easy-VQA": ("easyvqa",),
}
GREY = "all tasks, pictures grey"


def of_tasks(tasks: Sequence[str], samples: int, batch_size: int) -> list[Batch]:
    """The first `samples` samples of the calibration split that are of these tasks."""
    every = -(-samples // len(tasks)) * len(demo.TASKS)
    ones = [row for row in demo.batches("calibration", every, batch_size=1) if row["task"][0] in tasks]
    by_size: dict[Any, list[Any]] = {}
    for row in ones[:samples]:
        by_size.setdefault(row["pixel_values"].shape, []).append(row)
    return [
        joined(rows[start : start + batch_size])
        for rows in by_size.values()
        for start in range(0, len(rows), batch_size)
    ]


def joined(rows: Sequence[Batch]) -> Batch:
    """Batches of one row, of one length and picture size, as one batch."""
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0] if name != "task"}
    return {**tensors, "task": [row["task"][0] for row in rows]}


def data(subject: Subject) -> Iterator[tuple[Row, list[Batch]]]:
    """(what the samples are, the samples)."""
    for samples in COUNTS:
        for seed in range(DRAWS if samples < OF_A_KIND else 1):
            batches = subject.batches("calibration", samples, 39, seed=seed)
            yield {"data": "all tasks", "samples": samples, "seed": seed}, batches
    kinds = {name: of_tasks(tasks, OF_A_KIND, 39) for name, tasks in KINDS.items()}
    kinds[GREY] = subject.batches("calibration", OF_A_KIND, 39, grey=True)
    for name, batches in kinds.items():
        yield {"data": name, "samples": OF_A_KIND, "seed": 0}, batches


def table(record: Row) -> str:
    """The record as Markdown."""
    cells = [
        [
            row["data"],
            str(row["samples"]),
            str(row["seed"]),
            row["policy"],
            f"{row['calibration_skip']:.1%}",
            f"{row['calibration_kl']:.5f}",
            f"{row['as_tuned_skip']:.1%}",
            f"{row['as_tuned_kl']:.5f}",
            f"{row['kl']:.5f}, {row['kl_low']:.5f} to {row['kl_high']:.5f}",
            f"{row['accuracy']:.1%}",
        ]
        for row in record["rows"]
        if "kl" in row
    ]
    titles = ["calibrated on", "samples", "seed", "policy", "skip there", "KL there"]
    titles += ["skip on test", "KL on test", "KL on test at the rate, 95 %", "accuracy there"]
    lines = ["# What calibration samples change", "", record["about"], ""]
    return "\n".join([*lines, *markdown(titles, cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.83)
    parser.add_argument("--test", type=int, default=520)
    parser.add_argument("--test-seed", type=int, default=2)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--record", type=Path, default=RESULTS / "policies_samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: getattr(args, name) for name in ("rate", "test", "test_seed", "passes")}
    subject = Subject()
    test: Bench | None = None
    path = args.record.with_suffix(".json")
    record = load(path)
    if record.get("settings") != settings:
        about = (
            f"The demo at {args.rate:.0%} of the pairs of text and vision tokens; everything tuned on the "
            f"samples named, with about {args.passes} passes, and measured on {args.test} samples of the "
            f"test split, seed {args.test_seed}."
        )
        record = {"settings": settings, "about": about, "rows": []}
    done = [{name: row[name] for name in ("data", "samples", "seed", "policy")} for row in record["rows"]]
    for what, batches in data(subject):
        if {**what, "policy": MARGINAL} in done:
            continue
        tuning = Tuning(subject, batches, batches, args.passes, as_tuned=True)
        test = test or test_bench(subject, tuning, args.test, args.test_seed)
        for row in (
            tuning.row(tempered(tuning.alphas(tuning.profile)), args.rate, test),
            tuning.marginal(args.rate, test),
        ):
            record["rows"].append(row | what)
            print(time.strftime("%H:%M:%S"), *what.values(), row["policy"], said(row), flush=True)
        save(path, record)
        write_atomically(args.record.with_suffix(".md"), table(record))


if __name__ == "__main__":
    main()
