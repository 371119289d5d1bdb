"""Target `aoti`: AOTInductor packages, machine code for the kind of processor that exported them.

A package calls `modes_fx::masked_moe` as the custom operator it is; `modes_fx.kernels` registers it.
"""

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modes_fx.aot.manifest import Manifest, Program
from modes_fx.aot.programs import Traced
from modes_fx.errors import ExportError
from modes_fx.kernels import masked_moe as _registers_the_operator  # noqa: F401


def requires() -> dict[str, Any]:
    """What a machine must have in common with this one."""
    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": _minor(torch.__version__),
    }


def write_programs(
    folder: Path, traced: dict[str, Traced], options: dict[str, Any]
) -> tuple[dict[str, Program], dict[str, Any]]:
    """Compile every program into `NAME.pt2`.

    Args:
        options: Of Inductor, by name, e.g. `{"max_autotune": True}`.
    """
    from torch._inductor import aoti_compile_and_package

    written = {}
    for name, each in traced.items():
        program = Program(f"{name}.pt2", each.inputs, each.outputs)
        with torch.no_grad():
            aoti_compile_and_package(
                each.program, package_path=str(folder / program.file), inductor_configs=options
            )
        written[name] = program
    return written, {}


def open_program(folder: Path, manifest: Manifest, program: Program) -> Any:
    """Load a package into this process."""
    for name, here in requires().items():
        there = manifest.requires.get(name)
        if here != there:
            raise ExportError(
                f"{folder} was compiled for {name} {there}, this process has {here}; export it on a machine "
                "like this one."
            )
    loaded = torch._inductor.aoti_load_package(str(folder / program.file))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return list(loaded(*tensors))

    return run


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
