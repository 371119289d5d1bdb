"""Target `onnx`: one file a program, with `ai.modes_fx::MaskedMoE` nodes and a function body.

A runtime that has the operator (a plugin, a custom op) may run it; plain onnxruntime inlines it. Weights
lie beside the programs, in one file that they share.
"""

import functools
import hashlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from modes_fx.aot.manifest import Manifest, Program
from modes_fx.aot.onnx_body import ATTRIBUTES, DOMAIN, DOMAIN_VERSION, Variation, write_function
from modes_fx.aot.programs import Traced
from modes_fx.errors import ExportError
from modes_fx.kernels.masked_moe import Call, masked_moe
from modes_fx.progress import Bar

WEIGHTS = "weights.bin"
# Rows of a block: many tokens fill blocks, of a single one each pair is alone with its expert.
BLOCK_ROWS = {"prefill": 16, "decode": 1}
_SMALLEST_EXTERNAL = 1024  # bytes
_ATTRIBUTE_TYPES = {
    onnx.AttributeProto.FLOAT: onnx.defs.OpSchema.AttrType.FLOAT,
    onnx.AttributeProto.INT: onnx.defs.OpSchema.AttrType.INT,
    onnx.AttributeProto.STRING: onnx.defs.OpSchema.AttrType.STRING,
}


def requires() -> dict[str, Any]:
    """Any machine that has onnxruntime."""
    return {}


def write_programs(
    folder: Path, traced: dict[str, Traced], options: dict[str, Any], bar: Bar
) -> tuple[dict[str, Program], dict[str, Any]]:
    """Write every program as `NAME.onnx`, and `weights.bin` for all of them.

    Args:
        options: `sparse` (True): the way of the body, see `onnx_body`.
    """
    weights = Weights(folder / WEIGHTS)
    written = {}
    for name, each in bar.over(traced.items()):
        path = folder / f"{name}.onnx"
        rows = BLOCK_ROWS.get(name, 1)
        write_onnx(each, path, weights, block_rows=rows, sparse=options.get("sparse", True))
        written[name] = Program(path.name, each.inputs, each.outputs)
    return written, {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of torchvision, and of its own deprecated calls."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def write_onnx(traced: Traced, path: Path, weights: "Weights", *, block_rows: int, sparse: bool) -> None:
    """Write one program as ONNX, with the body of each kind of `MaskedMoE` in it, and check it.

    Args:
        traced: After `modes_fx.rewrite`; a program without the operator will do too.
        weights: In the same folder; takes the tensors.
        block_rows: B of the body.
        sparse: The way of the body.
    """
    kinds: dict[Variation, str] = {}
    with torch.no_grad(), _quiet():
        program = _with_transposed_experts(traced.program)
        converted = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table={masked_moe: _translate(kinds, block_rows)},
            input_names=list(traced.inputs),
            output_names=list(traced.outputs),
            verbose=False,
        )
    assert converted is not None
    _strip(converted.model)
    weights.move_out_of(converted.model)
    model = onnx_ir.to_proto(converted.model)
    model.functions.extend(write_function(name, kind, sparse=sparse) for kind, name in kinds.items())
    onnx.save(model, path)
    # The full check knows no convolution in bfloat16, which operators have from opset 22 on.
    convolutions = (node for node in converted.model.graph if node.op_type == "Conv")
    is_known = all(node.outputs[0].dtype != onnx_ir.DataType.BFLOAT16 for node in convolutions)
    onnx.checker.check_model(str(path), full_check=is_known)


def open_program(folder: Path, manifest: Manifest, program: Program) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch has."""
    if manifest.dtype == "bfloat16":
        raise ExportError(
            f"{folder} is in bfloat16, which onnxruntime does not compute in on a CPU; export the model in "
            "float32 or float16."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(folder / program.file), options, providers=["CPUExecutionProvider"]
    )

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = zip(program.inputs, tensors, strict=True)
        results = session.run(list(program.outputs), {name: _numpy(tensor) for name, tensor in given})
        return [torch.from_numpy(result) for result in results]

    return run


def _strip(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes for debugging: stack traces, with paths of this machine."""
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _numpy(tensor: Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _translate(kinds: dict[Variation, str], block_rows: int) -> Any:
    """What the exporter calls for each `masked_moe` node; notes the function that it will need."""

    def translate(*args: Any, **kwargs: Any) -> Any:
        call = Call(*args, **kwargs)
        assert call.is_transposed
        kind = Variation.of(call)
        name = kinds.setdefault(kind, f"MaskedMoE_{len(kinds)}" if kinds else "MaskedMoE")
        attributes = {key: getattr(call, key) for key in ATTRIBUTES if key != "block"}
        inputs = [getattr(call, key) for key in kind.inputs]
        return _operator(name, kind)(*inputs, **attributes, block=block_rows)

    # The exporter reads a signature; the one of the operator is that of `Call`.
    translate.__signature__ = inspect.signature(Call)  # type: ignore[attr-defined]
    return translate


@functools.cache
def _operator(name: str, kind: Variation) -> Any:
    types = {"hidden": "T", "gate_up": "T", "down": "T", "gate_up_bias": "T", "down_bias": "T"}
    types |= {"scores": "S", "weights": "W", "experts": "tensor(int64)", "modality": "tensor(uint8)"}
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    define = onnx.defs.OpSchema
    schema = define(
        name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[define.FormalParameter(each, types[each]) for each in kind.inputs],
        outputs=[define.FormalParameter("out", "T")],
        type_constraints=[(each, floats, "") for each in "TSW"],
        attributes=[
            define.Attribute(each, _ATTRIBUTE_TYPES[kind_of], required=False)
            for each, kind_of in ATTRIBUTES.items()
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION), name, schema)


def _with_transposed_experts(program: ExportedProgram) -> ExportedProgram:
    """The program with its expert weights as the products want them, `[E, H, 2I]` and `[E, I, H_out]`."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.find_nodes(op="call_function", target=masked_moe):
        if node.kwargs.get("is_transposed"):
            continue
        args = list(node.args)
        for place in (5, 6):  # gate_up, down
            args[place] = _transposed(program, node, args[place], targets)
        node.args = tuple(args)
        node.kwargs = {**node.kwargs, "is_transposed": True}
    program.graph_module.recompile()
    return program


def _transposed(program: ExportedProgram, user: Node, source: Node, targets: dict[str, str]) -> Node:
    """The last two dimensions of a weight exchanged: of the weight itself, where nothing else uses it."""
    value = source.meta["val"]
    if source.name in targets and len(source.users) == 1:
        name = targets[source.name]
        weight = program.state_dict[name].detach().transpose(1, 2).contiguous()
        program.state_dict[name] = torch.nn.Parameter(weight, requires_grad=False)
        source.meta["val"] = value.new_empty(weight.shape)
        return source
    with program.graph.inserting_before(user):
        node = program.graph.call_function(torch.ops.aten.transpose.int, (source, 1, 2))
    node.meta["val"] = value.transpose(1, 2)
    return node


class Weights:
    """A file of tensors that several models share; equal tensors lie there once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}

    def move_out_of(self, model: onnx_ir.Model) -> None:
        """Leave references to this file in place of the model's large tensors."""
        with open(self.path, "ab") as file:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _SMALLEST_EXTERNAL:
                    continue
                raw = tensor.tobytes()
                key = hashlib.sha256(raw).digest()
                if key not in self._places:
                    # Aligned, so that a runtime can map it.
                    file.write(b"\0" * (-file.tell() % 4096))
                    self._places[key] = file.tell()
                    file.write(raw)
                value.const_value = onnx_ir.ExternalTensor(
                    self.path.name,
                    self._places[key],
                    len(raw),
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]
                    name=value.name or "",
                    base_dir=self.path.parent,
                )
