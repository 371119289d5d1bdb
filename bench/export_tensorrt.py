"""Engines of TensorRT-RTX, built without a GPU: size, build time, scratch memory, beside the unmodified.

    python bench/export_tensorrt.py [--cases demo layer] [--dtypes float16 bfloat16] [--record FILE.json]

`demo` is the shipped model, `layer` a random Qwen3-VL-MoE with one decoder layer of Qwen3-VL-30B-A3B's sizes
(128 experts, top-8, hidden 2048, intermediate 768). One row, 1 to 4096 tokens, one engine for three kinds of
GPU. The unmodified model is what transformers' ONNX exporter writes. Nothing here runs an engine.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from export_cases import examples, profile_at
from export_onnx import unmodified_onnx
from machine import machine

import modes_fx
from modes_fx import demo
from modes_fx.aot import tensorrt_rtx
from modes_fx.aot.manifest import Range
from modes_fx.aot.programs import Sizes
from modes_fx.errors import ExportError
from modes_fx.testing import tiny_profile
from modes_fx.testing.qwen3_vl_moe import tiny_inputs, tiny_qwen3_vl_moe

DYNAMIC = {"batch": (1, 1), "tokens": (1, 4096), "cache": (1, 4096)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=("demo", "layer"), choices=("demo", "layer"))
    parser.add_argument("--dtypes", nargs="*", default=("float16", "bfloat16"))
    parser.add_argument("--record", type=Path, help="Write the rows to this file.")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for dtype in options.dtypes:
            for row in build(case, getattr(torch, dtype)):
                rows.append({"case": case, "dtype": dtype, **row})
                print(json.dumps(rows[-1]), flush=True)
    if options.record:
        options.record.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def build(case: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each engine: the skipping programs', and the unmodified prefill's."""
    model: Any
    if case == "demo":
        model, processor = demo.load()
        profile, inputs = profile_at(model, processor, 0.83), examples(rows=1)
    else:
        model = tiny_qwen3_vl_moe(num_layers=1, num_experts=128, top_k=8, hidden=2048, intermediate=768)
        profile, inputs = tiny_profile(model), [tiny_inputs()]
    model = model.to(dtype)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "engines"
        manifest = modes_fx.export(model, profile, inputs, folder, target="tensorrt-rtx", dynamic=DYNAMIC)
        for name in manifest.programs:
            rows.append({"model": "skipping", "program": name, **manifest.details[name]})
        sizes = Sizes(**{name: Range(*size) for name, size in DYNAMIC.items()})
        path = Path(scratch) / "unmodified.onnx"
        traced = unmodified_onnx(model, inputs, sizes, path)
        row = {"model": "unmodified", "program": "prefill"}
        try:
            shapes = tensorrt_rtx.shapes_of(traced)
            engine = tensorrt_rtx.build_engine(path, shapes, tensorrt_rtx.COMPUTE_CAPABILITIES)
            rows.append({**row, **engine.report()})
        except ExportError as error:
            rows.append({**row, "error": str(error)})
    return rows


if __name__ == "__main__":
    main()
