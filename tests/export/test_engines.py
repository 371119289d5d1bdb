"""Target `tensorrt-rtx`: engines of a whole decoder, built without a GPU; their sizes and scratch memory."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxscript")

import modes_fx
from modes_fx.aot import tensorrt_rtx
from modes_fx.aot.manifest import Manifest
from modes_fx.aot.programs import Traced
from modes_fx.errors import ExportError
from modes_fx.progress import Bar
from modes_fx.testing import tiny_profile
from modes_fx.testing.qwen3_vl_moe import tiny_inputs, tiny_qwen3_vl_moe

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import export_serve

DYNAMIC = {"batch": (1, 1), "tokens": (1, 256), "cache": (1, 256)}
LIMIT = 32 << 20


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3_vl_moe(num_layers=1, dtype=torch.float16)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "tiny"
    given = {"dynamic": DYNAMIC, "options": {"max_activation_bytes": LIMIT}}
    modes_fx.export(model, tiny_profile(model), tiny_inputs(grid=None), path, target="tensorrt-rtx", **given)
    return path


def test_sizes_and_scratch_memory(model, folder):
    manifest = Manifest.read(folder)
    assert manifest.details["compute_capabilities"] == ["SM80", "SM89", "SM120"]
    weights = sum(p.nbytes for p in model.model.language_model.parameters())
    for name, program in manifest.programs.items():
        report = manifest.details[name]
        size = (folder / program.file).stat().st_size
        assert weights < size == report["engine_bytes"] < weights + (8 << 20)
        assert 0 < report["activation_bytes"] < LIMIT
        assert report["layers"] > 100 and report["build_ms"] > 0
    assert manifest.details["decode"]["activation_bytes"] < manifest.details["prefill"]["activation_bytes"]


def test_more_scratch_memory_than_allowed(monkeypatch, tmp_path):
    engine = tensorrt_rtx.Engine(b"plan", build_ms=1.0, activation_bytes=1001, num_layers=1)
    monkeypatch.setattr(tensorrt_rtx, "write_onnx", lambda *given, **options: None)
    monkeypatch.setattr(tensorrt_rtx, "build_engine", lambda *given: engine)
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(3),))
    traced = {"prefill": Traced(program, ("x",), ("y",))}
    limit = {"max_activation_bytes": 1000}
    with pytest.raises(ExportError, match="prefill engine needs 1001 bytes of scratch memory, more than"):
        tensorrt_rtx.write_programs(tmp_path, traced, limit, Bar())
    assert not list(tmp_path.iterdir())
    limit["max_activation_bytes"] = 1001
    tensorrt_rtx.write_programs(tmp_path, traced, limit, Bar())
    assert (tmp_path / "prefill.engine").read_bytes() == b"plan"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_serving_without_a_gpu_says_so(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export_serve.py", str(folder), "scene.png", "what ?"])
    with pytest.raises(SystemExit, match=r"engines for NVIDIA GPUs \(SM80, SM89, SM120\), and torch"):
        export_serve.main()
