"""Triton kernels compiled for GPUs that are not here, and what of such a GPU they would occupy.

    with compile_lowering(90) as launch:
        kernels = launch(Experts(2048, 768, 128, 8), tokens=4096)    # compiles them, and launches nothing
    kernels[0].name, kernels[0].registers, kernels[0].stack, kernels[0].tensor_cores, ...

Needs compiled Triton (TRITON_INTERPRET unset or 0), which decides once per process. The assembler and the
disassembler come with Triton.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from modes_fx.kernels.gate_formula import SILU, parse
from modes_fx.kernels.masked_moe import Call

GPT_OSS = (
    "(clamp_max(clamp_min(up, -7.0), 7.0) + 1.0) * "
    "(clamp_max(gate, 7.0) * sigmoid(clamp_max(gate, 7.0) * 1.702))"
)


class Experts(NamedTuple):
    """The routed experts of one layer.

    Attributes:
        slots: Experts that a token is sent to.
        flags: Of the op; and `bias`, whether both products have one, and `mask`, which is True unless given,
            whether the modality of the tokens is known.
    """

    hidden: int
    intermediate: int
    experts: int
    slots: int
    dtype: torch.dtype = torch.bfloat16
    flags: Mapping[str, Any] = {}


class Multiprocessor(NamedTuple):
    """Limits of one SM (CUDA programming guide, table of compute capabilities); sizes in bytes."""

    warps: int
    blocks: int
    shared: int  # of which 1 KiB a block is the system's
    block_shared: int
    registers: int = 65536
    tensor_columns: int = 0  # of tensor memory, for the products of sm_100


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024, 163 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024, 227 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024, 227 * 1024, tensor_columns=512),
}
# Opcodes of products on tensor cores: by warp, by warp group (sm_90), and into tensor memory (sm_100).
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "IMMA", "UTCQMMA")
LOCAL_MEMORY = ("STL", "LDL")


@dataclass(frozen=True)
class Kernel:
    """One kernel as compiled for one architecture.

    Attributes:
        hash: Triton's; equal for what is compiled once and launched again.
        registers: Of a thread.
        stack: Bytes of a thread's local memory; above 0, registers were spilled.
        shared: Bytes of a block's shared memory.
        target: As in the PTX, such as "sm_90a".
        opcodes: How often each instruction stands in the machine code, without modifiers.
        blocks, warps: That fit on a multiprocessor at the same time.
        bound: What keeps more blocks from fitting: "registers", "shared memory", "warps", "blocks" or
            "tensor memory".
    """

    name: str
    hash: str
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    shared: int
    target: str
    opcodes: Counter[str]
    blocks: int
    warps: int
    bound: str
    constants: dict[str, Any]

    @property
    def tensor_cores(self) -> dict[str, int]:
        """Which instructions use them, and how many of each."""
        return {name: self.opcodes[name] for name in TENSOR_CORES if self.opcodes[name]}

    @property
    def spills(self) -> int:
        """Instructions that access local memory."""
        return sum(self.opcodes[name] for name in LOCAL_MEMORY)


def occupancy(
    arch: int, num_warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> tuple[int, str]:
    """Blocks that fit on one multiprocessor, and what limits them, by CUDA's occupancy rules."""
    sm = MULTIPROCESSORS[arch]
    # Registers come in units of 256 for a warp, from one of the four quarters of a multiprocessor.
    per_warp = -(-registers * 32 // 256) * 256
    warps = 4 * (sm.registers // 4 // per_warp)
    per_block = -(-(shared + 1024) // 128) * 128
    limits = {
        "registers": warps // num_warps,
        "shared memory": sm.shared // per_block if shared <= sm.block_shared else 0,
        "warps": sm.warps // num_warps,
        "blocks": sm.blocks,
    }
    if tensor_columns:
        limits["tensor memory"] = sm.tensor_columns // tensor_columns
    bound = min(limits, key=lambda name: limits[name])
    return limits[bound], bound


@contextmanager
def compile_only(arch: int) -> Iterator[list[Kernel]]:
    """Compile for `sm_ARCH` what is launched inside, one `Kernel` a launch; nothing runs.

    Arguments may be meta tensors: of a tensor only dtype and alignment matter, and meta tensors are aligned.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets here; compile in a process with TRITON_INTERPRET=0.")

    class NoDevice:
        """What `JITFunction.run` asks a driver before it launches."""

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    launched: list[Kernel] = []
    known: dict[str, Kernel] = {}
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        # What was compiled for another architecture is remembered by device, and all of them are device 0.
        self.device_caches.clear()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in known:
            known[kernel.hash] = _examine(kernel, arch, _constants(self, args, kwargs))
        launched.append(known[kernel.hash])
        return kernel

    driver = triton.runtime.driver
    # Not its `active`, which raises where there is no GPU.
    before = driver._active
    driver.set_active(NoDevice())
    JITFunction.run = compile_launch
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = before


@contextmanager
def compile_lowering(arch: int) -> Iterator[Callable[[Experts, int], list[Kernel]]]:
    """`launch(experts, tokens)` compiles for `sm_ARCH` what a call of the op launches: one `Kernel` each."""
    from modes_fx.kernels import _masked_moe_triton as lowering

    # The launcher has tiles for each architecture, and asks the device, which is none here.
    with patch.object(lowering, "architecture", lambda device: arch), compile_only(arch) as launched:

        def launch(experts: Experts, tokens: int) -> list[Kernel]:
            launched.clear()
            call = meta_call(experts, tokens)
            call.check()
            lowering.masked_moe_triton(call)
            return list(launched)

        yield launch


def meta_call(experts: Experts, tokens: int) -> Call:
    """A call of the op on meta tensors, which have shapes and dtypes alone."""

    def meta(*shape: int, dtype: torch.dtype = experts.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    H, I, E, K = experts[:4]
    flags = dict(experts.flags)
    bias, mask = flags.pop("bias", False), flags.pop("mask", True)
    transposed = flags.get("is_transposed", False)
    rows = I * len(parse(flags.get("activation", SILU)).variables)
    return Call(
        meta(tokens, H),
        meta(tokens, K, dtype=torch.float32),
        meta(tokens, K),
        meta(tokens, K, dtype=torch.int64),
        meta(tokens, dtype=torch.uint8) if mask else None,
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


def _constants(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The compile-time constants of a launch that are numbers: sizes, blocks, flags."""
    names = {parameter.name for parameter in function.params if parameter.is_constexpr}
    given = dict(zip(function.arg_names, args, strict=False)) | kwargs
    return {name: given[name] for name in names & given.keys() if isinstance(given[name], int | str | tuple)}


def _examine(kernel: Any, arch: int, constants: dict[str, Any]) -> Kernel:
    usage = _tool("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
    code = _tool("nvdisasm", "-c", kernel.asm["cubin"])
    metadata = kernel.metadata
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    columns = getattr(metadata, "tmem_size", None) or 0
    blocks, bound = occupancy(arch, metadata.num_warps, registers, metadata.shared, columns)
    return Kernel(
        name=metadata.name,
        hash=kernel.hash,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        stack=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        shared=metadata.shared,
        target=re.findall(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[0],
        opcodes=Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE)),
        blocks=blocks,
        warps=blocks * metadata.num_warps,
        bound=bound,
        constants=constants,
    )


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What a tool that comes with Triton prints about machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
