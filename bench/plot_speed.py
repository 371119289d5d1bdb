"""The picture of a record: speed-up against skip rate, with the limit drawn in.

    python bench/plot_speed.py bench/results/speed.json

One panel for each table that has several skip rates. A line is the median time of unmodified `grouped_mm`
over that of what the line is for; the band, over its 20th and 80th percentile.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import OURS
from report import tables
from targets import limit

_BASE = {"block": "grouped_mm", "model": "grouped_mm, compiled"}
# (peer, label, colour, style), drawn where it was timed.
_LINES = (
    ("eager, dropped", "eager, dropped ids", "#c2452d", "-"),
    ("grouped_mm, compiled, dropped", "compiled grouped_mm, dropped ids", "#d9812b", "-"),
    ("batched_mm, compiled", "compiled batched_mm", "#8a6fb0", "-"),
    ("kt-kernel", "kt-kernel", "#4f9d69", "-"),
    ("grouped_mm, zeroed", "grouped_mm, zeroed weights", "#888888", ":"),
)
_LEFT_OUT = (2, 4, 16)  # numbers of tokens whose picture is much like that of 1 or 8


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw a record, as a PNG or whatever the suffix says."""
    # Not pyplot: it keeps global state and may look for a display.
    from matplotlib.figure import Figure

    chosen = [
        table
        for table in tables(record["entries"])
        if len(table) > 1 and table[0]["case"]["tokens"] not in _LEFT_OUT
    ]
    if not chosen:
        return
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(4.1 * columns, 3.3 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, table in zip(panels, chosen, strict=False):
        _panel(panel, table)
    for panel in panels[len(chosen) :]:
        panel.set_visible(False)
    handles: dict[str, Any] = {}
    for panel in panels:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _panel(panel: Any, table: Sequence[dict[str, Any]]) -> None:
    case = table[0]["case"]
    base = _BASE[case["kind"]]
    lines = [(OURS, OURS, "#2457a6", "-"), *_LINES]
    for name, label, colour, style in lines:
        points = [
            (100 * entry["skip"], [entry["ms"][base][1] / value for value in reversed(entry["ms"][name])])
            for entry in table
            if name in entry["ms"] and base in entry["ms"]
        ]
        if points:
            _line(panel, points, label, colour, style, width=2.2 if name == OURS else 1.2)
    bounds = [
        (100 * entry["skip"], [entry["ms"][base][1] / (least * entry["ms"][OURS][1])] * 3)
        for entry in table
        if base in entry["ms"] and (least := limit(entry)) is not None
    ]
    if bounds:
        _line(panel, bounds, "limit: product, read, or no experts", "#000000", "--", width=1.2)
    panel.axhline(1, color="#bbbbbb", linewidth=0.8, zorder=0)
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    cpu = "" if case["cpu"] == "native" else ", AVX2 only"
    panel.set_title(
        f"{case['family']}, {case['tokens']} tok., hidden {case['hidden']}, {case['dtype']}{cpu}",
        fontsize=8.5,
    )
    panel.set_xlabel("dropped pairs (%)", fontsize=8)
    panel.set_ylabel(f"times {base}", fontsize=8)
    panel.tick_params(labelsize=8)


def _line(
    panel: Any,
    points: Sequence[tuple[float, Sequence[float]]],
    label: str,
    colour: str,
    style: str,
    width: float,
) -> None:
    xs = [x for x, _ in points]
    low, middle, high = zip(*(values for _, values in points), strict=True)
    panel.plot(xs, middle, style, color=colour, label=label, linewidth=width, marker=".", markersize=5)
    panel.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--output", type=Path, help="default: beside the record, as .png")
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text())
    plot(record, arguments.output or arguments.record.with_suffix(".png"))


if __name__ == "__main__":
    main()
