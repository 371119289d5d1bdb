"""Engines of TensorRT on the GPU of this machine: exported, built, run, and compared with the eager model.

    pip install -e '.[onnx]' 'tensorrt-cu13>=11.1'
    python bench/export_tensorrt_gpu.py [--dtype float16] [--rate 0.83] [--exact | --without-plugins]

Needs an NVIDIA GPU; fails without one. The shipped model: largest difference of any logit of any question
from the eager model with dropped pairs at weight zero, how many greedy answers are the same to the token,
time of a prefill (once more with --without-plugins to compare), and the GPU memory that is gone after
prefills of hundreds of lengths (NVIDIA/TensorRT issue 4849: it must not grow once every bucket was seen).
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from export_cases import answers_like, examples, profile_at
from torch import Tensor

import modes_fx
from modes_fx import demo
from modes_fx.aot.loaded import ExportedModel, load

# Of a logit. float16 rounds each of them by about 1e-2, and sums in another order.
MOST = {"float32": 1e-3, "float16": 0.1}
DYNAMIC = {"batch": (1, 8), "tokens": (1, 1024), "cache": (1, 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=MOST, default="float32")
    parser.add_argument("--rate", type=float, default=0.83, help="part of the pairs that is dropped")
    parser.add_argument("--questions", type=int, default=32)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--exact", action="store_true", help="kernels for this GPU's architecture alone")
    choice.add_argument("--without-plugins", action="store_true", help="engines from the ONNX body alone")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This needs an NVIDIA GPU, and torch finds none here.")
    try:
        from modes_fx.aot.tensorrt_engines import build_engines
    except ModuleNotFoundError as error:
        sys.exit(f"This needs {error.name}: pip install 'tensorrt-cu13>=11.1'.")
    model, processor = demo.load()
    model = model.to(getattr(torch, options.dtype))
    questions = [_cast(demo.question("test", index)[0], model.dtype) for index in range(options.questions)]
    profile = profile_at(model, processor, options.rate, questions)
    traced = [_cast(inputs, model.dtype) for inputs in examples()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        modes_fx.export(model, profile, traced, folder, target="tensorrt", dynamic=DYNAMIC)
        manifest = build_engines(folder, plugins=not options.without_plugins, exact=options.exact)
        print(json.dumps(manifest.details["engines"], indent=1))
        program = load(folder)
        result: dict[str, Any] = {"questions": len(questions)}
        result |= answers_like(model, profile, program, questions)
        result |= {"prefill_ms": time_prefill(program), "leaked_bytes": leaked(program)}
    print(json.dumps(manifest.requires | result, indent=1))
    if not result["max_difference"] <= MOST[options.dtype]:
        sys.exit(f"Logits differ by {result['max_difference']:.1e}, more than {MOST[options.dtype]:.0e}.")
    if options.dtype == "float32" and result["same_answers"] < len(questions):
        sys.exit(f"{len(questions) - result['same_answers']} of {len(questions)} answers differ.")
    if result["leaked_bytes"] > 0:
        sys.exit(f"{result['leaked_bytes']} bytes of GPU memory were lost to calls of sizes that were seen.")


def time_prefill(program: ExportedModel, tokens: int = 1000, repeats: int = 20) -> float:
    """Median milliseconds of a prefill of text, the copies of its inputs and logits included."""
    ids = torch.full((1, tokens), 9)
    found = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        program(input_ids=ids)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return round(statistics.median(found[3:]), 3)


def leaked(program: ExportedModel, repeats: int = 3) -> int:
    """Bytes of GPU memory that prefills of 1 to 1000 tokens take for good, once all sizes were seen."""
    free = []
    for _ in range(repeats):
        for tokens in range(1, 1001, 3):
            program(input_ids=torch.full((1, tokens), 9))
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    return free[0] - free[-1]


def _cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


if __name__ == "__main__":
    main()
