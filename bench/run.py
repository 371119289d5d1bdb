"""Times this package beside everything else that computes the same, in one process, on one thread.

    python bench/run.py                                    # all tables, about 25 minutes
    python bench/run.py --cases block-decode --quick       # to see that it runs
    python bench/run.py --record bench/results/speed.json  # also writes speed.md and the plot beside it
    python bench/run.py --targets bench/results/speed.json # what was to be shown, from a record

Every peer's answer is compared with the specification before it is timed, and one that is wrong is not timed.
Peers take turns, A B C C B A, by the CPU time of the thread that works; times are medians, with the 20th and
80th percentile, and ratios are taken pass by pass. Routing is prescribed, and weights come from memory:
before each run the weights of the experts that the tokens chose are evicted from the caches.

Peers that are not installed are left out; see `bench/kt_peer.py` for kt-kernel.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import cases as data
from cases import LIMITS, OURS, Case
from machine import machine, rates, versions
from report import markdown, speedup_table, tables, timings
from targets import check_targets, render_targets

_SAMPLES = {"decode": 16, "prefill": 3}
_CHECKED = 128  # tokens of a sample that are compared with the specification
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def run_cases(
    cases: Sequence[Case], kt_folder: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time the cases of one group, here."""
    import torch

    torch.set_num_threads(1)
    with torch.no_grad():
        if cases[0].kind == "model":
            from model_peers import run_model_cases

            return run_model_cases(cases, kt_folder, say)
        return run_block_cases(cases, kt_folder, say)


def run_block_cases(
    cases: Sequence[Case], kt_folder: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    import functools

    import torch
    from block_peers import Weights, make_peers, make_samples
    from kt_peer import Pool

    pool = functools.cache(lambda: Pool(kt_folder))
    weights = Weights(cases[0], torch.Generator().manual_seed(0))
    entries = []
    for _, group in groupby(
        sorted(cases, key=lambda case: (case.tokens, case.only, case.skip)),
        key=lambda case: (case.tokens, case.only),
    ):
        same = list(group)
        start = time.perf_counter()
        peers, absent = make_peers(same[0], weights, pool)
        for case in same:
            samples = make_samples(case, weights, _SAMPLES["decode" if case.decode else "prefill"])
            entry = _block_entry(case, weights, samples, peers, absent)
            entries.append(entry)
            say(f"{case.id}: {time.perf_counter() - start:.0f} s, {entry['passes']} passes")
            start = time.perf_counter()
        del peers
        gc.collect()
    return entries


def _block_entry(
    case: Case, weights: Any, samples: Any, peers: Any, absent: dict[str, str]
) -> dict[str, Any]:
    from block_peers import expected
    from interleave import interleave

    rows = slice(min(case.tokens, _CHECKED))
    wanted = {drops: expected(samples[0], weights, rows, drops=drops) for drops in (False, True)}
    absent, errors = dict(absent), {}
    runs = {}
    for name, peer in peers.items():
        # With nothing dropped it is the unmodified peer; and one control in each table will do.
        if (name.endswith("dropped") and not case.skip) or (name.endswith("zeroed") and case.skip < 7 / 8):
            continue
        out = peer.call(samples[0])
        if name not in LIMITS:
            want = wanted[peer.drops]
            error = ((out[rows].float() - want).norm() / want.norm()).item()
            if not error <= _TOLERANCE[case.dtype]:
                if name == OURS:
                    raise SystemExit(f"{case.id}: {OURS} is wrong, by {error:.1e} of the norm.")
                absent[name] = f"wrong, by {error:.1e} of the norm"
                continue
            errors[name] = error
        if "compiled" in name or case.decode:
            peer.call(samples[1])  # perhaps with another number of rows for an expert
        runs[name] = peer.run(samples)
    spent = interleave(runs, budget_s=case.budget_s, least=case.least)
    keep = samples[0].routing.keep
    return {
        "id": case.id,
        "case": asdict(case),
        "skip": 1 - sum(s.routing.keep.float().mean().item() for s in samples) / len(samples),
        "kept_pairs": int(keep.sum()),
        "distinct": [
            sum(len(s.routing.distinct(kept=kept)) for s in samples) / len(samples) for kept in (False, True)
        ],
        **timings(spent, OURS),
        "errors": errors,
        "absent": absent,
    }


def child(path: str, kt_folder: str | None) -> None:
    """Run the cases that stand in a file, and leave the entries in it."""
    file = Path(path)
    cases = [Case(**{**case, "only": tuple(case["only"])}) for case in json.loads(file.read_text())]
    entries = run_cases(cases, kt_folder, lambda line: print(line, file=sys.stderr, flush=True))
    file.write_text(json.dumps({"entries": entries, "rates": rates()}))


def run_group(cases: Sequence[Case], kt_folder: str | None) -> dict[str, Any]:
    """Run the cases of one group in a process of their own, which sees the processor that they want."""
    cpu = cases[0].cpu
    # Inductor's cache does not know of the restriction: code for the one kind crashes in the other.
    cache = Path(tempfile.gettempdir()) / "modes_fx_bench" / cpu
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    environment |= data.AVX2 if cpu == "avx2" else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cases.json"
        file.write_text(json.dumps([asdict(case) for case in cases]))
        command = [sys.executable, __file__, "--child", str(file)]
        if kt_folder is not None:
            command += ["--kt-kernel", kt_folder]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        done: dict[str, Any] = json.loads(file.read_text())
    return done


def run_all(cases: Sequence[Case], kt_folder: str | None) -> dict[str, Any]:
    """The record of a run."""
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "bench/run.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(kt_folder),
        "rates": {},
        "failed": [],
        "entries": [],
    }
    for name, group in groupby(sorted(cases, key=lambda case: case.group), key=lambda case: case.group):
        same = list(group)
        try:
            done = run_group(same, kt_folder)
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            record["failed"].append(name)
            continue
        record["rates"].setdefault(same[0].cpu, done["rates"])
        record["entries"] += done["entries"]
        for table in tables(done["entries"]):
            print(speedup_table(table), flush=True)
    record["targets"] = check_targets(record["entries"])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(data.FAMILIES), default=list(data.FAMILIES))
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="few cases, few passes")
    parser.add_argument("--record", type=Path, help="write the record here, and .md and .png beside it")
    parser.add_argument("--targets", type=Path, metavar="RECORD", help="check a record, run nothing")
    parser.add_argument("--kt-kernel", metavar="DIR", default=os.environ.get("KT_KERNEL_DIR"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.kt_kernel)
        return
    if arguments.targets:
        results = check_targets(json.loads(arguments.targets.read_text())["entries"])
        print(render_targets(results))
        sys.exit(any(result["met"] is False for result in results))
    cases = [case for family in arguments.cases for case in data.FAMILIES[family]]
    if arguments.quick:
        cases = [small for case in cases if (small := data.quick(case)) is not None]
    cases = [case for case in cases if arguments.only in case.id]
    if not cases:
        parser.error("no case is left")
    record = run_all(cases, arguments.kt_kernel)
    print(render_targets(record["targets"]))
    if arguments.record:
        from plot_speed import plot

        arguments.record.parent.mkdir(exist_ok=True, parents=True)
        arguments.record.write_text(json.dumps(record, indent=1) + "\n")
        picture = arguments.record.with_suffix(".png")
        arguments.record.with_suffix(".md").write_text(markdown(record, picture.name))
        plot(record, picture)
    if record["failed"]:
        sys.exit("Failed: " + ", ".join(record["failed"]))


if __name__ == "__main__":
    main()
