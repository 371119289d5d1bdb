"""The gate of CI: numbers that are exact, or nearly, against bench/expected.csv. No times.

    python bench/check.py              # exit code 1 where a number is worse, or better and not noted
    python bench/check.py --update     # write what was found into expected.csv, margins kept

Groups: "work", what the Triton lowering executes, loads, stores and launches, counted in its interpreter;
"resources", what its kernels take of sm_80, sm_90 and sm_100, compiled ahead of time; "graph", what the
passes make of a tiny model, and how many function calls of Python that takes. (Instructions would say more,
but torch._C._instruction_counter needs performance counters, which virtual machines often lack.)
"""

import argparse
import csv
import importlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from layers import LAYERS, Case
from resources import compile_for
from work import count  # before anything that imports Triton

import modes_fx
from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe

EXPECTED = Path(__file__).parent / "expected.csv"
GROUPS = ("work", "resources", "graph")
HIGHER_IS_BETTER = {"blocks_per_sm", "uses_tensor_cores", "rewrites", "masked_moe_ops"}
# Relative, for a line that is new; the assembler's and transformers' minor releases move these a little.
MARGINS = {"registers": 0.03, "nodes": 0.03, "python_calls": 0.05}
MARGINS |= {"flops": 0.002, "bytes": 0.002, "dram_bytes": 0.002}
# What the kernels are meant to keep whatever expected.csv says: names (all that match), metric, at most.
PROMISES = (
    ("work .* 4096 tokens 88 % skipped", "flops", 1.15),
    ("work .* (1|16) tokens .* % skipped", "bytes", 1.1),
    ("resources .*", "spilled_bytes", 0),
)


class Line(NamedTuple):
    """A row of expected.csv: `value`, give or take `margin` times it."""

    name: str
    metric: str
    value: float
    margin: float

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.metric

    def __str__(self) -> str:
        return f"{self.name},{self.metric},{self.value:.6g},{self.margin:g}"


class Finding(NamedTuple):
    """A line beside what was measured. `problem` is empty where both agree, and else says what to do."""

    line: Line
    measured: float | None
    problem: str


def compare(expected: Sequence[Line], measured: Mapping[tuple[str, str], float]) -> list[Finding]:
    """Every line and every number, in the order of `expected`, then that of `measured`."""
    findings = [_compare(line, measured.get(line.key)) for line in expected]
    known = {line.key for line in expected}
    for (name, metric), value in measured.items():
        if (name, metric) not in known:
            line = Line(name, metric, value, MARGINS.get(metric, 0.0))
            findings.append(Finding(line, value, f"has no line. Add: {line}"))
    return findings


def _compare(line: Line, measured: float | None) -> Finding:
    if measured is None:
        return Finding(line, None, f"was not measured any more. Remove the line: {line}")
    if abs(measured - line.value) <= line.margin * abs(line.value):
        return Finding(line, measured, "")
    better = (measured > line.value) == (line.metric in HIGHER_IS_BETTER)
    change = f"{measured:.6g}, expected {line.value:.6g}"
    if line.value:
        change += f" ({100 * (measured / line.value - 1):+.1f} %, margin {100 * line.margin:g} %)"
    updated = line._replace(value=measured)
    if better:
        return Finding(line, measured, f"is {change}: better. Keep it: update the line to: {updated}")
    return Finding(
        line,
        measured,
        f"is {change}: a regression. If it is worth it, say why and update the line to: {updated}",
    )


def broken_promises(measured: Mapping[tuple[str, str], float]) -> list[str]:
    """Numbers above what `PROMISES` allows."""
    return [
        f"{name}: {metric} is {value:.6g}, at most {most:g} was promised, whatever expected.csv says."
        for (name, metric), value in measured.items()
        for pattern, promised, most in PROMISES
        if metric == promised and re.fullmatch(pattern, name) and not value <= most
    ]


def read(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        return [
            Line(row["name"], row["metric"], float(row["value"]), float(row["margin"]))
            for row in csv.DictReader(file)
        ]


def write(path: Path, lines: Iterable[Line]) -> None:
    path.write_text("name,metric,value,margin\n" + "".join(f"{line}\n" for line in lines))


def updated(expected: Sequence[Line], measured: Mapping[tuple[str, str], float]) -> list[Line]:
    """Lines for all that was measured: those that agree as they were, so that noise never moves them."""
    lines = []
    for finding in compare(expected, measured):
        if finding.measured is not None:
            lines.append(
                finding.line if not finding.problem else finding.line._replace(value=finding.measured)
            )
    return lines


def count_work() -> dict[tuple[str, str], float]:
    qwen, kimi = LAYERS
    cases = [Case(qwen, *at) for at in ((1, 0.0), (1, 0.88), (16, 0.0), (16, 0.88), (256, 0.5), (4096, 0.0))]
    cases += [Case(qwen, 4096, 0.88), Case(kimi, 16, 0.88), Case(kimi, 4096, 0.88)]
    found: dict[tuple[str, str], float] = {}
    for case in cases:
        counts = count(case)
        model = case.layer.model.split(",")[0]
        name = f"work {model} {case.tokens} tokens {100 * case.skip:.0f} % skipped"
        found[name, "flops"] = round(counts.flop_ratio, 4)
        found[name, "bytes"] = round(counts.byte_ratio, 4)
        found[name, "dram_bytes"] = round(counts.distinct_ratio, 4)
        found[name, "programs"] = counts.total.programs
        found[name, "programs_working"] = counts.total.working
        found[name, "launches"] = len(counts.launches)
    return found


def compile_resources(arch: int) -> dict[tuple[str, str], float]:
    """The most that any launch of a kernel takes, and the least that fits or that it has."""
    found: dict[tuple[str, str], float] = {}
    kernels: dict[str, list[dict[str, Any]]] = {}
    for kernel in compile_for(arch, ["Qwen3-VL-30B-A3B"]):
        kernels.setdefault(kernel["name"], []).append(kernel)
    for kernel_name, made in sorted(kernels.items()):
        name = f"resources sm_{arch} {kernel_name}"
        found[name, "registers"] = max(kernel["registers"] for kernel in made)
        found[name, "spilled_bytes"] = max(kernel["stack"] for kernel in made)
        found[name, "shared_bytes"] = max(kernel["shared"] for kernel in made)
        found[name, "blocks_per_sm"] = min(kernel["blocks"] for kernel in made)
        instructions = min(sum(kernel["tensor_cores"].values()) for kernel in made)
        if instructions:
            found[name, "uses_tensor_cores"] = 1
    return found


def rewrite_graph() -> dict[tuple[str, str], float]:
    """What the passes do with the one graph of a tiny Qwen3-VL-MoE of four layers."""
    # The package has the function under this name, not the module.
    module: Any = importlib.import_module("modes_fx.backend")
    run_passes = module.run_passes
    model, inputs = tiny_qwen3_vl_moe(num_layers=4), tiny_inputs(grid=None, text=15)
    profile = tiny_profile(model)
    found: dict[tuple[str, str], float] = {}
    name = "graph qwen3_vl_moe 4 layers"

    def counted(gm: Any, unit: Any, *others: Any) -> dict[str, int]:
        calls = 0

        def count(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            rewrites: dict[str, int] = run_passes(gm, unit, *others)
        finally:
            sys.setprofile(None)
        for each in ("provide_modality", "skip_experts"):
            found[f"{name} {each}", "rewrites"] = rewrites[each]
        found[name, "nodes"] = len(gm.graph.nodes)
        found[name, "masked_moe_ops"] = len(gm.graph.find_nodes(op="call_function", target=masked_moe))
        found[name, "python_calls"] = calls
        return rewrites

    with patch.object(module, "run_passes", counted), torch.no_grad():
        # The first time fills caches.
        for _ in range(2):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=modes_fx.backend(profile, lowering="eager"))
            compiled(**inputs)
    return found


def measure(groups: Iterable[str]) -> dict[tuple[str, str], float]:
    """All numbers of some groups. Ahead-of-time compilation is other processes' work, so it runs beside."""
    found: dict[tuple[str, str], float] = {}
    with ThreadPoolExecutor(max_workers=1) as pool:
        archs = (80, 90, 100) if "resources" in groups else ()
        compiled = [pool.submit(compile_resources, arch) for arch in archs]
        if "graph" in groups:
            found |= rewrite_graph()
        if "work" in groups:
            found |= count_work()
        for future in compiled:
            found |= future.result()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--update", action="store_true", help="write what was measured into expected.csv")
    options = parser.parse_args()
    expected = read(EXPECTED) if EXPECTED.exists() else []
    others = [line for line in expected if line.name.split()[0] not in options.groups]
    expected = [line for line in expected if line.name.split()[0] in options.groups]
    measured = measure(options.groups)
    findings = compare(expected, measured)
    for line, number, problem in findings:
        shown = "-" if number is None else f"{number:.6g}"
        mark = "**" if problem else "ok"
        print(f"{mark}  {line.name:58}  {line.metric:18}  {shown:>10}  {line.value:>10.6g}")
    problems = [f"{f.line.name}: {f.line.metric} {f.problem}" for f in findings if f.problem]
    broken = broken_promises(measured)
    if options.update:
        write(EXPECTED, sorted([*others, *updated(expected, measured)], key=lambda line: line.name))
        print(f"Wrote {EXPECTED}: {len(problems)} lines changed.")
    elif problems:
        print("", *problems, "", f"{len(problems)} of {len(findings)} numbers differ.", sep="\n")
        print("To accept all of them: python bench/check.py --update, and commit bench/expected.csv.")
    else:
        print(f"All {len(findings)} numbers are as expected.")
    for promise in broken:
        print(promise)
    sys.exit(1 if broken or (problems and not options.update) else 0)


if __name__ == "__main__":
    main()
