"""A record as Markdown: a table for each number of tokens, peers down, skip rates across."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from cases import LIMITS, OURS
from interleave import ratios, spread
from targets import render_targets

Entry = dict[str, Any]


def tables(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that differ in the skip rate alone, together."""

    def key(entry: Entry) -> str:
        return str(entry["id"].rsplit(" skip", 1)[0])

    return [sorted(same, key=lambda entry: entry["case"]["skip"]) for _, same in groupby(entries, key=key)]


def timings(spent: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """What is kept of the samples: spreads of milliseconds, and of the ratio of each to ours."""
    return {
        "passes": len(spent[ours]),
        "ms": {name: spread(values) for name, values in spent.items()},
        "over_ours": {name: ratios(values, spent[ours]) for name, values in spent.items() if name != ours},
    }


def title(table: Sequence[Entry]) -> str:
    case = table[0]["case"]
    what = f"{case['num_experts']} experts, top-{case['top_k']}, hidden {case['hidden']}"
    if case["kind"] == "model":
        what = f"{case['layers']} layers, {what}, {case['prompt'] or case['tokens']}-token prompt"
    cpu = "" if case["cpu"] == "native" else ", no more than AVX2"
    tokens = f"{case['tokens']} token{'s' * (case['tokens'] > 1)}"
    return f"{case['family']}: {tokens}, {what}, intermediate {case['intermediate']}, {case['dtype']}{cpu}"


def speedup_table(table: Sequence[Entry]) -> str:
    """Times of the peers over ours; above 1, ours is quicker. Of limits, ours over the limit."""
    lines = [f"### {title(table)}", ""]
    case = table[0]["case"]
    rates = [f"{100 * entry['skip']:.3g} %" for entry in table]
    if case["kind"] == "block" and case["tokens"] == 1:
        rates = [f"{entry['kept_pairs']} of {case['top_k']} kept" for entry in table]
    lines += ["| | " + " | ".join(rates) + " |", "|---" * (len(table) + 1) + "|"]
    lines.append(_row("distinct experts, chosen / kept", table, _distinct))
    if "distinct_per_layer" in table[0]:
        lines.append(_row("kept, layer by layer", table, _layers))
    lines.append(_row(f"**{OURS}**, ms", table, lambda entry: _ms(entry["ms"].get(OURS))))
    names = list(dict.fromkeys(name for entry in table for name in (*entry["ms"], *entry["absent"])))
    # A row with nothing in it is named below the table.
    peers = [
        name
        for name in names
        if name != OURS and name not in LIMITS and any(name in entry["ms"] for entry in table)
    ]
    lines += [_row(f"{name} / {OURS}", table, lambda entry, name=name: _over(entry, name)) for name in peers]
    lines += [
        _row(f"{OURS} / {name}", table, lambda entry, name=name: _under(entry, name))
        for name in names
        if name in LIMITS and any(name in entry["ms"] for entry in table)
    ]
    reasons: dict[str, dict[str, None]] = {}
    for entry in table:
        for name, why in entry["absent"].items():
            reasons.setdefault(why, {})[name] = None
    notes = [f"- {'; '.join(of)}: {why}." for why, of in reasons.items()]
    return "\n".join([*lines, "", *notes, *([""] if notes else [])])


def markdown(record: dict[str, Any], picture: str) -> str:
    """The whole record, targets first; `picture` is the plot's file name."""
    machine, versions = record["machine"], record["versions"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    lines = [
        "# Speed, side by side",
        "",
        f"`{record['command']}`, {record['date']}. One thread of {machine['cores']} of {machine['cpu']} "
        f"({', '.join(machine['flags'])}; {caches}; {machine['memory_gib']} GiB). "
        + ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
        + ".",
        "",
        *(
            f"{cpu}: torch says {rate['capability']}; dense product {rate['float32_gflops']} GFLOP/s in "
            f"float32 and {rate['bfloat16_gflops']} in bfloat16, read {rate['read_gb_per_s']} GB/s."
            for cpu, rate in record["rates"].items()
        ),
        "",
        "CPU time of the thread that works, peers in one process, taking turns A B C C B A; medians, and in "
        "brackets the 20th and 80th percentile. A peer's row is its time over ours: above 1, ours is "
        "quicker. A limit's row is ours over the limit. Zeroed is simulated skipping: weights of dropped "
        "pairs at zero; dropped, their ids set past the last expert.",
        "",
        f"![speed-up against skip rate]({picture})",
        "",
        "## Targets",
        "",
        render_targets(record["targets"]),
        "",
        "## Tables",
        "",
        *(speedup_table(table) for table in tables(record["entries"])),
    ]
    return "\n".join(lines)


def _row(name: str, table: Sequence[Entry], cell: Any) -> str:
    return f"| {name} | " + " | ".join(cell(entry) for entry in table) + " |"


def _distinct(entry: Entry) -> str:
    return " / ".join(f"{count:.3g}" for count in entry["distinct"])


def _layers(entry: Entry) -> str:
    return " ".join(f"{count:.2g}" for count in entry["distinct_per_layer"][1])


def _ms(values: Sequence[float] | None) -> str:
    return "-" if values is None else f"{_digits(values[1])} ({_digits(values[0])} to {_digits(values[2])})"


def _over(entry: Entry, name: str) -> str:
    return _ms(entry["over_ours"].get(name))


def _under(entry: Entry, name: str) -> str:
    over = entry["over_ours"].get(name)
    return _ms(None if over is None else [1 / value for value in reversed(over)])


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
