"""ONNX files as TensorRT takes them: no uint8, and blocks as chains of plugins."""

from collections.abc import Iterable, Iterator

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from modes_fx.aot.kernel_bundle import Step
from modes_fx.aot.onnx_body import DOMAIN
from modes_fx.kernels._masked_moe_triton_launches import THRESHOLDS

PLUGINS = "modes_fx"  # the domain of a node is the namespace of its plugin


def without_uint8(model: onnx.ModelProto) -> None:
    """Make int32 of what is uint8, the modality: TensorRT converts uint8 to and from floats alone."""
    tensors = [*model.graph.initializer]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.UINT8:
                attribute.i = TensorProto.INT32
            if attribute.type == onnx.AttributeProto.TENSOR:
                tensors.append(attribute.t)
    for tensor in tensors:
        if tensor.data_type == TensorProto.UINT8:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype("int32"), tensor.name)
            )
    for info in model.graph.value_info:
        if info.type.tensor_type.elem_type == TensorProto.UINT8:
            info.type.tensor_type.elem_type = TensorProto.INT32


def with_plugins(model: onnx.ModelProto, chains: Iterable[tuple[list[str], tuple[Step, ...]]]) -> None:
    """Put a chain of plugin nodes in the place of each `MaskedMoE` node; the functions go.

    Args:
        chains: For each such node, in order: names of the op's tensors as it takes them, and its steps.
    """
    nodes: list[NodeProto] = []
    remaining = iter(chains)
    for node in model.graph.node:
        if node.domain == DOMAIN:
            names, steps = next(remaining)
            tensors = dict(zip(names, node.input, strict=True))
            nodes += _chain(model, node, tensors, steps)
        else:
            nodes.append(node)
    assert next(remaining, None) is None
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend([*kept, helper.make_opsetid(PLUGINS, 1)])


def _chain(
    model: onnx.ModelProto, node: NodeProto, tensors: dict[str, str], steps: tuple[Step, ...]
) -> Iterator[NodeProto]:
    """The nodes of one block."""
    prefix = node.output[0]
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    values = [attributes[name] for name in THRESHOLDS]
    tensors["thresholds"] = f"{prefix}/thresholds"
    thresholds = helper.make_tensor(tensors["thresholds"], TensorProto.FLOAT, [4], values)
    model.graph.initializer.append(thresholds)
    for name in ("experts", "modality"):
        if name in tensors:
            cast = f"{prefix}/{name}"
            yield helper.make_node("Cast", [tensors[name]], [cast], to=TensorProto.INT32)
            tensors[name] = cast
    if "modality" in tensors:
        every = helper.make_tensor(f"{prefix}/every", TensorProto.INT64, [1], [-1])
        model.graph.initializer.append(every)
        flat = f"{prefix}/modality/flat"
        yield helper.make_node("Reshape", [tensors["modality"], every.name], [flat])
        tensors["modality"] = flat
    for step in steps:
        given = [tensors[name] for name in step.inputs.values()]
        tensors |= {buffer.name: f"{prefix}/{buffer.name}" for buffer in step.outputs.values()}
        outputs = [tensors[buffer.name] for buffer in step.outputs.values()]
        if step is steps[-1]:
            outputs = [node.output[0]]
        yield helper.make_node(
            step.plugin,
            given,
            outputs,
            name=f"{prefix}/{step.plugin}",
            domain=PLUGINS,
            plugin_namespace=PLUGINS,
            plugin_version="1",
        )
