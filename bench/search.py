"""Guided search beside the paper's staircase and the whole grid: passes, and KL at one skip rate.

    python bench/search.py [--samples 65] [--targets 0.67 0.83] [--keep FILE] [--out FOLDER]
    python bench/search.py --tiny

On the demo model the whole grid of 100 x 100 points would take 10,000 passes. If KL rises with both
thresholds, its optimum lies where the skip rate is just reached, so only a band is measured there: for every
text threshold the first vision threshold that reaches the rate, and `--band` more above it. How true that is
is looked at too: `--outside` points that lie above the band are measured, drawn at random, and the least KL
among them is printed. With --tiny the model is a tiny one of random weights, and the whole grid is measured,
of which equal scores leave fewer than 10,000 distinct points.

A pass is counted once for each method that asks for it, whoever asked first. With --keep, what is measured is
kept in a file, and a run that was killed goes on from there.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from modes_fx import calibrate, demo
from modes_fx.calibration.calibrate import library_versions
from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Profile, write_atomically
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe
from modes_fx.threshold_search.points import Point
from modes_fx.threshold_search.search import ThresholdSearch

GRID = 100
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=65)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.67, 0.83])
    parser.add_argument("--exponent", type=float, default=1.0, help="power of alpha")
    parser.add_argument("--band", type=int, default=2, help="points above the frontier, per text threshold")
    parser.add_argument("--outside", type=int, default=40, help="feasible points to measure outside the band")
    parser.add_argument("--keep", type=Path, help="file to keep what is measured in")
    parser.add_argument("--tiny", action="store_true", help="the tiny model and its whole grid alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for search.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    rows = tiny_rows(given.targets) if given.tiny else demo_rows(given)
    print(table(rows))
    name = "search-tiny.json" if given.tiny else "search.json"
    written = {
        "rows": rows,
        "cpu_seconds": round(time.process_time() - started, 1),
        "versions": library_versions(),
    }
    write_atomically(given.out / name, json.dumps(written, indent=1) + "\n")


def demo_rows(given: argparse.Namespace) -> list[dict[str, Any]]:
    model, processor = demo.load()
    batches = demo.batches("calibration", given.samples, batch_size=64)
    profile = calibrated(model, batches, processor, given.keep)
    search = ThresholdSearch(model, batches, profile, resume=given.keep)
    if given.exponent != 1:
        search = search.tempered(given.exponent)
    rows = []
    for target in given.targets:
        rows += compare(
            search, target, f"demo, {given.samples} samples", band=given.band, outside=given.outside
        )
        print(table(rows[-5:]), flush=True)
    return rows


def calibrated(model: Any, batches: Any, processor: Any, keep: Path | None) -> Profile:
    """The profile, kept beside what is measured."""
    path = keep and keep.with_suffix(".profile")
    if path and path.exists():
        return Profile.load(path)
    profile = calibrate(model, batches, processor=processor)
    if path:
        profile.save(path)
    return profile


def tiny_rows(targets: list[float]) -> list[dict[str, Any]]:
    model = tiny_qwen3_vl_moe()
    inputs = tiny_inputs(text=19, batch=12, grid=(8, 8))
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    batches = [{**inputs, "labels": labels}]
    profile = calibrate(model, batches, special_token_ids=SPECIAL)
    search = ThresholdSearch(model, batches, profile)
    return [row for target in targets for row in compare(search, target, "tiny, 12 samples")]


def compare(
    search: ThresholdSearch, target: float, what: str, *, band: int | None = None, outside: int = 0
) -> list[dict[str, Any]]:
    """A row per method: evaluations, measured skip and KL, and KL over that of the whole grid."""
    rows: list[dict[str, Any]] = []

    def add(method: str, evaluations: int, point: Point) -> None:
        numbers = {"evaluations": evaluations, "skip": point.skip, "kl": point.kl}
        rows.append({"what": what, "target": target, "method": method, **numbers})

    whole = search.tempered(1.0)  # The same alphas, nothing asked for yet.
    if band is None:
        best = whole.find(target, method="exhaustive", grid=GRID, leave_grid=False)
        add("whole grid", len(whole.points), best)
    else:
        add("band around the frontier", *measure_band(whole, target, band))
        if outside:
            add("outside of the band", *measure_outside(whole, target, band, outside))
    for method in ("staircase", "guided"):
        each = search.tempered(1.0)
        point = each.find(target, method=method, grid=GRID, leave_grid=False)  # type: ignore[arg-type]
        add(method, len(each.points), point)
    each = search.tempered(1.0)
    point = each.find(target, grid=GRID)
    add("guided, then off the grid", len(each.points), point)
    least = rows[0]["kl"]
    return [{**row, "kl_ratio": row["kl"] / least if least else None} for row in rows]


def grids(search: ThresholdSearch) -> tuple[list[float], list[float]]:
    text, vision = (search.scores.grid(modality, GRID, "rank").tolist() for modality in (TEXT, VISION))
    return text, vision


def frontier_of(search: ThresholdSearch, target: float) -> dict[float, int]:
    """For each text threshold the index of the first vision threshold that reaches the target."""
    text, vision = grids(search)
    first: dict[float, int] = {}
    place = len(vision) - 1
    for tau in text:
        while place > 0 and search.measure(tau, vision[place]).skip >= target:
            place -= 1
        while place < len(vision) - 1 and search.measure(tau, vision[place]).skip < target:
            place += 1
        if search.measure(tau, vision[place]).skip >= target:
            first[tau] = place
    return first


def measure_band(search: ThresholdSearch, target: float, band: int) -> tuple[int, Point]:
    """Passes, and the point of least KL among those that reach the target."""
    _, vision = grids(search)
    for tau, first in frontier_of(search, target).items():
        for tau_vision in vision[first : first + band + 1]:
            search.measure(tau, tau_vision)
    reached = [point for point in search.points if point.skip >= target]
    return len(search.points), min(reached, key=lambda point: point.kl)


def measure_outside(search: ThresholdSearch, target: float, band: int, count: int) -> tuple[int, Point]:
    """The same of points above the band, drawn at random."""
    _, vision = grids(search)
    above = [(t, v) for t, first in frontier_of(search, target).items() for v in vision[first + band + 1 :]]
    drawn = random.Random(0).sample(above, min(count, len(above)))
    points = [search.measure(*taus) for taus in drawn]
    return len(points), min(points, key=lambda point: point.kl)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':22}{'target':>7} {'method':26}{'evaluations':>12}{'skip':>8}{'KL':>11}{'ratio':>8}"]
    for row in rows:
        lines.append(
            f"{row['what']:22}{row['target']:7.2f} {row['method']:26}{row['evaluations']:12d}"
            f"{row['skip']:8.4f}{row['kl']:11.6f}{row['kl_ratio']:8.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
