"""Target `tensorrt`: what a GPU host needs to build engines of TensorRT, written without a GPU.

    NAME.onnx             each program with the body of `MaskedMoE`: of ONNX operators alone, runs anywhere
    NAME.plugins.onnx     the same with chains of plugins in place of the blocks, no body
    weights.bin           the weights of both
    launch.json, *.ptx    the plugins' kernels, and how they are launched; see `kernel_bundle`

On the GPU host `modes_fx.aot.tensorrt_engines.build_engines(folder)` adds `NAME.engine`, which
`modes_fx.load` runs. Writing needs onnx, onnxscript, onnxruntime and triton, and no TensorRT.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch

from modes_fx.aot.buckets import buckets_of, check_buckets
from modes_fx.aot.kernel_bundle import ARCHITECTURES, Kind, bounds, calls_of, kind_of, write_bundle
from modes_fx.aot.manifest import Manifest, Program, Range
from modes_fx.aot.onnx_target import BLOCK_ROWS, WEIGHTS, Weights, write_onnx
from modes_fx.aot.programs import Traced
from modes_fx.aot.tensorrt_onnx import with_plugins, without_uint8
from modes_fx.errors import ExportError
from modes_fx.progress import Bar

INSTALL = "pip install 'tensorrt-cu13>=11.1'"
# Input and dimension whose sizes are brought to buckets, by program.
_COUNTED = {"prefill": ("tokens", "input_ids", 1), "decode": ("cache", "past_key_0", 2)}


def requires() -> dict[str, Any]:
    """Of the machine that builds the engines."""
    return {"gpu": "NVIDIA, compute capability 8.0 or more", "tensorrt": ">=11.1"}


def write_programs(
    folder: Path, traced: dict[str, Traced], options: dict[str, Any], bar: Bar
) -> tuple[dict[str, Program], dict[str, Any]]:
    """Write every program as ONNX in both ways, and the kernels.

    A decode program takes the two kernels for few tokens where no call has more than 16 rows, that is with
    `dynamic={"batch": (1, 16)}` or less; the six for many otherwise.

    Args:
        options: `architectures` ((80, 90, 100)): of GPUs; kernels for 80 run on all later ones too.
            `buckets` ({}): sizes that `tokens` of a prefill and `cache` of a decode step are padded to. Every
            other size costs GPU memory for good while NVIDIA/TensorRT issue 4849 is open, and every bucket
            build time and the memory of a context. Powers of two from 128 unless given.
    """
    unknown = sorted(set(options) - {"architectures", "buckets"})
    if unknown:
        raise ExportError(f"target 'tensorrt' takes architectures and buckets, got {', '.join(unknown)}.")
    details = {"buckets": dict(_buckets(traced, options.get("buckets", {})))}
    weights = Weights(folder / WEIGHTS)
    written: dict[str, Program] = {}
    blocks: dict[str, list[tuple[str, Kind]]] = {}
    for name, each in bar.over(traced.items()):
        path = folder / f"{name}.onnx"
        write_onnx(each, path, weights, block_rows=BLOCK_ROWS.get(name, 1), sparse=False)
        written[name] = Program(path.name, each.inputs, each.outputs)
        ranges = each.program.range_constraints
        # After the file is written, for that lays out the expert weights.
        blocks[name] = [(call.layer, kind_of(call, ranges)) for call in calls_of(each.program)]
    blocks = {name: found for name, found in blocks.items() if found}
    bundle = write_bundle(folder, blocks, options.get("architectures", ARCHITECTURES))
    for name in traced:
        path = folder / f"{name}.onnx"
        model = onnx.load(path, load_external_data=False)
        without_uint8(model)
        _save(model, path)
        if name in blocks:
            chains = [bundle.chains[chain] for _, chain in bundle.programs[name]]
            names = [list(kind.tensors) for _, kind in blocks[name]]
            with_plugins(model, zip(names, chains, strict=True))
            _save(model, folder / f"{name}.plugins.onnx")
    return written, details


def open_program(folder: Path, manifest: Manifest, program: Program) -> Any:
    """A built engine on this machine's GPU."""
    missing = []
    if not torch.cuda.is_available():
        missing.append("GPU that torch finds")
    if importlib.util.find_spec("tensorrt") is None:
        missing.append(f"TensorRT ({INSTALL})")
    if missing:
        raise ExportError(
            f"{folder} is for TensorRT on an NVIDIA GPU, and here is no {' and no '.join(missing)}. For a "
            'CPU, export with target="onnx" or "aoti"; target="tensorrt-rtx" builds engines for some GPUs '
            "without one."
        )
    from modes_fx.aot.tensorrt_engines import open_engine

    return open_engine(folder, manifest, program)


def _buckets(traced: dict[str, Traced], given: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    unknown = sorted(set(given) - {name for name, _, _ in _COUNTED.values()})
    if unknown:
        raise ExportError(f"buckets takes tokens and cache, got {', '.join(unknown)}.")
    for program, (name, source, dimension) in _COUNTED.items():
        size = _range(traced[program], source, dimension)
        yield name, check_buckets(name, given[name], size) if name in given else buckets_of(size)


def _range(traced: Traced, source: str, dimension: int) -> Range:
    """What a dimension of an input may be."""
    placeholder = traced.program.graph_signature.user_inputs[traced.inputs.index(source)]
    (node,) = (n for n in traced.program.graph.find_nodes(op="placeholder") if n.name == placeholder)
    return Range(*bounds(node.meta["val"].shape[dimension], traced.program.range_constraints))


def _save(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
