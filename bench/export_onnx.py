"""Prefill in onnxruntime: the exported skipping model beside transformers' ONNX export of the unmodified one.

    python bench/export_onnx.py [--rates 0 0.5 0.83] [--rows 1 16] [--record FILE.json]

The unmodified graph is what transformers' exporter makes of the same traced program: one MatMul for each
expert, on its own rows. Both run in one process on one thread, in turns; medians of CPU time and their ratio.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]
import torch
from export_cases import examples, profile_at
from interleave import Run, interleave
from machine import machine

import modes_fx
from modes_fx import demo
from modes_fx.aot.export import DYNAMIC
from modes_fx.aot.loaded import ExportedModel, load
from modes_fx.aot.manifest import Range
from modes_fx.aot.programs import Sizes, Traced, trace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="*", default=(0.0, 0.5, 0.83))
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 16), help="Questions of one prefill.")
    parser.add_argument("--budget", type=float, default=20, help="Seconds of a comparison.")
    parser.add_argument("--record", type=Path, help="Write the rows to this file.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = demo.load()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        plain = open_unmodified(model, Path(scratch) / "plain.onnx")
        for rate in options.rates:
            folder = Path(scratch) / f"at-{rate}"
            modes_fx.export(model, profile_at(model, processor, rate), examples(), folder, target="onnx")
            for rows in options.rows:
                found.append(
                    {"rate": rate, "rows": rows, **compare(plain, load(folder), rows, options.budget)}
                )
                print(json.dumps(found[-1]), flush=True)
    if options.record:
        options.record.write_text(json.dumps({"machine": machine(), "rows": found}, indent=2) + "\n")


def open_unmodified(model: Any, path: Path) -> Any:
    """The unmodified prefill as a session of onnxruntime."""
    unmodified_onnx(model, examples(), Sizes(**{n: Range(*size) for n, size in DYNAMIC.items()}), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def unmodified_onnx(model: Any, batches: list[Any], sizes: Sizes, path: Path) -> Traced:
    """Write the unmodified model's prefill with transformers' translations; gives what was traced."""
    from transformers.exporters import exporter_onnx as theirs
    from transformers.exporters.utils import apply_fx_node_fixes, apply_patches

    with apply_patches("onnx"):
        traced = trace(model, batches, sizes).prefill
        apply_fx_node_fixes("onnx", traced.program.graph_module)
        converted = torch.onnx.export(
            traced.program,
            dynamo=True,
            custom_translation_table=theirs._ONNX_TRANSLATION_TABLE,
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            verbose=False,
        )
    assert converted is not None
    converted.save(str(path), external_data=True)
    return traced


def compare(plain: Any, program: ExportedModel, rows: int, budget_s: float) -> dict[str, Any]:
    """Milliseconds of the language model of both on the same inputs; the vision encoder is the same."""
    batch = demo.batches("test", rows, batch_size=rows)[0].inputs
    tensors = program.prefill_tensors(**batch)
    feed = {name: tensor.numpy() for name, tensor in tensors.items()}
    runs = {
        "unmodified": Run(lambda _: plain.run(None, feed), clock=time.process_time),
        "skipping": Run(lambda _: program.run("prefill", tensors), clock=time.process_time),
    }
    for run in runs.values():
        run.time(0)
    spent = interleave(runs, budget_s=budget_s)
    ratios = [a / b for a, b in zip(spent["unmodified"], spent["skipping"], strict=True)]
    return {
        "tokens": batch["input_ids"].numel(),
        **{f"{name}_ms": round(statistics.median(times), 2) for name, times in spent.items()},
        "times_faster": round(statistics.median(ratios), 2),
        "passes": len(ratios),
    }


if __name__ == "__main__":
    main()
