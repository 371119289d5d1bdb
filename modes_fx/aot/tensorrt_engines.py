"""Engines of TensorRT, built and run where their GPU is. Needs `tensorrt` and a GPU.

    python -m modes_fx.aot.tensorrt_engines FOLDER [--exact | --without-plugins]

An ahead-of-time plugin of TensorRT 11.1 and 11.2 loads its kernel anew whenever the shapes of its context
change, and never lets go of it (NVIDIA/TensorRT issue 4849). So calls are padded to buckets, a bucket is an
optimisation profile of its own, and for each bucket and number of rows there is a context whose shapes never
change: the memory that is lost is bounded by their number.
"""

import argparse
import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorrt as trt  # type: ignore[import-not-found]
import torch
from torch import Tensor

from modes_fx.aot.buckets import cut_outputs, is_decode, num_tokens, pad_inputs
from modes_fx.aot.kernel_bundle import Bundle
from modes_fx.aot.manifest import Manifest, Program
from modes_fx.errors import ExportError

# (least, best, most) of every dimension, by the name of the input.
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def build_engines(folder: str | os.PathLike[str], *, plugins: bool = True, exact: bool = False) -> Manifest:
    """Build the engines of an export for this machine's GPU, into its folder; `modes_fx.load` runs them.

    Args:
        folder: What `modes_fx.export(..., target="tensorrt")` wrote, here or elsewhere.
        plugins: With our kernels, which do nothing for dropped pairs; False with the ONNX body of the op,
            of TensorRT's own layers, whose sizes do not depend on what is dropped.
        exact: Kernels for this very architecture (sm_90a, sm_100a), not those for all from sm_80 on. They
            multiply faster on an H100; TensorRT's loader is reported to refuse PTX of such targets.
    Raises:
        ExportError: Not such a folder, no GPU, or TensorRT cannot build it; says what it said.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest.target != "tensorrt":
        raise ExportError(f'{folder} was exported with target="{manifest.target}", not "tensorrt".')
    gpu = _gpu()
    if plugins:
        from modes_fx.aot.tensorrt_plugins import register

        register(Bundle.read(folder), gpu["compute_capability"] if exact else 80)
    reports = {}
    programs = [*manifest.programs.values(), *(picture.program for picture in manifest.pictures)]
    for program in programs:
        chained = folder / plugin_file(program.file)
        path = chained if plugins and chained.is_file() else folder / program.file
        plan, reports[program.file] = build_engine(
            path, lambda shapes, p=program: profiles(p, shapes, manifest)
        )
        _write(folder / _engine_file(program), plan)
    details = manifest.details | {"engines": reports}
    return dataclasses.replace(manifest, requires=gpu, details=details).write(folder)


def build_engine(path: Path, profiles_of: Any) -> tuple[bytes, dict[str, Any]]:
    """Build an ONNX file; plugins that it names are registered.

    Args:
        profiles_of: Given the shape of each input by name, -1 where dynamic, the `Shapes` of each profile.
    Returns:
        The engine, and its size, build time and number of layers.
    """
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ExportError(f"TensorRT cannot read {path.name}: {said}")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    config = builder.create_builder_config()
    for shapes in profiles_of({each.name: tuple(each.shape) for each in inputs}):
        profile = builder.create_optimization_profile()
        for each in inputs:
            profile.set_shape(each.name, *shapes[each.name])
        config.add_optimization_profile(profile)
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT cannot build {path.name}: {'; '.join(log.errors[-3:])}")
    seconds = round(time.monotonic() - start, 1)
    report = {
        "file": path.name,
        "engine_bytes": plan.nbytes,
        "build_s": seconds,
        "layers": network.num_layers,
    }
    return bytes(plan), report


def profiles(program: Program, shapes: dict[str, tuple[int, ...]], manifest: Manifest) -> list[Shapes]:
    """One profile for each bucket of a program, in order; one for a program whose sizes are fixed."""
    least, most = manifest.batch.min, manifest.batch.max

    def at(rows: int, size: int) -> dict[str, tuple[int, ...]]:
        return {name: _shape(name, known, rows, size, program) for name, known in shapes.items()}

    found = []
    for size in buckets(program, manifest):
        low, high = at(least, size), at(most, size)
        # Best for as few rows as there may be: who answers one question waits for each token.
        found.append({name: (low[name], low[name], high[name]) for name in shapes})
    return found


def buckets(program: Program, manifest: Manifest) -> Sequence[int]:
    """Of the tokens that a program is padded to; (0,) where none are."""
    if "input_ids" not in program.inputs:
        return (0,)
    name = "cache" if is_decode(dict.fromkeys(program.inputs)) else "tokens"
    return list(manifest.details["buckets"][name])


def plugin_file(file: str) -> str:
    """Name of the file with plugins beside a program's."""
    return file.removesuffix(".onnx") + ".plugins.onnx"


def open_engine(folder: Path, manifest: Manifest, program: Program) -> Any:
    """A built engine on this machine's GPU."""
    path = folder / _engine_file(program)
    if path.name not in manifest.files:
        raise ExportError(
            f"{folder} is not built for a GPU yet: python -m modes_fx.aot.tensorrt_engines {folder}"
        )
    for name, here in _gpu().items():
        there = manifest.requires.get(name)
        if name != "gpu" and here != there:
            raise ExportError(
                f"{folder} was built for {name} {there}, here is {here}; build it here: python -m "
                f"modes_fx.aot.tensorrt_engines {folder}"
            )
    return _Engine(path, manifest, program)


class _Engine:
    """Runs a program; a call waits for the one before it."""

    def __init__(self, path: Path, manifest: Manifest, program: Program) -> None:
        log = _Log()
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ExportError(f"{path} cannot run on this GPU: {'; '.join(log.errors[-3:])}")
        self._program = program
        self._dtype: torch.dtype = getattr(torch, manifest.dtype)
        self._buckets = buckets(program, manifest)
        self._token = 0 if manifest.picture_token_id != 0 else 1
        self._contexts: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values stay on the GPU, all else comes back to where the first tensor is."""
        home = tensors[0].device
        given = dict(zip(self._program.inputs, (tensor.cuda() for tensor in tensors), strict=True))
        with self._lock:
            outputs = self._run_padded(given) if "input_ids" in given else self._run(0, given)
        return [x if name.startswith(("key_", "value_")) else x.to(home) for name, x in outputs.items()]

    def _run_padded(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        profile = next(i for i, size in enumerate(self._buckets) if size >= num_tokens(given))
        size = self._buckets[profile]
        return cut_outputs(given, self._run(profile, pad_inputs(given, size, self._token)), size)

    def _run(self, profile: int, given: dict[str, Tensor]) -> dict[str, Tensor]:
        stream = torch.cuda.current_stream()
        context = self._context(profile, given, stream)
        kept = {name: tensor.contiguous() for name, tensor in given.items()}
        results = {}
        for name in self._program.outputs:
            shape = tuple(context.get_tensor_shape(name))
            results[name] = torch.empty(shape, dtype=self._dtype, device="cuda")
        for name, tensor in (kept | results).items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT could not run {_engine_file(self._program)}; its log says why.")
        stream.synchronize()
        return results

    def _context(self, profile: int, given: dict[str, Tensor], stream: Any) -> Any:
        rows = next(iter(given.values())).shape[0]
        if (profile, rows) not in self._contexts:
            # Memory for this profile, and not for the largest.
            strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            context = self._engine.create_execution_context(strategy)
            context.set_optimization_profile_async(profile, stream.cuda_stream)
            for name, tensor in given.items():
                context.set_input_shape(name, tuple(tensor.shape))
            self._contexts[profile, rows] = context
        return self._contexts[profile, rows]


def _shape(name: str, known: tuple[int, ...], rows: int, size: int, program: Program) -> tuple[int, ...]:
    """A shape with its dynamic sizes, -1, filled in."""
    past = is_decode(dict.fromkeys(program.inputs))
    step = 1 if past else size
    wanted = known
    if name.startswith("feature_"):
        wanted = (rows * size, known[-1])
    elif name.startswith("past_"):
        wanted = (rows, known[1], size, known[3])
    elif name == "attention_mask":
        wanted = (rows, size + 1 if past else size)
    elif name in ("input_ids", "position_ids"):
        wanted = (*known[:-2], rows, step)
    return tuple(w if k == -1 else k for w, k in zip(wanted, known, strict=True))


def _engine_file(program: Program) -> str:
    return program.file.removesuffix(".onnx") + ".engine"


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        raise ExportError("Engines are built and run by an NVIDIA GPU, and torch finds none here.")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": 10 * major + minor,
        "tensorrt": trt.__version__,
    }


def _write(path: Path, content: bytes) -> None:
    """The whole file or none."""
    partial = path.with_name(f".{os.getpid()}.{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps errors."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--exact", action="store_true", help="kernels for this GPU's architecture alone")
    choice.add_argument("--without-plugins", action="store_true", help="build from the ONNX body of the op")
    options = parser.parse_args()
    manifest = build_engines(options.folder, plugins=not options.without_plugins, exact=options.exact)
    for name, report in manifest.details["engines"].items():
        print(name, report)


if __name__ == "__main__":
    main()
