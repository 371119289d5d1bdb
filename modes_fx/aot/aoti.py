"""Target `aoti`: AOTInductor packages, machine code for the kind of processor that exported them.

A package calls `modes_fx::masked_moe` as the custom operator it is, which this module registers. Weights
lie beside the packages, in one file that they share and that is mapped into memory.
"""

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.export import ExportedProgram

from modes_fx.aot.manifest import Manifest, Program
from modes_fx.aot.programs import Traced
from modes_fx.errors import ExportError
from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.progress import Bar

WEIGHTS = "weights.safetensors"
# Inductor gives the weights of a package beside its code.
_APART = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}


def requires() -> dict[str, Any]:
    """What a machine must have in common with this one."""
    return {
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": _minor(torch.__version__),
    }


def write_programs(
    folder: Path, traced: dict[str, Traced], options: dict[str, Any], bar: Bar
) -> tuple[dict[str, Program], dict[str, Any]]:
    """Compile every program into `NAME.pt2`, and write `weights.safetensors` for all of them.

    Args:
        options: Of Inductor, by name, e.g. `{"max_autotune": True}`.
    Returns:
        The programs, and for the manifest where each finds its weights.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    settings = {**_APART, **options}
    weights: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    written = {}
    for name, each in bar.over(traced.items()):
        program = Program(f"{name}.pt2", each.inputs, each.outputs)
        _make_thresholds_finite(each.program)
        args, kwargs = each.program.example_inputs
        with torch.no_grad():
            found = aot_compile(each.program.module(), args, kwargs, options=settings)
        assert isinstance(found, list)
        # Files of code, and what the code calls constants.
        package_aoti(str(folder / program.file), [part for part in found if isinstance(part, str)])
        places[program.file] = {
            constant: _store(tensor.detach(), weights)
            for part in found
            if not isinstance(part, str)
            for constant, (tensor, _) in part.items()
        }
        written[name] = program
    save_file(weights, folder / WEIGHTS)
    return written, {"weights": places}


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
    device = loaded.get_metadata()["AOTI_DEVICE_KEY"]
    stored = load_file(folder / WEIGHTS, device=device)
    places = manifest.details["weights"][program.file]
    weights = {wanted: stored[key].as_strided(*shape) for wanted, (key, *shape) in places.items()}
    loaded.load_constants(weights, check_full_update=True, user_managed=True)

    # The package has the addresses of its weights alone; this default keeps the tensors.
    def run(tensors: Sequence[Tensor], _weights: Any = weights) -> list[Tensor]:
        with torch.no_grad():
            return list(loaded(*(tensor.to(device) for tensor in tensors)))

    return run


def _make_thresholds_finite(program: ExportedProgram) -> None:
    """Put the largest number for infinity, which the JSON that holds an operator's arguments cannot say."""
    most = torch.finfo(torch.float32).max
    for node in program.graph.find_nodes(op="call_function", target=masked_moe):
        taus = {name: min(node.kwargs[name], most) for name in ("tau_text", "tau_vision")}
        node.kwargs = {**node.kwargs, **taus}


def _store(tensor: Tensor, weights: dict[str, Tensor]) -> tuple[str, list[int], list[int]]:
    """Put a tensor's memory among `weights`, where equal memory lies once; gives key, size and strides."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided([last + 1 if tensor.numel() else 0], [1]).cpu()
    digest = hashlib.sha256(str(memory.dtype).encode())
    digest.update(memory.view(torch.uint8).numpy().data)
    weights.setdefault(digest.hexdigest(), memory)
    return digest.hexdigest(), list(tensor.shape), list(tensor.stride())


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
