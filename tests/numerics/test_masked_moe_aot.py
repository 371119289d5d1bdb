"""The Triton lowering compiled ahead of time for GPUs that are not here: it has to fit, without spills.

The launches are the lowering's own: it runs on meta tensors, and `JITFunction.run` compiles instead of
launching. That needs compiled Triton, and Triton decides once per process, so each architecture is one child
process: this file, run as a script.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from modes_fx.kernels.gate_formula import SILU, parse
from modes_fx.kernels.masked_moe import _cuda

GPT_OSS = (
    "(clamp_max(clamp_min(up, -7.0), 7.0) + 1.0) * "
    "(clamp_max(gate, 7.0) * sigmoid(clamp_max(gate, 7.0) * 1.702))"
)
KERNELS = ["_threshold_kernel", "_scan_kernel", "_place_kernel", "_gate_up_kernel", "_down_kernel"]
KERNELS += ["_combine_kernel"]

# Shared memory one block may ask for, bytes (CUDA programming guide, compute capabilities).
MAX_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Model(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    slots: int
    dtype: torch.dtype
    flags: dict[str, Any]


MODELS = {
    "Qwen3-VL-30B-A3B": Model(2048, 768, 128, 8, torch.bfloat16, {}),
    # Kimi-VL's sizes, in the dtype that holds most registers; its slots are no power of two.
    "Kimi-VL-A3B in float32": Model(2048, 1408, 64, 6, torch.float32, {"renormalise": True}),
    # gpt-oss: gate and up interleaved, transposed weights, biases, a long formula.
    "interleaved": Model(
        2880,
        2880,
        32,
        4,
        torch.bfloat16,
        {"interleaved": True, "is_transposed": True, "bias": True, "activation": GPT_OSS},
    ),
    # Nemotron 3's formula and Llama 4's weights.
    "no gate, weights on the input": Model(
        2688, 1856, 128, 6, torch.bfloat16, {"activation": "square(relu(x))", "weights_on_input": True}
    ),
    # Unaligned sizes: loads go through registers.
    "odd sizes": Model(100, 50, 7, 3, torch.float16, {"activation": "gelu(gate) * up", "bias": True}),
}
TOKENS = {"few rows": 8, "many rows": 4096}  # either side of `choose_tile`'s border


def compile_all(arch: int) -> None:
    """Compile what each model launches; print a row for each kernel as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """What `JITFunction.run` asks a driver before it launches."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    triton.runtime.driver.set_active(NoDevice())
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    rows: dict[str, dict[str, Any]] = {}
    label = ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash in rows:
            rows[kernel.hash]["used_by"].append(label)
            return kernel
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
        ).stdout
        ptx = kernel.asm["ptx"]
        rows[kernel.hash] = {
            "kernel": kernel.metadata.name,
            "used_by": [label],
            "shared": kernel.metadata.shared,
            "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
            # Spilled registers lie on the stack, and nothing else of ours does.
            "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
            "target": re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0],
            "tensor_cores": bool(re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
            "cubin": cubin.read_bytes()[:4] == b"\x7fELF",
        }
        return kernel

    JITFunction.run = compile_only
    for name, model in MODELS.items():
        for rows_per_expert, tokens in TOKENS.items():
            label = f"{name}, {rows_per_expert}"
            launch(_cuda, model, tokens)
    num_kernels = len(rows)
    # T = 1 and multiples of 16 are what Triton likes to compile once more for.
    for tokens in (1, 5, 16):
        label = f"{tokens} tokens"
        launch(_cuda, MODELS["Qwen3-VL-30B-A3B"], tokens)
    print(json.dumps({"kernels": list(rows.values()), "recompiles": len(rows) - num_kernels}))


def launch(masked_moe: Any, model: Model, tokens: int) -> None:
    def meta(*shape: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    H, I, E, K = model[:4]
    flags = dict(model.flags)
    rows = I * len(parse(flags.get("activation", SILU)).variables)
    bias, transposed = flags.pop("bias", False), flags.get("is_transposed", False)
    masked_moe(
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


@pytest.fixture(scope="module", params=MAX_SHARED, ids=lambda arch: f"sm_{arch}")
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
    assert {row["kernel"] for row in result["kernels"]} == set(KERNELS)
    for row in result["kernels"]:
        assert row["cubin"], row
        # sm_90a and sm_100a: with what only that architecture has.
        assert row["target"].rstrip("a") == f"sm_{arch}", row
        assert row["stack"] == 0, row
        assert row["shared"] <= MAX_SHARED[arch], row


def test_16_bit_products_run_on_tensor_cores(compiled):
    _, result = compiled
    products = [row for row in result["kernels"] if row["kernel"] in ("_gate_up_kernel", "_down_kernel")]
    # Odd sizes have one tile for few and many rows.
    assert len(products) == 4 * len(MODELS) - 2
    for row in products:
        assert row["tensor_cores"] == ("float32" not in row["used_by"][0]), row


def test_another_number_of_tokens_compiles_nothing(compiled):
    _, result = compiled
    assert result["recompiles"] == 0


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
