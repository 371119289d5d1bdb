"""What alpha costs, and how well its estimates rank the blocks.

    python bench/alpha.py [--samples 130] [--json bench/results/alpha.json]

For each model and meaning of alpha: the paper's passes (one for the original and one for each block and thing
dropped, each of the whole model) beside passes that reuse what a dropped block cannot change. Layer runs are
calls of a layer's attention and experts that compute something, with the check of the first batch; FLOPs are
of matrix products, counted as they are dispatched; seconds are of this thread, beside whole passes that
remember the vision tower alone. Alphas have to be equal to the last bit.

Then the estimates: seconds, and Spearman's rank correlation with the exact alpha over the blocks, for text
and for vision; beside them the exact alpha of so few samples that it takes about as long as `taylor`.
"""

import argparse
import functools
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import machine, versions
from torch.utils.flop_counter import FlopCounterMode

from modes_fx import Profile, calibrate, demo
from modes_fx.blocks import find_blocks
from modes_fx.calibration.alpha_exact import VARIANTS
from modes_fx.calibration.alpha_taylor import ESTIMATES, rank_correlation
from modes_fx.measure import answer_logits, evaluating
from modes_fx.profile import write_atomically
from modes_fx.testing import SPECIAL, tiny_inputs, tiny_qwen3_vl_moe

_DEEP = 24  # layers


def demo_case(samples: int, batch_size: int) -> dict[str, Any]:
    """The shipped model, trained, 6 layers."""
    model, processor = demo.load()
    batches = demo.batches("calibration", samples, batch_size=batch_size)
    return {"model": model, "batches": batches, "given": {"processor": processor}}


def deep_case(samples: int, batch_size: int) -> dict[str, Any]:
    """As many layers as models have that matter; random weights."""
    model = tiny_qwen3_vl_moe(num_layers=_DEEP, hidden=64)
    batches = []
    for seed in range(math.ceil(samples / batch_size)):
        inputs = tiny_inputs(text=24, grid=(8, 8), batch=batch_size, seed=seed)
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        batches.append({**inputs, "labels": labels})
    return {"model": model, "batches": batches, "given": {"special_token_ids": SPECIAL}}


@contextmanager
def counted_layers(model: torch.nn.Module) -> Iterator[Counter[str]]:
    """Counts calls of attention and of experts that compute, in the decoder."""
    count: Counter[str] = Counter()

    def counting(forward: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            count[what] += 1
            return forward(*args, **kwargs)

        return call

    parts: dict[type[Any], str] = {}
    for block in find_blocks(model):
        layer = model.get_submodule(block.name.rpartition(".")[0])
        parts |= {type(layer.self_attn): "attention", type(block.experts): "experts"}
    own = {kind: kind.forward for kind in parts}
    for kind, what in parts.items():
        kind.forward = counting(own[kind], what)  # type: ignore[method-assign]
    try:
        yield count
    finally:
        for kind, forward in own.items():
            kind.forward = forward  # type: ignore[method-assign]


def _grouped_flops(a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Every row of `a [T, K]` times one matrix of `b [E, K, N]`."""
    return 2 * a[0] * a[1] * b[-1]


def one_pass(case: dict[str, Any]) -> dict[str, float]:
    """What the original model takes for all samples, once."""
    model = case["model"]
    with evaluating(model), _counting_flops() as flops, counted_layers(model) as layers:
        for batch in case["batches"]:
            answer_logits(model, batch)
    return {"tflop": flops.get_total_flops() / 1e12, **layers}


def _counting_flops() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})


def measure(case: dict[str, Any], batches: Sequence[Any] | None = None, **given: Any) -> dict[str, Any]:
    """One calibration: its profile and what it took. It runs twice, for counting FLOPs takes time."""
    model, batches = case["model"], case["batches"] if batches is None else batches
    run = functools.partial(calibrate, model, batches, progress=False, **case["given"], **given)
    start = time.thread_time()
    profile = run()
    seconds = time.thread_time() - start
    with _counting_flops() as flops, counted_layers(model) as layers:
        run()
    return {"profile": profile, "seconds": seconds, "tflop": flops.get_total_flops() / 1e12, **layers}


def reuse_rows(name: str, case: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    once = one_pass(case)
    blocks = len(find_blocks(case["model"]))
    variant: Any
    for variant, meaning in VARIANTS.items():
        passes = 1 + blocks * len(meaning.dropped)
        start = time.thread_time()
        whole = calibrate(
            case["model"], case["batches"], progress=False, variant=variant, reuse=False, **case["given"]
        )
        whole_seconds = time.thread_time() - start
        reused = measure(case, variant=variant)
        row = {
            "model": name,
            "variant": variant,
            "equal": reused["profile"] == whole,
            "paper_passes": passes,
            **{f"{key}_ratio": reused[key] / (passes * once[key]) for key in once},
            "of_one_alpha": reused["tflop"] / ((1 + blocks) * once["tflop"]),
            "seconds_ratio": reused["seconds"] / whole_seconds,
            "seconds": reused["seconds"],
            "whole_seconds": whole_seconds,
        }
        rows.append({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
        print(
            f"{name:5} {variant:10} equal {row['equal']!s:5} of {passes} passes: attention "
            f"{row['attention_ratio']:.3f}, experts {row['experts_ratio']:.3f}, "
            f"FLOPs {row['tflop_ratio']:.3f} (of {1 + blocks} passes: {row['of_one_alpha']:.3f}); "
            f"{row['seconds']:.1f} s, {row['seconds_ratio']:.3f} of whole passes",
            flush=True,
        )
    return rows


def correlations(estimated: Profile, exact: Profile) -> dict[str, float]:
    columns = [
        [[getattr(layer, key) for layer in profile.layers] for key in ("alpha_text", "alpha_vision")]
        for profile in (estimated, exact)
    ]
    pairs = {"text": (columns[0][0], columns[1][0]), "vision": (columns[0][1], columns[1][1])}
    return {key: round(rank_correlation(*pair), 3) for key, pair in pairs.items()}


def estimate_rows(name: str, case: dict[str, Any]) -> list[dict[str, Any]]:
    batches = case["batches"]
    exact = measure(case)
    rows: list[dict[str, Any]] = []

    def add(method: str, found: dict[str, Any], samples: int) -> None:
        row = {"model": name, "method": method, "samples": samples, "seconds": round(found["seconds"], 2)}
        row["seconds_ratio"] = round(found["seconds"] / exact["seconds"], 3)
        row["tflop_ratio"] = round(found["tflop"] / exact["tflop"], 3)
        rows.append(row | correlations(found["profile"], exact["profile"]))
        print(
            f"{name:5} {method:12} {samples:4} samples  {row['seconds']:6.2f} s, {row['seconds_ratio']:.3f} "
            f"of exact; rank correlation: text {rows[-1]['text']:.3f}, vision {rows[-1]['vision']:.3f}",
            flush=True,
        )

    total = sum(len(batch["labels"]) for batch in batches)
    add("exact", exact, total)
    taylor = None
    for method in ESTIMATES:
        found = measure(case, method=method)
        taylor = taylor or found
        add(method, found, total)
    assert taylor is not None
    few = batches[: max(1, int(len(batches) * taylor["seconds"] / exact["seconds"]))]
    add("exact, fewer", measure(case, few), sum(len(batch["labels"]) for batch in few))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--samples", type=int, default=130)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = {
        "demo": demo_case(args.samples, args.batch_size),
        "deep": deep_case(4 * args.batch_size, args.batch_size),
    }
    record: dict[str, Any] = {"machine": machine(), "versions": versions(None), "reuse": [], "estimates": []}
    for name, case in cases.items():
        record["reuse"] += reuse_rows(name, case)
    for name, case in cases.items():
        record["estimates"] += estimate_rows(name, case)
    if args.json:
        write_atomically(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
