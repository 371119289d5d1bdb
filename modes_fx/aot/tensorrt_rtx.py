"""Target `tensorrt-rtx`: engines for NVIDIA GPUs, built on any machine, with or without a GPU.

Each program becomes an ONNX file with the static body of `MaskedMoE`, and that file an engine. TensorRT-RTX
builds for the compute capabilities that its `ComputeCapability` names; 9.0 and 10.0 (H100, B200) are none of
them. An engine finishes its compilation on the GPU that loads it.
"""

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt
import torch
from torch import Tensor

from modes_fx.aot.manifest import Manifest, Program
from modes_fx.aot.onnx_target import BLOCK_ROWS, WEIGHTS, Weights, write_onnx
from modes_fx.aot.programs import Traced
from modes_fx.errors import ExportError
from modes_fx.progress import Bar

COMPUTE_CAPABILITIES = ("SM80", "SM89", "SM120")

# (least, best, most) of every dimension, by the name of the input.
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Engine:
    """A built engine, and what building it took.

    Attributes:
        plan: Its bytes.
        build_ms: Wall time of the build.
        activation_bytes: Scratch memory of one execution at the largest shapes, as the builder reports it.
        num_layers: Of the parsed network, the body included.
    """

    plan: bytes
    build_ms: float
    activation_bytes: int
    num_layers: int

    def report(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "engine_bytes": len(self.plan),
            "activation_bytes": self.activation_bytes,
            "build_ms": round(self.build_ms),
            "layers": self.num_layers,
        }


def write_programs(
    folder: Path, traced: dict[str, Traced], options: dict[str, Any], bar: Bar
) -> tuple[dict[str, Program], dict[str, Any]]:
    """Build every program into `NAME.engine`.

    Args:
        options: `compute_capabilities` (("SM80", "SM89", "SM120")): names of `ComputeCapability`;
            `max_activation_bytes` (None): raise where an engine needs more scratch memory.
    Returns:
        The programs, and a report of each engine for the manifest.
    """
    capabilities = tuple(options.get("compute_capabilities", COMPUTE_CAPABILITIES))
    limit = options.get("max_activation_bytes")
    written: dict[str, Program] = {}
    details: dict[str, Any] = {"compute_capabilities": list(capabilities)}
    for name, each in bar.over(traced.items()):
        shapes = shapes_of(each)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            path = Path(scratch) / f"{name}.onnx"
            weights = Weights(path.with_name(WEIGHTS))
            write_onnx(each, path, weights, block_rows=BLOCK_ROWS.get(name, 1), sparse=False)
            engine = build_engine(path, shapes, capabilities)
        if limit is not None and engine.activation_bytes > limit:
            raise ExportError(
                f"The {name} engine needs {engine.activation_bytes} bytes of scratch memory, more than "
                f"{limit}; lower the upper ends of `dynamic`."
            )
        program = Program(f"{name}.engine", each.inputs, each.outputs)
        (folder / program.file).write_bytes(engine.plan)
        details[name] = engine.report()
        written[name] = program
    return written, details


def build_engine(path: Path, shapes: Shapes, capabilities: Sequence[str]) -> Engine:
    """Build an engine from an ONNX file, whose external data lies beside it. No GPU is used.

    Raises:
        ExportError: TensorRT-RTX cannot read or build it; says what it said.
    """
    unknown = [name for name in capabilities if not hasattr(trt.ComputeCapability, name)]
    if unknown:
        known = ", ".join(trt.ComputeCapability.__members__)
        raise ExportError(f"TensorRT-RTX has no compute capability {', '.join(unknown)}; it has {known}.")
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"TensorRT-RTX cannot read {path.name}: {said}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for i, name in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        profile.set_shape(name, *shapes[name])
    config.add_optimization_profile(profile)
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    build_ms = (time.monotonic() - start) * 1e3
    if plan is None:
        raise ExportError(f"TensorRT-RTX cannot build {path.name}: {'; '.join(log.errors[-3:])}")
    return Engine(bytes(plan), build_ms, log.activation_bytes, network.num_layers)


def shapes_of(traced: Traced) -> Shapes:
    """Least, best and most sizes of a program's inputs, from the ranges it was traced with."""
    ranges = traced.program.range_constraints
    nodes = {node.name: node for node in traced.program.graph.find_nodes(op="placeholder")}
    shapes: Shapes = {}
    for name, placeholder in zip(traced.inputs, traced.program.graph_signature.user_inputs, strict=True):
        assert isinstance(placeholder, str)
        sizes = [_size(size, ranges) for size in nodes[placeholder].meta["val"].shape]
        least, best, most = (tuple(size[i] for size in sizes) for i in range(3))
        shapes[name] = least, best, most
    return shapes


def _size(size: Any, ranges: Any) -> tuple[int, int, int]:
    if isinstance(size, int):
        return size, size, size
    symbols = size.node.expr.free_symbols
    low, high = ({symbol: getattr(ranges[symbol], end) for symbol in symbols} for end in ("lower", "upper"))
    # Short of the most, which is rare; 256 tokens fill a GPU.
    best = {symbol: max(low[symbol], min(256, high[symbol] // 4)) for symbol in symbols}
    least, good, most = (int(size.node.expr.subs(values)) for values in (low, best, high))
    return least, good, most


def requires() -> dict[str, Any]:
    """Of the machine that runs the engines."""
    return {"gpu": "NVIDIA", "tensorrt_rtx": trt.__version__}


def open_program(folder: Path, manifest: Manifest, program: Program) -> Any:
    """An engine on this machine's GPU."""
    if not torch.cuda.is_available():
        names = ", ".join(manifest.details.get("compute_capabilities", COMPUTE_CAPABILITIES))
        raise ExportError(
            f"{folder} holds engines for NVIDIA GPUs ({names}), and torch finds none here; "
            'load it where one is, or export with target="onnx" or "aoti" for a CPU.'
        )
    log = _Log()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine((folder / program.file).read_bytes())
    if engine is None:
        raise ExportError(f"{folder / program.file} cannot run on this GPU: {'; '.join(log.errors[-3:])}")

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        context = engine.create_execution_context()
        given = [tensor.cuda() for tensor in tensors]
        for name, tensor in zip(program.inputs, given, strict=True):
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        results = []
        for name in program.outputs:
            dtype = getattr(torch, manifest.dtype)
            results.append(torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda"))
            context.set_tensor_address(name, results[-1].data_ptr())
        context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        torch.cuda.current_stream().synchronize()
        return results

    return run


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors, and how much memory the builder says that an execution takes."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.activation_bytes = 0

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)
        found = re.search(r"Total Activation Memory: (\d+) bytes", message)
        if found:
            self.activation_bytes = int(found[1])
