"""The Triton kernels of exported programs as PTX, with a table of how they are launched: `launch.json`.

    program -> for each block, in order: its layer and its chain
    chain   -> steps, one launch each: what it reads and writes, and its kernel for each architecture
    kernel  -> PTX file, name of the entry, grid, threads, bytes of shared memory

A call of a chain has the tensors of the op by their names, `experts` and `modality` as int32 and flat, and
`thresholds`. Grids and sizes are expressions in the number of tokens, see `_masked_moe_triton_launches`.
Kernels are compiled in a process of its own: Triton decides on its first import whether it interprets, and
`DISABLE_MMA_V5` is read from the environment. No GPU is used.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import map_arg
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from modes_fx.errors import ExportError
from modes_fx.kernels._masked_moe_triton_launches import (
    TYPES,
    Buffer,
    Expression,
    Launch,
    Told,
    entry,
    record,
)
from modes_fx.kernels.masked_moe import Call, masked_moe
from modes_fx.profile import write_atomically

NAME = "launch.json"
# A kernel for 80 runs on every later GPU too, by way of the driver's compiler; the others on theirs alone.
ARCHITECTURES = (80, 90, 100)
# As old as each architecture allows, for a driver refuses PTX that is newer than itself: 8.3 is CUDA 12.3's,
# 8.6 is CUDA 12.7's, the first with sm_100a; a driver of CUDA 13.0 (580) takes up to 9.0.
PTX_VERSIONS = {80: 83, 90: 83, 100: 86}
# Without tensor memory, which a plugin cannot have, sm_100 multiplies as sm_80 does, and takes its tiles.
TILES = {80: 80, 90: 90, 100: 80}
# What the tiles are chosen for where there may be more tokens; any number runs.
TYPICAL_TOKENS = 4096
# Of the op, in the order of its arguments.
TENSORS = (
    "hidden",
    "scores",
    "weights",
    "experts",
    "modality",
    "gate_up",
    "down",
    "gate_up_bias",
    "down_bias",
)
PER_TOKEN = ("hidden", "scores", "weights", "experts", "modality")
INTEGERS = ("experts", "modality")  # int32 in a chain; TensorRT's plugins take no uint8
FLAGS = ("activation", "interleaved", "is_transposed", "weights_on_input", "renormalise")


@dataclass(frozen=True)
class Kind:
    """What two blocks must share to share their kernels.

    Attributes:
        tensors: (dtype, shape) of each tensor of the op that is there, by its name; without the number of
            tokens, which is the first size of those in `PER_TOKEN`.
        flags: Of the op.
        tokens: The most there may be, or fewer: what path and tiles are chosen for.
        is_dynamic: There may be fewer or more.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    flags: dict[str, Any]
    tokens: int
    is_dynamic: bool

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Kind":
        tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in data["tensors"].items()}
        return cls(tensors, data["flags"], data["tokens"], data["is_dynamic"])

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:12]

    def call(self) -> Call:
        """A call of this kind, on fake tensors."""
        mode = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False, duck_shape=False))
        dynamic: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC])
        counted = torch.empty(self.tokens, device="meta")
        num_tokens: Any = self.tokens
        if self.is_dynamic:
            num_tokens = mode.from_tensor(counted, symbolic_context=dynamic).shape[0]
        given: dict[str, Tensor | None] = dict.fromkeys(TENSORS)
        with mode:
            for name, (dtype, shape) in self.tensors.items():
                size = (num_tokens, *shape) if name in PER_TOKEN else shape
                given[name] = torch.empty(size, dtype=getattr(torch, dtype))
        unused = dict.fromkeys(("alpha_text", "alpha_vision", "tau_text", "tau_vision"), 1.0)
        return Call(**given, **unused, **self.flags)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kernel:
    """A kernel of one architecture.

    Attributes:
        file: Its PTX.
        entry: Its name there.
        grid: Blocks, expressions; 1 to 3 of them.
        num_warps: Of a block, 32 threads each.
        shared: Bytes of a block.
        constants: What was compiled in, for people.
    """

    file: str
    entry: str
    grid: tuple[Expression, ...]
    num_warps: int
    shared: int
    constants: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One launch of a chain. A kernel's parameters: `inputs`, `sizes` (int32), `outputs`, in this order.

    Attributes:
        plugin: A name that is only given to what does the same in the same way.
        inputs, sizes, outputs, told: As those of `Launch`.
        kernels: By architecture.
    """

    plugin: str
    inputs: dict[str, str]
    sizes: dict[str, Expression]
    outputs: dict[str, Buffer]
    told: Told | None
    kernels: dict[int, Kernel]


@dataclass(frozen=True)
class Bundle:
    """What `launch.json` holds.

    Attributes:
        folder: Where the PTX files are.
        programs: (layer, chain) of each block, in the order of the program.
        kinds: Of the blocks, by the name of the chain.
        chains: Steps by the name of the chain; the last one's only output is the result of the op.
    """

    folder: Path
    programs: dict[str, tuple[tuple[str, str], ...]]
    kinds: dict[str, Kind]
    chains: dict[str, tuple[Step, ...]]

    @classmethod
    def read(cls, folder: Path) -> "Bundle":
        data = json.loads((folder / NAME).read_text(encoding="utf-8"))
        programs = {name: tuple(map(tuple, blocks)) for name, blocks in data["programs"].items()}
        kinds = {name: Kind.from_json(kind) for name, kind in data["kinds"].items()}
        chains = {name: tuple(map(_step, steps)) for name, steps in data["chains"].items()}
        return cls(folder, programs, kinds, chains)

    def write(self) -> None:
        body = {"programs": self.programs, "kinds": _plain(self.kinds), "chains": _plain(self.chains)}
        write_atomically(self.folder / NAME, json.dumps(body, indent=1) + "\n")


def calls_of(program: ExportedProgram) -> list[Call]:
    """The calls of the op in a program, in order, on its own fake tensors."""
    nodes = program.graph.find_nodes(op="call_function", target=masked_moe)
    return [Call(*_values(node.args), **_values(node.kwargs)) for node in nodes]


def kind_of(call: Call, ranges: Any) -> Kind:
    """The kind of a call; `ranges` are the program's `range_constraints`."""
    tensors = {}
    for name in TENSORS:
        tensor = getattr(call, name)
        if tensor is not None:
            dtype = "int32" if name in INTEGERS else str(tensor.dtype).removeprefix("torch.")
            shape = tensor.shape[1:] if name in PER_TOKEN else tensor.shape
            tensors[name] = dtype, () if name == "modality" else tuple(map(int, shape))
    least, most = bounds(call.hidden.shape[0], ranges)
    flags = {name: getattr(call, name) for name in FLAGS}
    return Kind(tensors, flags, max(least, min(most, TYPICAL_TOKENS)), least < most)


def bounds(size: Any, ranges: Any) -> tuple[int, int]:
    """Least and most of a size that grows with each of its symbols."""
    if isinstance(size, int):
        return size, size
    expression = size.node.expr
    ends = ("lower", "upper")
    least, most = (
        int(expression.subs({symbol: getattr(ranges[symbol], end) for symbol in expression.free_symbols}))
        for end in ends
    )
    return least, most


def write_bundle(
    folder: Path, programs: dict[str, list[tuple[str, Kind]]], architectures: Sequence[int]
) -> Bundle:
    """Compile the kernels of all blocks into a folder, and write its `launch.json`.

    Args:
        programs: (layer, kind) of each block, in order, by the name of the program.
        architectures: Some of `ARCHITECTURES`.
    Raises:
        ExportError: A kernel cannot be compiled, or cannot be launched by TensorRT; says which and why.
    """
    unknown = sorted(set(architectures) - set(ARCHITECTURES))
    if unknown or not architectures:
        raise ExportError(f"architectures must be some of {ARCHITECTURES}, got {tuple(architectures)}.")
    kinds = {kind.digest(): kind for blocks in programs.values() for _, kind in blocks}
    order = {"architectures": list(architectures), "kinds": [dataclasses.asdict(k) for k in kinds.values()]}
    child = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        input=json.dumps(order),
        # No line numbers: they name the folders of this machine.
        env=os.environ | {"TRITON_INTERPRET": "0", "DISABLE_MMA_V5": "1", "TRITON_DISABLE_LINE_INFO": "1"},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise ExportError(f"Compiling the kernels failed: {child.stderr.strip().splitlines()[-1]}")
    named = {
        name: tuple((layer, kind.digest()) for layer, kind in blocks) for name, blocks in programs.items()
    }
    bundle = dataclasses.replace(Bundle.read(folder), programs=named)
    bundle.write()
    return bundle


def compile_chains(folder: Path, kinds: Iterable[Kind], architectures: Sequence[int]) -> None:
    """Write the PTX of each kind's steps, and `launch.json` with its chains; in a process that compiles."""
    by_name = {kind.digest(): kind for kind in kinds}
    chains = {}
    for name, kind in by_name.items():
        by_architecture = [record(kind.call(), TILES[arch]) for arch in architectures]
        launches = zip(*by_architecture, strict=True)
        chains[name] = tuple(_compile_step(folder, each, architectures) for each in launches)
    Bundle(folder, {}, by_name, chains).write()


def _compile_step(folder: Path, launches: Sequence[Launch], architectures: Sequence[int]) -> Step:
    """One step from its launch for each architecture; they differ in tiles, so in grid and constants."""
    first = launches[0]
    compiled = [compile_launch(launch, arch) for launch, arch in zip(launches, architectures, strict=True)]
    ptx = {arch: kernel.asm["ptx"] for arch, kernel in zip(architectures, compiled, strict=True)}
    grids = [launch.grid for launch in launches]
    content = json.dumps([ptx, grids, first.inputs, first.sizes, _plain(first.outputs)])
    plugin = f"{first.name}_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    kernels = {}
    for launch, arch, kernel in zip(launches, architectures, compiled, strict=True):
        assert launch.inputs == first.inputs and launch.outputs == first.outputs and launch.told == first.told
        file = f"{plugin}.sm_{arch}.ptx"
        write_atomically(folder / file, ptx[arch])
        metadata = kernel.metadata
        kernels[arch] = Kernel(
            file, metadata.name, launch.grid, metadata.num_warps, metadata.shared, launch.constants
        )
    return Step(plugin, first.inputs, first.sizes, first.outputs, first.told, kernels)


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel, after a check that TensorRT can launch it."""
    import triton
    from triton.backends.compiler import GPUTarget

    pointers = {name: dtype for name, dtype in launch.input_dtypes.items()}
    pointers |= {name: getattr(torch, buffer.dtype) for name, buffer in launch.outputs.items()}
    types = {name: f"*{TYPES[dtype]}" for name, dtype in pointers.items()}
    types |= dict.fromkeys(launch.sizes, "i32") | dict.fromkeys(launch.constants, "constexpr")
    function = entry(launch)
    signature = {name: types[name] for name in function.arg_names}
    # Whole tensors of TensorRT begin at multiples of 256 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if name in pointers
    }
    source = triton.compiler.ASTSource(function, signature, launch.constants, aligned)
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "ptx_version": PTX_VERSIONS[arch],
    }
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    check_launchable(launch.name, arch, kernel.metadata)
    found = ptx_version(kernel.asm["ptx"])
    if found > PTX_VERSIONS[arch]:
        raise ExportError(
            f"{launch.name} for sm_{arch} is PTX {found / 10}, above {PTX_VERSIONS[arch] / 10}."
        )
    return kernel


# What Triton's own launcher does beside passing arguments, and TensorRT's does not.
_UNLAUNCHABLE = {
    "global_scratch_size": "needs scratch memory",
    "profile_scratch_size": "needs scratch memory to be profiled",
    "tmem_size": "needs tensor memory",
    "tensordesc_meta": "takes tensor descriptors",
    "launch_cooperative_grid": "needs a cooperative grid",
    "launch_pdl": "needs programmatic dependent launch",
}


def check_launchable(name: str, arch: int, metadata: Any) -> None:
    """Raise ExportError where a kernel needs more than arguments, a grid and shared memory."""
    problems = [text for field, text in _UNLAUNCHABLE.items() if getattr(metadata, field)]
    problems += ["needs clusters of blocks"] * (metadata.num_ctas > 1)
    if problems:
        raise ExportError(f"TensorRT cannot launch {name} for sm_{arch}: it {' and '.join(problems)}.")


def ptx_version(ptx: str) -> int:
    """83 for `.version 8.3`."""
    major, minor = re.findall(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE)[0]
    return int(major) * 10 + int(minor)


def _values(arguments: Any) -> Any:
    return map_arg(arguments, lambda node: node.meta["val"])


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, in containers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _step(data: dict[str, Any]) -> Step:
    outputs = {
        parameter: Buffer(each["name"], each["dtype"], tuple(each["shape"]))
        for parameter, each in data["outputs"].items()
    }
    kernels = {
        int(arch): Kernel(**(each | {"grid": tuple(each["grid"])})) for arch, each in data["kernels"].items()
    }
    told = data["told"] and Told(**data["told"])
    return Step(data["plugin"], data["inputs"], data["sizes"], outputs, told, kernels)


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="triton")
    order = json.load(sys.stdin)
    kinds = [Kind.from_json(kind) for kind in order["kinds"]]
    compile_chains(Path(sys.argv[1]), kinds, order["architectures"])


if __name__ == "__main__":
    main()
