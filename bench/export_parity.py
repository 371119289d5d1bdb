"""Exported programs beside the eager model with dropped pairs at weight zero, on questions of the test split.

    python bench/export_parity.py [--targets onnx aoti] [--rates 0 0.5 0.83 1] [--questions 32] [--record]

For each target and skip rate: the largest difference of any logit of any question (the token counts of most
were not exported), and how many of the greedy answers are the same to the token. Rates are measured on these
very questions, as parts of all pairs; at 1, all pairs that may be skipped are dropped, and those of special
tokens are left. Questions are those about scenes, whose pictures have one size. Fails where logits differ by
more than 1e-4, an answer differs, or a rate was not met. What was recorded of other targets and rates stays.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export_cases import RATES, TOLERANCE, answers_like, examples, measured_skip, of_skippable, profile_at
from machine import machine, versions
from torch import Tensor

import modes_fx
from modes_fx import demo
from modes_fx.aot.loaded import load
from modes_fx.profile import write_atomically

RESULTS = Path(__file__).parent / "results"
MOST = 1e-4
# Code that calls kernels is compiled in no time; the kernels as ever.
OPTIONS: dict[str, dict[str, Any]] = {"onnx": {}, "aoti": {"aot_inductor.compile_wrapper_opt_level": "O0"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=("onnx", "aoti"), default=("onnx", "aoti"))
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--record", action="store_true", help="Write results/export_parity.json and .md.")
    options = parser.parse_args()
    model, processor = demo.load()
    questions = scenes(options.questions)
    traced = examples()[:1]
    rows: list[dict[str, Any]] = []
    for rate in options.rates:
        profile = profile_at(model, processor, rate, questions)
        for target in options.targets:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "model"
                modes_fx.export(model, profile, traced, folder, target=target, options=OPTIONS[target])
                rows.append({"target": target, "rate": rate, **compare(model, profile, folder, questions)})
            print(json.dumps(rows[-1]), flush=True)
    body: dict[str, Any] = {"machine": machine(), "versions": versions(None)}
    body |= {"tokens_traced": traced[0]["input_ids"].shape[1], "questions": len(questions)}
    body |= {"tokens": sorted({inputs["input_ids"].shape[1] for inputs in questions}), "rows": rows}
    if options.record:
        record(body)
    print(markdown(body))
    problems = [problem for row in rows for problem in check(row, len(questions))]
    if problems:
        sys.exit("; ".join(problems))


def scenes(number: int) -> list[dict[str, Tensor]]:
    """So many questions of the test split about scenes, which are all but the last task."""
    places = [i for i in range(2 * number) if i % len(demo.TASKS) < len(demo.TASKS) - 1]
    return [demo.question("test", index)[0] for index in places[:number]]


def record(body: dict[str, Any]) -> None:
    """Write what was measured, and put what an earlier run has of other targets and rates beside it."""
    path = RESULTS / "export_parity.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["target"], row["rate"]): row for row in [*before, *body["rows"]]}
    body["rows"] = [rows[key] for key in sorted(rows)]
    write_atomically(path, json.dumps(body, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(body))


def compare(
    model: Any, profile: modes_fx.Profile, folder: Path, questions: Sequence[dict[str, Tensor]]
) -> dict[str, Any]:
    """Skip rates of the questions, largest difference of logits, and equal answers."""
    counts = measured_skip(model, profile, questions)
    return {
        "skip": round(counts.skip(), 4),
        "skip_of_skippable": round(of_skippable(counts), 4),
        **answers_like(model, profile, load(folder), questions),
    }


def check(row: dict[str, Any], questions: int) -> list[str]:
    """What of the claims a row does not show."""
    name = f"{row['target']} at {100 * row['rate']:g} %"
    problems = []
    if not row["max_difference"] <= MOST:
        problems.append(f"{name}: logits differ by {row['max_difference']:.1e}, more than {MOST:.0e}")
    if row["same_answers"] < questions:
        problems.append(f"{name}: {questions - row['same_answers']} of {questions} answers differ")
    measured = row["skip_of_skippable" if row["rate"] == 1 else "skip"]
    if abs(measured - row["rate"]) > TOLERANCE:
        problems.append(f"{name}: {100 * measured:.1f} % of the pairs are dropped")
    return problems


def markdown(body: dict[str, Any]) -> str:
    questions, tokens = body["questions"], ", ".join(map(str, body["tokens"]))
    lines = [
        "# Exported programs beside the eager model",
        "",
        f"`python bench/export_parity.py --record`, on the shipped model in float32: {questions} questions "
        f"of the test split, of {tokens} tokens; traced with {body['tokens_traced']}. Against the eager "
        "model with dropped pairs at weight zero.",
        "",
        "| target | dropped of all pairs | of pairs that may be skipped | largest difference of a logit | "
        "same answers |",
        "|---|---|---|---|---|",
    ]
    for row in body["rows"]:
        lines.append(
            f"| {row['target']} | {100 * row['skip']:.1f} % | {100 * row['skip_of_skippable']:.1f} % | "
            f"{row['max_difference']:.1e} | {row['same_answers']} of {questions} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
