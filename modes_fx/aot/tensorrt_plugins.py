"""The steps of a kernel bundle as TensorRT plugins, and the op as a chain of them. Needs `tensorrt`.

A quick-deployable plugin with an ahead-of-time implementation is one PTX kernel, which the engine keeps: an
engine needs neither Python nor this package to run. What a plugin writes has sizes that follow from those of
what it reads, so a block is a chain of such plugins, linked by tensors of static bounds.
"""

from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Any

import tensorrt as trt  # type: ignore[import-not-found]
import tensorrt.plugin as trtp  # type: ignore[import-not-found]
import torch

from modes_fx.aot.kernel_bundle import TENSORS, Bundle, Kernel, Step
from modes_fx.errors import ExportError
from modes_fx.kernels._masked_moe_triton_launches import THRESHOLDS, evaluate
from modes_fx.kernels.masked_moe import Call

NAMESPACE = "modes_fx"
DTYPES = {
    "float32": trt.float32,
    "float16": trt.float16,
    "bfloat16": trt.bfloat16,
    "int32": trt.int32,
}


def register(bundle: Bundle, architecture: int) -> None:
    """Register the plugins of a bundle with TensorRT, each once in a process.

    Args:
        architecture: Whose kernels: 80, which run on all GPUs from compute capability 8.0 on, or that of the
            GPU that engines are built for.
    Raises:
        ExportError: The bundle has no kernels for it.
    """
    for steps in bundle.chains.values():
        for step in steps:
            if architecture not in step.kernels:
                names = ", ".join(map(str, step.kernels))
                raise ExportError(
                    f"This export has kernels for architectures {names}, not for {architecture}; export with "
                    f'options={{"architectures": (80, {architecture})}}.'
                )
            if not hasattr(trtp.op.define_or_get(NAMESPACE), step.plugin):
                kernel = step.kernels[architecture]
                _register(step, kernel, (bundle.folder / kernel.file).read_text())


def add_chain(network: Any, steps: Sequence[Step], tensors: dict[str, Any]) -> Any:
    """Add a chain to a network definition; gives the tensor of the result.

    Args:
        tensors: `ITensor` of each argument of the op, by its name, and "thresholds".
    """
    plugins = getattr(trtp.op, NAMESPACE)
    known = dict(tensors)
    for step in steps:
        given = [known[name] for name in step.inputs.values()]
        layer = network.add_plugin(getattr(plugins, step.plugin)(*given), aot=True)
        for i, buffer in enumerate(step.outputs.values()):
            known[buffer.name] = layer.get_output(i)
    return layer.get_output(0)


def add_converter(bundle: Bundle, program: str) -> None:
    """Let torch-tensorrt compile the op of one program (`prefill` or `decode`) by the bundle's plugins.

    For who compiles with torch-tensorrt, after `register`: `torch_tensorrt.dynamo.compile` of what
    `modes_fx.rewrite` gives for that program. The last converter added is the one that is used.

    Raises:
        ExportError: torch-tensorrt is not installed.
    """
    try:
        from torch_tensorrt.dynamo.conversion import (  # type: ignore[import-not-found]
            ConverterPriority,
            dynamo_tensorrt_converter,
        )
        from torch_tensorrt.dynamo.conversion.converter_utils import (  # type: ignore[import-not-found]
            cast_trt_tensor,
            get_trt_tensor,
        )
    except ModuleNotFoundError as error:
        raise ExportError(
            f"Converting for torch-tensorrt needs {error.name}: pip install torch-tensorrt=={_minor()}.0, "
            f"the one for torch {_minor()}; `build_engines` needs TensorRT alone."
        ) from None

    chains = dict(bundle.programs[program])

    @dynamo_tensorrt_converter(  # type: ignore[untyped-decorator]
        torch.ops.modes_fx.masked_moe.default, supports_dynamic_shapes=True, priority=ConverterPriority.HIGH
    )
    def convert(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        call = Call(*args, **kwargs)

        def tensor(argument: str, value: Any) -> Any:
            return get_trt_tensor(ctx, value, f"{name}_{argument}")

        tensors = {key: tensor(key, value) for key, value in operands(call).items()}
        for key in ("experts", "modality"):
            if key in tensors:
                tensors[key] = cast_trt_tensor(ctx, tensors[key], trt.int32, f"{name}_{key}_int32", target)
        if "modality" in tensors:
            flat = ctx.net.add_shuffle(tensors["modality"])
            flat.reshape_dims = (-1,)
            tensors["modality"] = flat.get_output(0)
        return add_chain(ctx.net, bundle.chains[chains[call.layer]], tensors)


def operands(call: Call) -> dict[str, Any]:
    """What a chain reads of a call, by name, with the expert weights as exported programs have them."""
    found = {name: getattr(call, name) for name in TENSORS if getattr(call, name) is not None}
    if not call.is_transposed:
        found |= {name: found[name].transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    return found | {"thresholds": torch.tensor([getattr(call, name) for name in THRESHOLDS])}


def _minor() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def _register(step: Step, kernel: Kernel, ptx: str) -> None:
    plugin = f"{NAMESPACE}::{step.plugin}"
    inputs = [_parameter(name, trtp.TensorDesc) for name in step.inputs]

    def describe(*tensors: Any) -> Any:
        tokens = _tokens(step, tensors)
        return tuple(
            trtp.from_shape_expr(
                tuple(evaluate(size, tokens, trtp.min) for size in buffer.shape), DTYPES[buffer.dtype]
            )
            for buffer in step.outputs.values()
        )

    # TensorRT reads the names of tensors, and how many there are, off signatures.
    returns: Any = tuple.__class_getitem__((trtp.TensorDesc,) * len(step.outputs))
    describe.__signature__ = Signature(inputs, return_annotation=returns)  # type: ignore[attr-defined]
    trtp.register(plugin)(describe)

    def launch(*given: Any) -> Any:
        tokens = _tokens(step, given)
        grid = [evaluate(size, tokens, trtp.min) for size in kernel.grid]
        parameters = trtp.KernelLaunchParams(*grid, *(1,) * (3 - len(grid)))
        parameters.block_x = kernel.num_warps * 32
        parameters.shared_mem = kernel.shared
        sizes = trtp.SymIntExprs(len(step.sizes))
        for i, size in enumerate(step.sizes.values()):
            sizes[i] = trtp.SymInt32(evaluate(size, tokens, trtp.min))
        return kernel.entry, ptx, parameters, sizes

    launch.__signature__ = Signature(  # type: ignore[attr-defined]
        [*inputs, _parameter("outputs"), _parameter("tactic")],
        return_annotation=tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
    )
    trtp.aot_impl(plugin)(launch)


def _parameter(name: str, annotation: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _tokens(step: Step, tensors: Sequence[Any]) -> Any:
    """T as an expression in the sizes of a plugin's inputs; None where nothing depends on it."""
    if step.told is None:
        return None
    size = tensors[step.told.input].shape_expr[step.told.dimension]
    return size if step.told.times == 1 else size // step.told.times
