"""What the tables were to show, as data, and whether a record shows it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cases import GEMM, LIMITS, NO_EXPERTS, OURS, READ

Entry = dict[str, Any]
_FEW_TOKENS = 64  # below, a dense product of so few rows is no limit
Spread = Sequence[float]
# (entry, all entries) -> [20th percentile, median, 80th percentile], or None where it was not measured
Measure = Callable[[Entry, Sequence[Entry]], Spread | None]


def limit(entry: Entry) -> float | None:
    """The slowest of the limits, as part of our time; None where none was timed."""
    few = entry["case"].get("tokens", 0) < _FEW_TOKENS
    names = (READ, NO_EXPERTS) if few else LIMITS
    found = [entry["over_ours"][name][1] for name in names if name in entry["over_ours"]]
    return max(found, default=None)


def over(*names: str) -> Measure:
    """Time of a peer over ours, of the one that comes closest; none means any that is no limit."""

    def measure(entry: Entry, entries: Sequence[Entry]) -> Spread | None:
        found = [
            value
            for name, value in entry["over_ours"].items()
            if (name in names if names else name not in LIMITS)
        ]
        return min(found, key=lambda value: value[1], default=None)

    return measure


def over_limit(name: str) -> Measure:
    """Our time over a limit's."""

    def measure(entry: Entry, entries: Sequence[Entry]) -> Spread | None:
        value = entry["over_ours"].get(name)
        return None if value is None else [1 / each for each in reversed(value)]

    return measure


def share_of(name: str) -> Measure:
    """A limit's time over ours: 1 is the limit."""

    def measure(entry: Entry, entries: Sequence[Entry]) -> Spread | None:
        value: Spread | None = entry["over_ours"].get(name)
        return value

    return measure


def falls(entry: Entry, entries: Sequence[Entry]) -> Spread | None:
    """Our time with nothing dropped over our time in this case."""
    without = {**entry["case"], "skip": 0.0}
    full = next((each for each in entries if each["case"] == without), None)
    if full is None:
        return None
    low, middle, high = full["ms"][OURS]
    return [low / entry["ms"][OURS][2], middle / entry["ms"][OURS][1], high / entry["ms"][OURS][0]]


def microseconds(entry: Entry, entries: Sequence[Entry]) -> Spread | None:
    return [1e3 * each for each in entry["ms"][OURS]]


@dataclass(frozen=True)
class Target:
    """One claim.

    Attributes:
        claim: In words, of all cases that `where` picks.
        where: Fields of a case and the values they may have.
        least: The measure has to be at least so much; None where `most` says how much at most.
        even: Not to be slower is enough: the median may miss where the wanted value is inside the spread.
        bounded: The measure grows as our time falls, to no more than the limits allow.
    """

    claim: str
    where: dict[str, tuple[Any, ...]]
    measure: Measure
    least: float | None = None
    most: float | None = None
    even: bool = False
    bounded: bool = True

    def picks(self, entry: Entry) -> bool:
        return all(entry["case"][field] in values for field, values in self.where.items())

    def meets(self, value: Spread) -> bool:
        if self.least is not None:
            return value[2 if self.even else 1] >= self.least
        assert self.most is not None
        return value[0 if self.even else 1] <= self.most

    def wanted(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"


_F32 = {"dtype": ("float32",), "cpu": ("native",)}
_PREFILL = {"family": ("block-prefill",), **_F32}
_EMULATED = {
    "family": ("block-prefill",),
    "dtype": ("bfloat16",),
    "cpu": ("avx2",),
    "tokens": (1024,),
}
_DECODE = {"family": ("block-decode",)}
_MODEL_PREFILL = {"family": ("model-prefill",)}
_MODEL_DECODE = {"family": ("model-decode",)}

TARGETS = (
    Target(
        "Block, prefill, float32, 0 %: the fastest peer's time over ours",
        {**_PREFILL, "skip": (0.0,)},
        over(),
        least=1,
        even=True,
    ),
    Target(
        "Block, prefill, float32, 88 %, 1024 tokens: times faster than unmodified grouped_mm",
        {**_PREFILL, "skip": (0.88,), "tokens": (1024,)},
        over("grouped_mm"),
        least=7,
    ),
    Target(
        "Block, prefill, float32, 88 %, 4096 tokens: times faster than unmodified grouped_mm",
        {**_PREFILL, "skip": (0.88,), "tokens": (4096,)},
        over("grouped_mm"),
        least=8,
    ),
    Target(
        "Block, prefill, float32, 88 %: times faster than eager with dropped ids",
        {**_PREFILL, "skip": (0.88,)},
        over("eager, dropped", "eager, compiled, dropped"),
        least=2.4,
    ),
    Target(
        "Block, prefill, float32, 88 %, 4096 tokens: share of the dense product with the kept FLOPs",
        {**_PREFILL, "skip": (0.88,), "tokens": (4096,)},
        share_of(GEMM),
        least=0.65,
    ),
    Target(
        "Block, prefill, bfloat16 without its units, 0 %, 1024 tokens: times faster than grouped_mm",
        {**_EMULATED, "skip": (0.0,)},
        over("grouped_mm"),
        least=6,
    ),
    Target(
        "Block, prefill, bfloat16 without its units, 88 %, 1024 tokens: times faster than grouped_mm",
        {**_EMULATED, "skip": (0.88,)},
        over("grouped_mm"),
        least=25,
    ),
    Target(
        "Block, decode: our time over a pure read of the kept experts' weights",
        _DECODE,
        over_limit(READ),
        most=1.25,
        bounded=False,
    ),
    Target(
        "Block, decode, 0 %: compiled batched_mm's time over ours",
        {**_DECODE, "skip": (0.0,)},
        over("batched_mm, compiled"),
        least=1,
        even=True,
    ),
    Target(
        "Block, decode, 1 token: 8 of 8 kept over 1 of 8 kept, our time",
        {**_DECODE, "tokens": (1,), "skip": (7 / 8,)},
        falls,
        least=6,
        bounded=False,
    ),
    Target(
        "Whole model, compiled, 88 %, prefill: times faster than compiled grouped_mm",
        {**_MODEL_PREFILL, "skip": (0.88,)},
        over("grouped_mm, compiled"),
        least=3.2,
    ),
    Target(
        "Whole model, compiled, 88 %, decode: times faster than compiled grouped_mm",
        {**_MODEL_DECODE, "skip": (0.88,)},
        over("grouped_mm, compiled"),
        least=2.8,
    ),
    Target(
        "Whole model, compiled, 88 %, decode: times faster than compiled batched_mm",
        {**_MODEL_DECODE, "skip": (0.88,)},
        over("batched_mm, compiled"),
        least=2,
    ),
    Target(
        "Whole model, thresholds 0: the fastest compiled model's time over ours",
        {"kind": ("model",), "skip": (0.0,)},
        over("eager, compiled", "grouped_mm, compiled", "batched_mm, compiled"),
        least=1,
        even=True,
    ),
    Target(
        "One call of the op with next to no work, microseconds",
        {"family": ("op-overhead",)},
        microseconds,
        most=50,
        bounded=False,
    ),
)


def check_targets(entries: Sequence[Entry], targets: Iterable[Target] = TARGETS) -> list[dict[str, Any]]:
    """Each target with the worst of its cases.

    Returns:
        Dicts with `claim`, `wanted`, `value` (of the worst case: 20th percentile, median, 80th), `case`,
        `limit_allows` (what the measure would be were we as quick as the slowest limit), `met` (None where no
        case was measured), `cases`, and `missed`, the cases that miss it.
    """
    results = []
    for target in targets:
        values = {
            entry["id"]: value
            for entry in entries
            if target.picks(entry) and (value := target.measure(entry, entries)) is not None
        }
        bounds = {
            entry["id"]: values[entry["id"]][1] / part
            for entry in entries
            if entry["id"] in values and target.bounded and (part := limit(entry)) is not None
        }
        pick = max if target.least is None else min
        worst = pick(values, key=lambda name: values[name][1]) if values else None
        missed = [name for name, value in values.items() if not target.meets(value)]
        results.append(
            {
                "claim": target.claim,
                "wanted": target.wanted() + (", or even" if target.even else ""),
                "value": None if worst is None else list(values[worst]),
                "case": worst,
                "limit_allows": bounds.get(worst) if worst is not None else None,
                "met": None if worst is None else not missed,
                "cases": len(values),
                "missed": missed,
            }
        )
    return results


def render_targets(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; "even" is said of a miss that the spread covers."""
    lines = ["| claim | wanted | measured, worst case | limit allows | met | case |", "|---" * 6 + "|"]
    for result in results:
        if result["value"] is None:
            lines.append(f"| {result['claim']} | {result['wanted']} | - | - | not measured | |")
            continue
        low, middle, high = (f"{value:.3g}" for value in result["value"])
        met = "yes" if result["met"] else f"**no**, {len(result['missed'])} of {result['cases']} cases miss"
        measured = f"{middle} ({low} to {high})"
        bound = "-" if result["limit_allows"] is None else f"{result['limit_allows']:.3g}"
        cells = (result["claim"], result["wanted"], measured, bound, met, result["case"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
