"""Target `onnx`: what its files hold; that they answer rightly is in test_targets.py."""

import copy
import os

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import modes_fx  # noqa: E402
from modes_fx.aot.manifest import NAME  # noqa: E402
from modes_fx.aot.onnx_body import DOMAIN, OPSET  # noqa: E402
from modes_fx.aot.onnx_target import Weights  # noqa: E402
from modes_fx.errors import ExportError  # noqa: E402
from modes_fx.testing import tiny_profile  # noqa: E402
from modes_fx.testing.qwen3_vl_moe import tiny_inputs, tiny_qwen3_vl_moe  # noqa: E402


@pytest.fixture(scope="module")
def folder(exported):
    return exported("onnx")


@pytest.fixture(scope="module")
def program(folder):
    return modes_fx.load(folder)


def test_every_block_is_one_node_with_its_own_constants(folder, profile):
    for name in ("prefill", "decode"):
        file = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        nodes = [node for node in file.graph.node if node.domain == DOMAIN]
        found = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]
        assert [each["layer"].decode() for each in found] == [layer.name for layer in profile.layers]
        for each, layer in zip(found, profile.layers, strict=True):
            assert each["alpha_text"] == pytest.approx(layer.alpha_text)
            assert each["tau_vision"] == pytest.approx(profile.tau_vision)
        assert [function.name for function in file.functions] == ["MaskedMoE"]


def test_weights_lie_in_one_file(folder, model):
    bytes_of_model = sum(p.numel() * p.element_size() for p in model.parameters())
    # Prefill and decode share theirs; padding between tensors and small ones kept inside are the rest.
    assert (folder / "weights.bin").stat().st_size < 2 * bytes_of_model


def test_weights_beyond_two_gigabytes(tmp_path):
    """A file of weights may be of any size: what lies behind a hole of 3 GB is found."""
    weights = Weights(tmp_path / "weights.bin")
    weights.path.touch()
    os.truncate(weights.path, 3 << 30)
    matrix = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 64])
    product = onnx.helper.make_node("MatMul", ["x", "matrix"], ["y"])
    tensors = [onnx.numpy_helper.from_array(matrix, "matrix")]
    graph = onnx.helper.make_graph([product], "one", [given], [y], tensors)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx_ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    weights.move_out_of(model)
    onnx.save(onnx_ir.to_proto(model), tmp_path / "one.onnx")
    onnx.checker.check_model(str(tmp_path / "one.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    x = np.ones((1, 64), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ matrix, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "one.onnx").stat().st_size < 1000


@torch.no_grad()
def test_float16(tmp_path):
    """A whole model in float16 is as near to the eager one in float32 as the eager one in float16."""
    model = tiny_qwen3_vl_moe(num_layers=1, dtype=torch.float16)
    profile = tiny_profile(model, tau_text=0.0, tau_vision=0.0)
    inputs = tiny_inputs(text=12)
    want = copy.deepcopy(model).float()(**inputs).logits
    modes_fx.export(model, profile, tiny_inputs(batch=2), tmp_path / "half", target="onnx")
    program = modes_fx.load(tmp_path / "half")
    output = program(**inputs)
    assert output.logits.dtype == torch.float16
    error = (output.logits.float() - want).abs().max()
    assert error < 2 * (model(**inputs).logits.float() - want).abs().max()
    assert program.generate(max_new_tokens=3, **inputs).shape == (1, 3)


def test_calls_that_do_not_fit(program, make_inputs):
    inputs = make_inputs(text=3)
    with pytest.raises(ValueError, match=r"tokens is 4097.*dynamic="):
        program(input_ids=torch.full((1, 4097), 9))
    with pytest.raises(ValueError, match=r"A picture is \(1, 2, 4\).*exported for \(1, 12, 12\)"):
        program(**make_inputs(grid=(2, 4)))
    with pytest.raises(ValueError, match="36 visual tokens, and there are no pixel_values"):
        program(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="attention_mask must be"):
        program(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
    with pytest.raises(TypeError, match="takes no pixel_values_videos"):
        program(**inputs, pixel_values_videos=inputs["pixel_values"])
    cache = program(**inputs).past_key_values
    with pytest.raises(ValueError, match="one token a row"):
        program(input_ids=torch.tensor([[9, 9]]), past_key_values=cache)


def test_what_cannot_be_exported(model, profile, example, tmp_path):
    with pytest.raises(ExportError, match=r"target must be one of aoti, onnx.*'tensorflow'"):
        modes_fx.export(model, profile, example, tmp_path / "a", target="tensorflow")
    with pytest.raises(ExportError, match="dynamic takes batch, tokens, cache, got length"):
        modes_fx.export(model, profile, example, tmp_path / "a", target="onnx", dynamic={"length": (1, 2)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("work")
    with pytest.raises(ExportError, match="is no export of modes_fx"):
        modes_fx.export(model, profile, example, tmp_path / "mine", target="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_bfloat16_is_refused_where_it_would_run(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    text = (tmp_path / NAME).read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"')
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ExportError, match=r"is in bfloat16.*export the model in float32 or float16"):
        modes_fx.load(tmp_path)


def test_a_file_is_no_folder(folder):
    with pytest.raises(ExportError, match="is a file; pass the folder"):
        modes_fx.load(folder / "manifest.json")
