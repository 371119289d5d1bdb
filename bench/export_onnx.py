"""Prefill in onnxruntime: the exported skipping model beside transformers' ONNX export of the unmodified one.

    python bench/export_onnx.py [--rates 0 0.5 0.83] [--rows 1 16] [--budget 20] [--record]

The unmodified graph is what transformers' exporter makes of the same traced program: one MatMul for each
expert, on its own rows; and that graph with the exporter's fusions for onnxruntime on a CPU. Rates are parts
of all pairs, measured on the timed inputs; thresholds are chosen for the last number of rows. All run in one
process on one thread, in turns; medians of CPU time, and of the ratios pass by pass. Fails where skipping is
not faster at 83 %, or where nothing is skipped and the logits differ.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]
import torch
from export_cases import RATES, examples, measured_skip, profile_at
from interleave import Run, interleave, spread
from interleave import ratios as ratios_of
from machine import machine, versions
from torch import Tensor

import modes_fx
from modes_fx import demo
from modes_fx.aot.export import DYNAMIC
from modes_fx.aot.loaded import load
from modes_fx.aot.manifest import Range
from modes_fx.aot.programs import Sizes, Traced, trace
from modes_fx.profile import write_atomically

RESULTS = Path(__file__).parent / "results"
MUST_BE_FASTER = 0.83
UNMODIFIED, FUSED, SKIPPING = "unmodified", "unmodified, fused", "skipping"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="*", default=RATES[:-1])
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 16), help="Questions of a prefill.")
    parser.add_argument("--budget", type=float, default=20, help="Seconds of a comparison.")
    parser.add_argument("--record", action="store_true", help="Write results/export_onnx.json and .md.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = demo.load()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        sizes = Sizes(**{name: Range(*size) for name, size in DYNAMIC.items()})
        plain = {}
        for name, fused in ((UNMODIFIED, False), (FUSED, True)):
            unmodified_onnx(model, examples(), sizes, Path(scratch) / name, fused=fused)
            plain[name] = session(Path(scratch) / name / "prefill.onnx")
        batches = [demo.batches("test", 13 * rows, batch_size=rows)[0].inputs for rows in options.rows]
        for rate in options.rates:
            folder = Path(scratch) / f"{rate}"
            profile = profile_at(model, processor, rate, batches[-1:])
            modes_fx.export(model, profile, examples(), folder, target="onnx")
            for batch in batches:
                skip = measured_skip(model, profile, [batch]).skip()
                times = compare(plain, folder, batch, options.budget, is_equal=rate == 0)
                found.append({"rate": rate, "skip": round(skip, 4), "rows": len(batch["input_ids"]), **times})
                print(json.dumps(found[-1]), flush=True)
    text = markdown(found)
    print(text)
    if options.record:
        body = {"machine": machine(), "versions": versions(None), "onnxruntime": onnxruntime.__version__}
        write_atomically(RESULTS / "export_onnx.json", json.dumps({**body, "rows": found}, indent=1) + "\n")
        write_atomically(RESULTS / "export_onnx.md", text)
    slow = [
        f"at {100 * row['skip']:.0f} % and {row['tokens']} tokens skipping is not faster"
        for row in found
        if row["rate"] >= MUST_BE_FASTER and row["times_faster"][UNMODIFIED][1] <= 1
    ]
    if slow:
        sys.exit("; ".join(slow))


def session(path: Path) -> Any:
    """On one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def unmodified_onnx(
    model: Any,
    batches: Sequence[Any],
    sizes: Sizes,
    folder: Path,
    names: Sequence[str] = ("prefill",),
    *,
    fused: bool = False,
) -> dict[str, Traced]:
    """Write the unmodified model's programs as NAME.onnx, with transformers' translations.

    Args:
        names: `prefill`, `decode`.
        fused: With the exporter's own fusions for onnxruntime on a CPU.
    Returns:
        What was traced, by name.
    """
    from transformers.exporters import exporter_onnx as theirs
    from transformers.exporters.utils import apply_fx_node_fixes, apply_patches

    folder.mkdir(exist_ok=True)
    found: dict[str, Traced] = {}
    with apply_patches("onnx"):
        whole = trace(model, batches, sizes)
        for name in names:
            found[name] = traced = getattr(whole, name)
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
            theirs.apply_onnx_ir_fixes(converted)
            if fused:
                theirs.fuse_for_onnxruntime(converted.model, "cpu")
            converted.save(str(folder / f"{name}.onnx"), external_data=True)
    return found


def compare(
    plain: dict[str, Any], folder: Path, batch: dict[str, Tensor], budget_s: float, *, is_equal: bool
) -> dict[str, Any]:
    """Milliseconds of the language models on the same inputs; the vision encoder is the same."""
    program = load(folder)
    given: Any = batch
    tensors = program.prefill_tensors(**given)
    feed = {name: tensor.numpy() for name, tensor in tensors.items()}
    calls = {name: partial(each.run, None, feed) for name, each in plain.items()}
    calls[SKIPPING] = partial(program.run, "prefill", tensors)
    runs = {name: Run(partial(_call, each), clock=time.process_time) for name, each in calls.items()}
    logits = {name: torch.as_tensor(call()[0]) for name, call in calls.items()}
    if is_equal:
        real = batch["attention_mask"].bool()
        for name in plain:
            torch.testing.assert_close(logits[name][real], logits[SKIPPING][real], atol=1e-4, rtol=0)
    spent = interleave(runs, budget_s=budget_s)
    return {
        "tokens": batch["input_ids"].numel(),
        "ms": {name: [round(value, 3) for value in spread(times)] for name, times in spent.items()},
        "times_faster": {
            name: [round(value, 3) for value in ratios_of(spent[name], spent[SKIPPING])] for name in plain
        },
        "passes": len(spent[SKIPPING]),
    }


def _call(work: Callable[[], Any], sample: int) -> Any:
    return work()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Prefill in onnxruntime",
        "",
        "`python bench/export_onnx.py --record`: the shipped model's language model, float32, one CPU "
        "thread, runs in turns. Beside transformers' own ONNX export of the unmodified model, as it is and "
        "with its fusions for onnxruntime on a CPU. Medians (20 to 80 %).",
        "",
        "| dropped of all pairs | tokens | skipping | unmodified | faster | unmodified, fused | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{100 * row['skip']:.1f} %", str(row["tokens"]), _ms(row["ms"][SKIPPING])]
        for name in (UNMODIFIED, FUSED):
            low, median, high = row["times_faster"][name]
            cells += [_ms(row["ms"][name]), f"{median:.2f} ({low:.2f} to {high:.2f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _ms(values: Sequence[float]) -> str:
    return f"{values[1]:.2f} ms"


if __name__ == "__main__":
    main()
