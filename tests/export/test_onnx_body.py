"""The body of `MaskedMoE`, run by onnxruntime, gives what the specification does."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from modes_fx.aot.onnx_body import ATTRIBUTES, DOMAIN, DOMAIN_VERSION, OPSET, Variation, write_function  # noqa: E402
from modes_fx.kernels.masked_moe import Call, reference  # noqa: E402

TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.uint8: onnx.TensorProto.UINT8,
}


def run_body(problem, *, sparse, block=4):
    """`problem` through a model of one node, whose function is all that onnxruntime has to go by."""
    call = Call(**problem)
    kind = Variation(
        activation=call.activation,
        has_modality=call.modality is not None,
        has_gate_up_bias=call.gate_up_bias is not None,
        has_down_bias=call.down_bias is not None,
        interleaved=call.interleaved,
        weights_on_input=call.weights_on_input,
        renormalise=call.renormalise,
    )
    tensors = {name: getattr(call, name) for name in kind.inputs}
    if not call.is_transposed:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    infos = [
        onnx.helper.make_tensor_value_info(n, TYPES[t.dtype], [None] * t.dim()) for n, t in tensors.items()
    ]
    out = onnx.helper.make_tensor_value_info("out", TYPES[call.hidden.dtype], [None, None])
    attributes = {name: getattr(call, name) for name in ATTRIBUTES if name != "block"}
    node = onnx.helper.make_node(
        "MaskedMoE",
        kind.inputs,
        ["out"],
        domain=DOMAIN,
        block=block,
        **{k: v for k, v in attributes.items() if v != ""},
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", infos, [out]),
        functions=[write_function("MaskedMoE", kind, sparse=sparse)],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {n: np.asarray(t) for n, t in tensors.items()})[0])


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "static"])
def test_every_shape(case, sparse, make_problem):
    if case.tokens == 0 and not sparse:
        pytest.skip("sizes that follow from the number of tokens start at one")
    problem = make_problem(case)
    torch.testing.assert_close(run_body(problem, sparse=sparse), reference(**problem), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "static"])
def test_every_layout_and_formula(layout, sparse, small, make_problem):
    problem = make_problem(small, **layout)
    torch.testing.assert_close(run_body(problem, sparse=sparse), reference(**problem), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "static"])
def test_float16(sparse, typical, make_problem):
    problem = make_problem(typical)
    want = reference(**problem)
    half = {
        name: x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "scores" else x
        for name, x in problem.items()
    }
    got = run_body(half, sparse=sparse)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("block", [1, 16])
def test_any_size_of_blocks(block, typical, make_problem):
    problem = make_problem(typical)
    got = run_body(problem, sparse=True, block=block)
    torch.testing.assert_close(got, reference(**problem), atol=1e-5, rtol=1e-5)
