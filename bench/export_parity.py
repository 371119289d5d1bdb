"""Exported programs beside the eager model with dropped pairs at weight zero, on questions of the test split.

    python bench/export_parity.py [--target onnx] [--rates 0 0.5 0.83 1] [--questions 32] [--record FILE.json]

For each skip rate: the largest difference of any logit of any question (the token counts of most were not
exported), and how many of the greedy answers are the same to the token.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from export_cases import RATES, examples, profile_at
from machine import machine

import modes_fx
from modes_fx import demo
from modes_fx.aot.loaded import load
from modes_fx.skipping import simulate

MAX_NEW_TOKENS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=("onnx", "aoti"), default="onnx")
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--record", type=Path, help="Write the rows to this file.")
    options = parser.parse_args()
    model, processor = demo.load()
    rows = []
    for rate in options.rates:
        profile = profile_at(model, processor, rate)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            modes_fx.export(model, profile, examples(), folder, target=options.target)
            rows.append({"target": options.target, "rate": rate, **compare(model, profile, folder, options)})
        print(json.dumps(rows[-1]), flush=True)
    if options.record:
        body = {"machine": machine(), "questions": options.questions, "rows": rows}
        options.record.write_text(json.dumps(body, indent=2) + "\n")


@torch.no_grad()
def compare(
    model: Any, profile: modes_fx.Profile, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Largest difference of logits, equal answers, and the skip rate of the questions."""
    program = load(folder)
    furthest, same, dropped, pairs = 0.0, 0, 0, 0
    for index in range(options.questions):
        inputs: dict[str, Any] = demo.question("test", index)[0]
        with simulate(model, profile) as counts:
            want = model(**inputs).logits
        dropped, pairs = dropped + int(counts.dropped.sum()), pairs + int(counts.pairs.sum())
        furthest = max(furthest, float((program(**inputs).logits - want).abs().max()))
        with simulate(model, profile):
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = tokens[:, inputs["input_ids"].shape[1] :]
        same += program.generate(max_new_tokens=MAX_NEW_TOKENS, **inputs).tolist() == answer.tolist()
    return {"skip": dropped / pairs, "max_difference": furthest, "same_answers": same}


if __name__ == "__main__":
    main()
