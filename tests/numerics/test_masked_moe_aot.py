"""The Triton lowering compiled ahead of time for GPUs that are not here: it has to fit, without spills.

The launches are the lowering's own, on meta tensors. That needs compiled Triton, and Triton decides once per
process, so each architecture is one child process: this file, run as a script.
"""

import json
import os
import subprocess
import sys
import warnings
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from modes_fx.kernels import _masked_moe_triton as lowering
from modes_fx.kernels._masked_moe_tiles import TABLE
from modes_fx.kernels.gate_formula import SILU, parse
from modes_fx.kernels.masked_moe import _cuda
from modes_fx.testing.compile_only import MULTIPROCESSORS, compile_only

GPT_OSS = (
    "(clamp_max(clamp_min(up, -7.0), 7.0) + 1.0) * "
    "(clamp_max(gate, 7.0) * sigmoid(clamp_max(gate, 7.0) * 1.702))"
)
DISPATCH = ["_threshold_kernel", "_scan_kernel", "_place_kernel", "_combine_kernel"]
GATE_UP = ["_gate_up_kernel", "_decode_gate_up_kernel"]
DOWN = ["_down_kernel", "_decode_down_kernel"]


class Model(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    slots: int
    dtype: torch.dtype
    flags: dict[str, Any]


# The kinds of experts beside the plain one, which bench/check.py compiles in CI.
MODELS = {
    "Kimi-VL-A3B": Model(2048, 1408, 64, 6, torch.bfloat16, {}),
    # Kimi-VL's sizes; its slots are no power of two.
    "Kimi-VL-A3B in float32": Model(2048, 1408, 64, 6, torch.float32, {"renormalise": True}),
    # gpt-oss: gate and up interleaved, transposed weights, biases, a long formula.
    "interleaved": Model(
        2880,
        2880,
        32,
        4,
        torch.float16,
        {"interleaved": True, "is_transposed": True, "bias": True, "activation": GPT_OSS},
    ),
    # Nemotron 3's formula and Llama 4's weights.
    "no gate, weights on the input": Model(
        2688, 1856, 128, 6, torch.bfloat16, {"activation": "square(relu(x))", "weights_on_input": True}
    ),
    # Unaligned sizes: loads go through registers.
    "odd sizes": Model(100, 50, 7, 3, torch.float16, {"activation": "gelu(gate) * up", "bias": True}),
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
    with patch.object(lowering, "architecture", lambda device: arch), compile_only(arch) as launched:
        for name, tokens, kind in CALLS:
            launched.clear()
            launch(MODELS[name], tokens)
            of_call = {"call": f"{name}, {tokens} tokens", "class": kind}
            rows += [vars(k) | of_call | {"tensor_cores": k.tensor_cores} for k in launched]
        known = {row["hash"] for row in rows}
        launched.clear()
        # T = 1 and multiples of 16 are what Triton likes to compile once more for.
        for tokens in (1, 5, 16, 17, 4095, 16400):
            launch(MODELS["interleaved"], tokens)
        recompiled = sorted({kernel.name for kernel in launched if kernel.hash not in known})
    print(json.dumps({"kernels": rows, "recompiled": recompiled}))


def launch(model: Model, tokens: int) -> None:
    def meta(*shape: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    H, I, E, K = model[:4]
    flags = dict(model.flags)
    rows = I * len(parse(flags.get("activation", SILU)).variables)
    bias, transposed = flags.pop("bias", False), flags.get("is_transposed", False)
    _cuda(
        meta(tokens, H),
        meta(tokens, K, dtype=torch.float32),
        meta(tokens, K),
        meta(tokens, K, dtype=torch.int64),
        None if "renormalise" in flags else meta(tokens, dtype=torch.uint8),
        meta(E, H, rows) if transposed else meta(E, rows, H),
        meta(E, I, H) if transposed else meta(E, H, I),
        meta(E, rows) if bias else None,
        meta(E, H) if bias else None,
        alpha_text=0.5,
        alpha_vision=0.25,
        tau_text=0.1,
        tau_vision=0.2,
        **flags,
    )


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
