"""The body of `MaskedMoE`, run by onnxruntime, gives what the specification does."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from modes_fx.aot.onnx_body import ATTRIBUTES, DOMAIN, DOMAIN_VERSION, OPSET, Variation, write_function  # noqa: E402
from modes_fx.errors import ExportError  # noqa: E402
from modes_fx.kernels.masked_moe import Call, reference  # noqa: E402

TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.uint8: onnx.TensorProto.UINT8,
}


def one_node(call, *, sparse, block):
    """A model of one node, whose function is all that a runtime has to go by; and its inputs."""
    kind = Variation.of(call)
    tensors = {name: getattr(call, name) for name in kind.inputs}
    if not call.is_transposed:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    weights = [
        onnx.numpy_helper.from_array(np.asarray(tensors.pop(name)), name)
        for name in kind.inputs
        if name.startswith(("gate_up", "down"))
    ]
    info = onnx.helper.make_tensor_value_info
    infos = [info(name, TYPES[t.dtype], ["T", *t.shape[1:]]) for name, t in tensors.items()]
    out = info("out", TYPES[call.hidden.dtype], ["T", call.output_size])
    given = {name: getattr(call, name) for name in ATTRIBUTES if name not in ("block", "layer")}
    node = onnx.helper.make_node("MaskedMoE", kind.inputs, ["out"], domain=DOMAIN, block=block, **given)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", infos, [out], weights),
        functions=[write_function("MaskedMoE", kind, sparse=sparse)],
        opset_imports=[onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, DOMAIN_VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model, tensors


def in_half(problem):
    return {
        name: x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "scores" else x
        for name, x in problem.items()
    }


def run_body(problem, *, sparse, block=4):
    """`problem` through that model, by onnxruntime."""
    model, tensors = one_node(Call(**problem), sparse=sparse, block=block)
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
    got = run_body(in_half(problem), sparse=sparse)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("block", [1, 16])
def test_any_size_of_blocks(block, typical, make_problem):
    problem = make_problem(typical)
    got = run_body(problem, sparse=True, block=block)
    torch.testing.assert_close(got, reference(**problem), atol=1e-5, rtol=1e-5)


@pytest.fixture
def rtx():
    pytest.importorskip("tensorrt_rtx")
    from modes_fx.aot import tensorrt_rtx

    return tensorrt_rtx


def test_builds_into_an_engine_for_any_number_of_tokens(rtx, typical, make_problem, tmp_path):
    call = Call(**in_half(make_problem(typical)))
    model, tensors = one_node(call, sparse=False, block=16)
    onnx.save(model, tmp_path / "one.onnx")
    memory = []
    for most in (256, 4096):
        shapes = {
            name: tuple((tokens, *tensor.shape[1:]) for tokens in (1, 64, most))
            for name, tensor in tensors.items()
        }
        engine = rtx.build_engine(tmp_path / "one.onnx", shapes, ["SM80", "SM89", "SM120"])
        assert len(engine.plan) > 1000
        memory.append(engine.activation_bytes)
    assert 0 < memory[0] < memory[1]
    # Gathering an expert's weights for every pair would take 100 MB.
    weights = sum(tensor.nelement() * tensor.element_size() for tensor in (call.gate_up, call.down))
    pairs = 4096 * call.scores.shape[1]
    assert memory[1] < pairs * weights // call.down.shape[0]


def test_what_cannot_be_built_says_why(rtx, tmp_path, typical, make_problem):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"TensorRT-RTX cannot read bad.onnx"):
        rtx.build_engine(tmp_path / "bad.onnx", {}, ["SM80"])
    with pytest.raises(ExportError, match=r"no compute capability SM90; it has .*SM89"):
        rtx.build_engine(tmp_path / "bad.onnx", {}, ["SM80", "SM90"])
