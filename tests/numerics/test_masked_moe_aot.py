"""The Triton lowering compiled ahead of time for GPUs that are not here: it has to fit, without spills.

The launches are the lowering's own, on meta tensors. That needs compiled Triton, and Triton decides once per
process, so each architecture is one child process: this file, run as a script.
"""

import json
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

from modes_fx.kernels._masked_moe_tiles import TABLE
from modes_fx.testing.compile_only import GPT_OSS, MULTIPROCESSORS, Experts, compile_lowering

DISPATCH = ["_threshold_kernel", "_scan_kernel", "_place_kernel", "_combine_kernel"]
GATE_UP = ["_gate_up_kernel", "_decode_gate_up_kernel"]
DOWN = ["_down_kernel", "_decode_down_kernel"]


# The kinds of experts beside the plain one, which bench/check.py compiles in CI.
MODELS = {
    # Its slots are no power of two, and its many tokens are what spills first on sm_80.
    "Kimi-VL-A3B": Experts(2048, 1408, 64, 6),
    "Kimi-VL-A3B in float32": Experts(
        *(2048, 1408, 64, 6, torch.float32), flags={"renormalise": True, "mask": False}
    ),
    # gpt-oss: gate and up interleaved, transposed weights, biases, a long formula.
    "interleaved": Experts(
        *(2880, 2880, 32, 4, torch.float16),
        flags={"interleaved": True, "is_transposed": True, "bias": True, "activation": GPT_OSS},
    ),
    # Nemotron 3's formula and Llama 4's weights.
    "no gate, weights on the input": Experts(
        *(2688, 1856, 128, 6), flags={"activation": "square(relu(x))", "weights_on_input": True}
    ),
    # Unaligned sizes: loads go through registers.
    "odd sizes": Experts(100, 50, 7, 3, torch.float16, {"activation": "gelu(gate) * up", "bias": True}),
}
# Model, tokens, and the class of `TABLE` that they are.
CALLS = [
    ("Kimi-VL-A3B", 16384, "many"),
    ("Kimi-VL-A3B in float32", 8, "float32 decode"),
    ("Kimi-VL-A3B in float32", 4096, "float32"),
    ("interleaved", 8, "decode"),
    ("interleaved", 4096, "some"),
    ("interleaved", 16384, "many"),
    ("no gate, weights on the input", 8, "decode"),
    ("odd sizes", 4096, "odd"),
]


def compile_all(arch: int) -> None:
    """Compile what each call launches; print a row for each kernel and call as JSON."""
    warnings.filterwarnings("ignore", category=UserWarning, module="triton")
    rows: list[dict[str, Any]] = []
    with compile_lowering(arch) as launch:
        for name, tokens, kind in CALLS:
            of_call = {"call": f"{name}, {tokens} tokens", "class": kind}
            rows += [
                vars(kernel) | of_call | {"tensor_cores": kernel.tensor_cores}
                for kernel in launch(MODELS[name], tokens)
            ]
        known = {row["hash"] for row in rows}
        # T = 1 and multiples of 16 are what Triton likes to compile once more for.
        recompiled = {
            kernel.name
            for tokens in (1, 5, 16, 17, 4095, 16400)
            for kernel in launch(MODELS["interleaved"], tokens)
            if kernel.hash not in known
        }
    print(json.dumps({"kernels": rows, "recompiled": sorted(recompiled)}))


@pytest.fixture(scope="module", params=MULTIPROCESSORS, ids=lambda arch: f"sm_{arch}")
def compiled(request, tmp_path_factory):
    arch = request.param
    # An empty cache: the compiler itself is under test.
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(f"sm_{arch}")), "TRITON_INTERPRET": "0"}
    child = subprocess.run(
        [sys.executable, __file__, str(arch)], env=os.environ | cache, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return arch, json.loads(child.stdout)


def test_every_kernel_fits_without_spills(compiled):
    arch, result = compiled
    assert {row["name"] for row in result["kernels"]} == {*DISPATCH, *GATE_UP, *DOWN}
    for row in result["kernels"]:
        # sm_90a and sm_100a: with what only that architecture has.
        assert row["target"].rstrip("a") == f"sm_{arch}", row
        assert row["stack"] == 0, row
        assert row["blocks"] > 0, row


def test_as_many_programs_fit_as_the_tiles_say(compiled):
    arch, result = compiled
    assert {kind for _, _, kind in CALLS} == {kind for kind, _ in TABLE}
    for row in result["kernels"]:
        for product, kernels in (("gate_up", GATE_UP), ("down", DOWN)):
            if row["name"] in kernels:
                assert row["blocks"] >= getattr(TABLE[row["class"], arch], product).per_sm, row


def test_16_bit_products_run_on_tensor_cores(compiled):
    arch, result = compiled
    # Few tokens have 16 rows and 16 columns, of which only the oldest instruction makes a product.
    instruction = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
    for row in result["kernels"]:
        if row["name"] in GATE_UP + DOWN:
            wanted = "HMMA" if "decode" in row["class"] else instruction
            assert set(row["tensor_cores"]) == (set() if "float32" in row["class"] else {wanted}), row


def test_sm_100_multiplies_no_128_rows_by_8_columns():
    """The instruction has no such shape, and Triton 3.9 does not know."""
    for (kind, arch), tiles in TABLE.items():
        if arch == 100 and "decode" not in kind and kind != "float32":
            for tile in tiles:
                assert tile.block_w == 64 or all(width % 16 == 0 for width in tile.widths), kind


def test_another_number_of_tokens_compiles_nothing(compiled):
    _, result = compiled
    assert result["recompiled"] == []


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
