"""Two records of `bench/run.py`, case by case: what became quicker or slower beyond the spread.

    python bench/compare.py base.json head.json
    python bench/compare.py base.json head.json --peer grouped_mm   # did the machine change?

A change is marked where neither record's 20th to 80th percentile reaches into the other's.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cases import OURS

Record = dict[str, Any]


def compare(base: Record, head: Record, peer: str = OURS) -> list[dict[str, Any]]:
    """What became of one peer's time, for each case that both records have.

    Returns:
        Dicts with `id`, `base` and `head` (spreads, ms), `ratio` (head / base; below 1, quicker), and
        `change`: "quicker", "slower" or "".
    """
    rows = []
    before = {entry["id"]: entry["ms"].get(peer) for entry in base["entries"]}
    for entry in head["entries"]:
        old, new = before.get(entry["id"]), entry["ms"].get(peer)
        if old is None or new is None:
            continue
        change = "quicker" if new[2] < old[0] else "slower" if new[0] > old[2] else ""
        rows.append({"id": entry["id"], "base": old, "head": new, "ratio": new[1] / old[1], "change": change})
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| case | base, ms | head, ms | head / base | change |", "|---|---|---|---|---|"]
    for row in rows:
        old, new = (f"{low:.3g} < {mid:.3g} < {high:.3g}" for low, mid, high in (row["base"], row["head"]))
        change = f"{100 * (row['ratio'] - 1):+.0f} %"
        mark = f"**{change} {row['change']}**" if row["change"] else change
        lines.append(f"| {row['id']} | {old} | {new} | {row['ratio']:.3g} | {mark} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--peer", default=OURS)
    arguments = parser.parse_args()
    base, head = (json.loads(path.read_text()) for path in (arguments.base, arguments.head))
    rows = compare(base, head, arguments.peer)
    if not rows:
        parser.error(f"the records have no case of {arguments.peer!r} in common")
    print(render(rows))


if __name__ == "__main__":
    main()
