"""What the Triton lowering takes of GPUs that are not here: compiled ahead of time, machine code examined.

    python bench/resources.py                  # sm_80, sm_90, sm_100, every kind of expert; minutes
    python bench/resources.py --arch 90 --calls "Kimi-VL-A3B"

Registers, spills and instructions are read from the machine code with the tools that come with Triton; the
blocks that fit on a multiprocessor follow from CUDA's occupancy rules. One process for each architecture, as
Triton's interpreter, in which work.py counts, cannot be left once it is chosen.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import torch
from layers import LAYERS, TOKENS, markdown, record, versions

from modes_fx.testing.compile_only import GPT_OSS, MULTIPROCESSORS, Experts, compile_lowering

QWEN, KIMI = (layer[1:] for layer in LAYERS)
CALLS = {
    "Qwen3-VL-30B-A3B": Experts(*QWEN),
    "Kimi-VL-A3B": Experts(*KIMI),
    "Qwen3-VL-30B-A3B in float32": Experts(*QWEN, torch.float32),
    "Kimi-VL-A3B in float16, renormalised": Experts(*KIMI, torch.float16, {"renormalise": True}),
    # Gate and up interleaved, transposed weights, biases, a long formula.
    "gpt-oss-20b": Experts(
        *(2880, 2880, 32, 4),
        flags={"interleaved": True, "is_transposed": True, "bias": True, "activation": GPT_OSS},
    ),
    # No gate as in Nemotron 3, weights on the input as in Llama 4.
    "no gate, weights on the input": Experts(
        *(2688, 1856, 128, 6), flags={"activation": "square(relu(x))", "weights_on_input": True}
    ),
    # Unaligned sizes: loads go through registers.
    "odd sizes": Experts(100, 50, 7, 3, torch.float16, {"activation": "gelu(gate) * up", "bias": True}),
}
ROUTED = (*TOKENS, 16384)  # numbers of tokens; the launcher chooses tiles by them


def compile_here(arch: int, names: list[str]) -> list[dict[str, Any]]:
    """Each kernel compiled for one architecture, with the calls that launch it."""
    warnings.filterwarnings("ignore", category=UserWarning, module="triton")
    rows: dict[str, dict[str, Any]] = {}
    with compile_lowering(arch) as launch:
        for name in names:
            for tokens in ROUTED:
                for kernel in launch(CALLS[name], tokens):
                    made = {"arch": arch, **vars(kernel), "used_by": {}}
                    made |= {"tensor_cores": kernel.tensor_cores, "spills": kernel.spills}
                    del made["opcodes"]
                    used_by = rows.setdefault(kernel.hash, made)["used_by"]
                    if tokens not in used_by.setdefault(name, []):
                        used_by[name].append(tokens)
    return list(rows.values())


def compile_for(arch: int, names: list[str]) -> list[dict[str, Any]]:
    """The same in a process of its own, with compiled Triton."""
    command = [sys.executable, __file__, "--here", "--arch", str(arch), "--calls", *names]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"Compiling for sm_{arch} failed:\n{child.stderr}")
    rows: list[dict[str, Any]] = json.loads(child.stdout.splitlines()[-1])
    return rows


HEADER = ["kernel", "launched by", "tile", "warps", "stages", "registers", "spills", "shared", "tensor cores"]
HEADER += ["blocks per SM", "warps per SM", "bound by"]


def table_row(kernel: dict[str, Any]) -> list[str]:
    used_by = [f"{name} ({', '.join(map(str, tokens))})" for name, tokens in kernel["used_by"].items()]
    tile = [f"{name} {value}" for name, value in sorted(kernel["constants"].items()) if _is_tile(name)]
    return [
        kernel["name"],
        "; ".join(used_by),
        ", ".join(tile),
        str(kernel["num_warps"]),
        str(kernel["num_stages"]),
        str(kernel["registers"]),
        f"{kernel['stack']} bytes" if kernel["stack"] or kernel["spills"] else "0",
        str(kernel["shared"]),
        ", ".join(f"{count} {name}" for name, count in kernel["tensor_cores"].items()) or "-",
        str(kernel["blocks"]),
        str(kernel["warps"]),
        kernel["bound"],
    ]


def _is_tile(name: str) -> bool:
    return name.startswith("BLOCK_") or name == "WIDTHS"


INTRODUCTION = """# What the Triton kernels take of a GPU

Compiled ahead of time by Triton {triton} (`python bench/resources.py --record`); nothing has run on a GPU.
Registers are a thread's, shared memory (bytes) is a block's, tensor-core instructions are those that stand in
the machine code. Blocks and warps that fit on a multiprocessor follow from CUDA's occupancy rules. In
brackets: numbers of tokens.
"""


def report(rows: list[dict[str, Any]]) -> str:
    parts = [INTRODUCTION.format(**versions())]
    for arch in sorted({row["arch"] for row in rows}):
        here = sorted((row for row in rows if row["arch"] == arch), key=lambda row: row["name"])
        parts += [f"## sm_{arch}\n", markdown(HEADER, [table_row(row) for row in here])]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(MULTIPROCESSORS), choices=MULTIPROCESSORS)
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=CALLS, metavar="NAME")
    parser.add_argument("--record", action="store_true", help="write bench/results/resources.{md,json}")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(compile_here(options.arch[0], options.calls)))
        return
    rows = [row for arch in options.arch for row in compile_for(arch, options.calls)]
    text = report(rows)
    print(text)
    for row in rows:
        if row["stack"] or row["spills"]:
            print(f"sm_{row['arch']} {row['name']} spills {row['stack']} bytes: {row['used_by']}")
    if options.record:
        record("resources", text, {"versions": versions(), "kernels": rows})


if __name__ == "__main__":
    main()
