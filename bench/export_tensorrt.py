"""Engines of TensorRT-RTX, built without a GPU: size, build time, scratch memory, beside the unmodified.

    python bench/export_tensorrt.py [--cases demo layer] [--dtypes float16 bfloat16] [--forms ...] [--record]

`demo` is the shipped model, `layer` a random Qwen3-VL-MoE with one decoder layer of Qwen3-VL-30B-A3B's sizes
(hidden 2048, 128 experts of 768, top-8, 32 heads over 4). One row, 1 to 4096 tokens, one engine for three
kinds of GPU. Nothing here runs an engine.

The unmodified model is written by transformers' ONNX translations, in each form that its experts have:

    grouped     transformers' own for export: one product for each expert, on its own rows
    gathered    transformers' `batched_mm`: each pair gets a copy of its expert's weights
    all         every expert on every token, weighted by zero where it was not chosen
    blocks      our body with thresholds of zero: what skipping adds to an engine is the difference
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from export_cases import equal_profile, examples
from export_onnx import unmodified_onnx
from machine import machine, versions
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import modes_fx
from modes_fx import demo
from modes_fx.aot import tensorrt_rtx
from modes_fx.aot.manifest import Range
from modes_fx.aot.programs import Sizes
from modes_fx.errors import ExportError
from modes_fx.profile import Profile, write_atomically
from modes_fx.testing import tiny_profile
from modes_fx.testing.qwen3_vl_moe import tiny_inputs, tiny_qwen3_vl_moe

RESULTS = Path(__file__).parent / "results"
DYNAMIC = {"batch": (1, 1), "tokens": (1, 4096), "cache": (1, 4096)}
PROGRAMS = ("prefill", "decode")
# What a build may ask for at most; beyond it the export fails.
MAX_ACTIVATION_BYTES = 2 << 30
UNMODIFIED = {"grouped": "grouped_mm", "gathered": "batched_mm", "all": "all_experts"}
KEYS = ("case", "dtype", "form", "program")
FORMS = ("skipping", "blocks", *UNMODIFIED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=("demo", "layer"), choices=("demo", "layer"))
    parser.add_argument("--dtypes", nargs="*", default=("float16", "bfloat16"))
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--record", action="store_true", help="Write results/export_tensorrt.json and .md.")
    options = parser.parse_args()
    ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)
    check_forms()
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for dtype in options.dtypes:
            model, profile, inputs = CASES[case](getattr(torch, dtype))
            for form in options.forms:
                for row in build(model, profile, inputs, form):
                    rows.append({"case": case, "dtype": dtype, "form": form, **row})
                    print(json.dumps(rows[-1]), flush=True)
                if options.record:
                    record(rows)
    print(markdown(rows))


def record(rows: Sequence[dict[str, Any]]) -> None:
    """Write what there is so far, beside what earlier runs have of other engines: all take half an hour."""
    path = RESULTS / "export_tensorrt.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    engines = {tuple(row[key] for key in KEYS): row for row in [*before, *rows]}
    rows = [engines[key] for key in sorted(engines, key=_place)]
    body: dict[str, Any] = {"machine": machine(), "versions": versions(None)}
    body |= {"tensorrt_rtx": tensorrt_rtx.requires()["tensorrt_rtx"], "dynamic": DYNAMIC}
    body |= {"compute_capabilities": tensorrt_rtx.COMPUTE_CAPABILITIES, "rows": rows}
    write_atomically(path, json.dumps(body, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(rows))


def _place(key: tuple[str, ...]) -> tuple[Any, ...]:
    case, dtype, form, program = key
    return case, dtype, PROGRAMS.index(program), FORMS.index(form)


def shipped(dtype: torch.dtype) -> tuple[Any, Profile, list[dict[str, Tensor]]]:
    """The model, its profile, and what it is traced with."""
    model, processor = demo.load(dtype)
    return model, equal_profile(model, processor, tau=0.12, rate=0.5), examples(rows=1)[:1]


def layer(dtype: torch.dtype) -> tuple[Any, Profile, list[dict[str, Tensor]]]:
    sizes: dict[str, Any] = {"hidden": 2048, "num_experts": 128, "top_k": 8, "intermediate": 768}
    model = tiny_qwen3_vl_moe(num_layers=1, heads=(32, 4), head_dim=128, dtype=dtype, **sizes)
    return model, tiny_profile(model), [tiny_inputs()]


CASES = {"demo": shipped, "layer": layer}


def build(
    model: Any, profile: Profile, inputs: Sequence[dict[str, Tensor]], form: str
) -> Iterator[dict[str, Any]]:
    """A row for each program: what the engine reports, or why there is none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / form
        if form in UNMODIFIED:
            yield from build_unmodified(model, inputs, form, folder)
            return
        if form == "blocks":
            profile = profile.with_thresholds(tau_text=0.0, tau_vision=0.0)
        limit = {"max_activation_bytes": MAX_ACTIVATION_BYTES}
        manifest = modes_fx.export(
            model, profile, inputs, folder, target="tensorrt-rtx", dynamic=DYNAMIC, options=limit
        )
        for program in PROGRAMS:
            yield {"program": program, **manifest.details[program]}


def build_unmodified(
    model: Any, inputs: Sequence[dict[str, Tensor]], form: str, folder: Path
) -> Iterator[dict[str, Any]]:
    sizes = Sizes(**{name: Range(*size) for name, size in DYNAMIC.items()})
    before = model.config._experts_implementation
    model.set_experts_implementation(UNMODIFIED[form])
    try:
        traced = unmodified_onnx(model, inputs, sizes, folder, PROGRAMS)
    finally:
        model.set_experts_implementation(before)
    for program in PROGRAMS:
        try:
            shapes = tensorrt_rtx.shapes_of(traced[program])
            path = folder / f"{program}.onnx"
            engine = tensorrt_rtx.build_engine(path, shapes, tensorrt_rtx.COMPUTE_CAPABILITIES)
            yield {"program": program, **engine.report()}
        except ExportError as error:
            yield {"program": program, "error": str(error)}


def all_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The form `all`, as transformers calls it: `hidden [T, H]`, `chosen` and `weights [T, K]`."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    dense = hidden.new_zeros(hidden.shape[0], gate_up.shape[0]).scatter(1, chosen, weights.to(hidden.dtype))
    rows = hidden.expand(gate_up.shape[0], -1, -1)
    results = torch.bmm(experts._apply_gate(torch.bmm(rows, gate_up)), down)
    return (results * dense.t()[..., None]).sum(0)


@torch.no_grad()
def check_forms() -> None:
    """All forms of the unmodified model compute the same, in float32."""
    model, inputs = tiny_qwen3_vl_moe(), tiny_inputs()
    want = model(**inputs).logits
    for name in UNMODIFIED.values():
        model.set_experts_implementation(name)
        torch.testing.assert_close(model(**inputs).logits, want, atol=1e-4, rtol=0)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Engines of TensorRT-RTX, built without a GPU",
        "",
        "`python bench/export_tensorrt.py --record`: one engine for "
        f"{', '.join(tensorrt_rtx.COMPUTE_CAPABILITIES)}, one row, 1 to 4096 tokens or cached tokens, built "
        "on a CPU that other jobs shared. Scratch memory is what the builder says that an execution takes at "
        "the largest sizes. No engine was run.",
        "",
        "`skipping` is ours. The others are the unmodified model: `blocks` is our body with thresholds of "
        "zero; `grouped` transformers' own ONNX form, one product for each expert; `gathered` its "
        "`batched_mm`, a copy of the weights for each pair; `all` every expert on every token. `layer` is "
        "one of Qwen3-VL-30B-A3B's sizes.",
        "",
        "| model | dtype | program | experts | engine (MB) | scratch (MB) | build (s) | layers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["case"], row["dtype"], row["program"], row["form"]]
        if "error" in row:
            cells += [f"refused: {row['error'].rpartition(': ')[2]}", "", "", ""]
        else:
            cells += [f"{row[key] / 1e6:.1f}" for key in ("engine_bytes", "activation_bytes")]
            cells += [f"{row['build_ms'] / 1e3:.1f}", str(row["layers"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
