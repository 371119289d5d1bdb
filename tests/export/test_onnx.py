"""Target `onnx`: plain onnxruntime gives what the eager model gives with the dropped pairs at weight zero."""

import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import modes_fx  # noqa: E402
from modes_fx.aot.onnx_body import DOMAIN  # noqa: E402
from modes_fx.errors import ExportError  # noqa: E402
from modes_fx.testing.qwen3_vl_moe import tiny_inputs  # noqa: E402


@pytest.fixture(scope="module")
def folder(model, profile, example, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny"
    modes_fx.export(model, profile, example, path, target="onnx")
    return path


@pytest.fixture(scope="module")
def program(folder):
    return modes_fx.load(folder)


def test_prefill(program, claims):
    claims.prefill(program)


def test_padded_rows(program, claims):
    claims.padded_rows(program)


def test_generation(program, claims):
    claims.generation(program)


def test_without_transformers(folder, claims):
    claims.without_transformers(folder)


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


def test_calls_that_do_not_fit(program):
    inputs = tiny_inputs(text=3)
    with pytest.raises(ValueError, match=r"tokens is 4097.*dynamic="):
        program(input_ids=torch.full((1, 4097), 9))
    with pytest.raises(ValueError, match=r"A picture is \(1, 2, 4\).*exported for \(1, 4, 4\)"):
        program(**tiny_inputs(grid=(2, 4)))
    with pytest.raises(ValueError, match="4 visual tokens, and there are no pixel_values"):
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


def test_a_file_is_no_folder(folder):
    with pytest.raises(ExportError, match="is a file; pass the folder"):
        modes_fx.load(folder / "manifest.json")
