"""What bench/policies.py and its relatives record, and the tables they make of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modes_fx import demo
from modes_fx.measure import bootstrap
from modes_fx.profile import write_atomically

Row = dict[str, Any]

RATES = (0.5, 0.67, 0.83, 0.88)
MARGINAL, SEARCH = "marginal", "search"
TEMPERED = "MoDES, tempered alpha"
ABLATION = ("one threshold", "GMLG", "DMT", "MoDES", TEMPERED, SEARCH, MARGINAL)  # Table 4, and ours


def load(path: Path) -> Row:
    """A record, or {} where there is none yet."""
    record: Row = json.loads(path.read_text()) if path.exists() else {}
    return record


def save(path: Path, record: Row) -> None:
    """Write a record as JSON, a row a line."""
    head = json.dumps({name: value for name, value in record.items() if name != "rows"})
    rows = ",\n".join(json.dumps(row) for row in record["rows"])
    write_atomically(path, f'{head[:-1]},\n"rows": [\n{rows}\n]}}\n')


def difference(row: Row, other: Row, answer_tokens: Sequence[int]) -> tuple[float, float, float]:
    """(KL of `row` minus KL of `other`, and its 95 % interval), paired by samples; nats per answer token."""
    one, two = (np.array(each["kl_sums"].split(), dtype=np.float64) for each in (row, other))
    low, high = bootstrap((one - two).tolist(), answer_tokens, studentised=True)
    return float((one - two).sum() / sum(answer_tokens)), low, high


def verdict(low: float, high: float) -> str:
    """Of an interval of a difference in KL: whose is less."""
    return "worse" if low > 0 else "better" if high < 0 else "as good"


def at(rows: Sequence[Row], name: str, rate: float) -> Row | None:
    """The row of a policy at a rate, if it was reached."""
    found = (row for row in rows if row["policy"] == name and row["rate"] == rate and "kl" in row)
    return next(found, None)


def tables(record: Row) -> str:
    """The record as Markdown."""
    rows, tokens = record["rows"], record["answer_tokens"]
    rates = sorted({row["rate"] for row in rows})
    lines = ["# Policies at one measured skip rate", "", record["about"], ""]
    for ours in (each for each in (TEMPERED, MARGINAL, SEARCH) if any(r["policy"] == each for r in rows)):
        lines += [f"## KL at all rates, and whether it is worse than that of `{ours}`", ""]
        lines += ["By the 95 % interval of the difference, paired by samples; `-`: not measured.", ""]
        lines += [*_overview(rows, rates, tokens, ours), ""]
    for rate in rates:
        lines += [f"## {rate:.0%} of the pairs of text and vision tokens", ""]
        lines += _at_one_rate(rows, rate, tokens)
        lines += ["", "Accuracy by task (%), as the paper's Table 1:", ""]
        lines += [*_by_task([row for row in rows if row["rate"] == rate and "kl" in row]), ""]
    lines += ["## What alpha and the two thresholds bring: KL, accuracy (the paper's Table 4)", ""]
    lines += _ablation(rows, rates)
    return "\n".join(lines) + "\n"


def _overview(rows: Sequence[Row], rates: Sequence[float], tokens: Sequence[int], of: str) -> list[str]:
    def cell(name: str, rate: float) -> str:
        row, ours = at(rows, name, rate), at(rows, of, rate)
        if row is None:
            tried = any(row["policy"] == name and row["rate"] == rate for row in rows)
            return "not reached" if tried else "-"
        beside = "" if ours is None or row is ours else verdict(*difference(row, ours, tokens)[1:])
        return f"{row['kl']:.5f} {beside}".strip()

    names = dict.fromkeys(row["policy"] for row in rows)
    return markdown(
        ["policy", *(f"{rate:.0%}" for rate in rates)],
        [[name, *(cell(name, rate) for rate in rates)] for name in names],
    )


def _at_one_rate(rows: Sequence[Row], rate: float, tokens: Sequence[int]) -> list[str]:
    ours = at(rows, TEMPERED, rate)

    def cells(row: Row) -> list[str]:
        if "unreached" in row:
            return [row["policy"], "not reached", row["unreached"], *[""] * 6]
        low, high = row["accuracy_interval"]
        beside = ""
        if ours is not None and row is not ours:
            beside = "{:+.5f}, {:+.5f} to {:+.5f}".format(*difference(row, ours, tokens))
        return [
            row["policy"],
            f"{row['skip']:.1%}",
            f"{row['kl']:.5f}",
            f"{row['kl_low']:.5f} to {row['kl_high']:.5f}",
            beside,
            f"{row['flips']:.2%}",
            f"{row['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row['passes']:.0f}",
        ]

    titles = ["policy", "skip", "KL (nats)", "95 %", f"KL minus that of `{TEMPERED}`, paired 95 %"]
    titles += ["flips", "accuracy", "95 %", "passes"]
    here = [row for row in rows if row["rate"] == rate]
    return markdown(titles, map(cells, sorted(here, key=lambda row: row.get("kl", math.inf))))


def _by_task(reached: Sequence[Row]) -> list[str]:
    def cells(row: Row) -> list[str]:
        return [row["policy"], *(f"{100 * row['tasks'][task][0]:.0f}" for task in demo.TASKS)]

    return markdown(["policy", *demo.TASKS], map(cells, reached))


def _ablation(rows: Sequence[Row], rates: Sequence[float]) -> list[str]:
    def cell(row: Row | None) -> str:
        return "-" if row is None else f"{row['kl']:.4f}, {row['accuracy']:.1%}"

    return markdown(
        ["policy", *(f"{rate:.0%}" for rate in rates)],
        [[name, *(cell(at(rows, name, rate)) for rate in rates)] for name in ABLATION],
    )


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
