"""What each target writes, and what runs it. A target's module is imported when it is used.

aoti           AOTInductor: compiled code for this machine's kind of processor      needs torch
onnx           one ONNX file a program, weights beside them                         needs onnxruntime
tensorrt-rtx   engines for NVIDIA GPUs, built from ONNX files, without a GPU        needs such a GPU to run
tensorrt       ONNX files and kernels, for engines of NVIDIA GPUs                   needs that GPU to build
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modes_fx.aot.manifest import Manifest, Program
from modes_fx.errors import ExportError

# Tensors in the order of `Program.inputs` -> tensors in the order of `Program.outputs`.
Run = Callable[[Sequence[Tensor]], list[Tensor]]

MODULES = {
    "aoti": "aoti",
    "onnx": "onnx_target",
    "tensorrt-rtx": "tensorrt_rtx",
    "tensorrt": "tensorrt_target",
}
INSTALL = {
    "onnx": "pip install onnx onnxscript onnxruntime",
    "onnxscript": "pip install onnx onnxscript onnxruntime",
    "onnxruntime": "pip install onnxruntime",
    "tensorrt_rtx": "pip install tensorrt-rtx",
}


def module_of(target: str) -> Any:
    """The module of a target.

    Raises:
        ExportError: There is no such target, or its library is not installed.
    """
    if target not in MODULES:
        raise ExportError(f"target must be one of {', '.join(MODULES)}, got {target!r}.")
    try:
        return importlib.import_module(f"modes_fx.aot.{MODULES[target]}")
    except ModuleNotFoundError as error:
        if error.name not in INSTALL:
            raise
        raise ExportError(f"target {target!r} needs {error.name}: {INSTALL[error.name]}.") from None


def open_program(folder: Path, manifest: Manifest, program: Program) -> Run:
    """A program of a checked folder, ready to run.

    Raises:
        ExportError: This machine, or what is installed on it, cannot run it; says what can.
    """
    run: Run = module_of(manifest.target).open_program(folder, manifest, program)
    return run
