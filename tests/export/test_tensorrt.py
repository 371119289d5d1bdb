"""Target `tensorrt`, as far as it can be seen without a GPU and without TensorRT.

The files, the kernels' PTX, and what the launch table says, by Triton's interpreter in TensorRT's place.
What TensorRT's own plugin code makes of the table is in test_tensorrt_plugins.py.
"""

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

import modes_fx  # noqa: E402
from modes_fx.aot import kernel_bundle, tensorrt_target  # noqa: E402
from modes_fx.aot.buckets import buckets_of, check_buckets, cut_outputs, pad_inputs  # noqa: E402
from modes_fx.aot.kernel_bundle import (  # noqa: E402
    PTX_VERSIONS,
    TILES,
    Bundle,
    Kind,
    check_launchable,
    kind_of,
    ptx_version,
    write_bundle,
)
from modes_fx.aot.loaded import ExportedModel  # noqa: E402
from modes_fx.aot.manifest import Manifest, Range  # noqa: E402
from modes_fx.aot.onnx_body import DOMAIN  # noqa: E402
from modes_fx.errors import ExportError  # noqa: E402
from modes_fx.kernels import _masked_moe_triton as lowering  # noqa: E402
from modes_fx.kernels._masked_moe_triton_launches import (  # noqa: E402
    THRESHOLDS,
    entry,
    evaluate,
    record,
)
from modes_fx.kernels.masked_moe import Call  # noqa: E402
from modes_fx.progress import Bar  # noqa: E402
from modes_fx.skipping import simulate  # noqa: E402
from modes_fx.testing import tiny_inputs, tiny_profile, tiny_qwen3_vl_moe  # noqa: E402

ARCH = 80  # of the exported tiny model
MANY = ["threshold", "scan", "place", "gate_up", "down", "combine"]
FEW = ["decode_gate_up", "decode_down"]

interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="interprets kernels")


@pytest.fixture(scope="module")
def tiny():
    """A model of two layers, and its profile. Text alone, which is traced in half the time."""
    model = tiny_qwen3_vl_moe(num_layers=2)
    return model, tiny_profile(model)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tensorrt") / "tiny"
    options = {"architectures": (ARCH,), "buckets": {"cache": (32, 64)}}
    dynamic = {"batch": (1, 4), "tokens": (1, 300), "cache": (1, 64)}
    example = tiny_inputs(text=6, batch=2, grid=None)
    modes_fx.export(*tiny, example, path, target="tensorrt", options=options, dynamic=dynamic)
    return path


@pytest.fixture(scope="module")
def bundle(folder):
    return Bundle.read(folder)


@pytest.fixture(scope="module")
def body(folder):
    """The folder's files with a body, run by onnxruntime."""
    manifest = Manifest.read(folder)
    assert manifest.target == "tensorrt"
    return ExportedModel(folder, dataclasses.replace(manifest, target="onnx"))


def launches_of(kind, arch):
    return record(kind.call(), TILES[arch])


# The files.


@torch.no_grad()
def test_files_with_a_body_run_in_onnxruntime(body, tiny):
    model, profile = tiny
    for rows, text in ((1, 1), (3, 40)):
        inputs = tiny_inputs(text=text, grid=None, batch=rows)
        with simulate(model, profile) as counts:
            want = model(**inputs).logits
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert counts.skip() > 0
        torch.testing.assert_close(body(**inputs).logits, want, atol=1e-4, rtol=0)
        found = body.generate(max_new_tokens=3, **inputs)
        assert found.tolist() == tokens[:, inputs["input_ids"].shape[1] :].tolist()


def test_a_block_is_a_chain_of_plugins(folder, bundle, tiny):
    _, profile = tiny
    for name, chain in (("prefill", MANY), ("decode", FEW)):
        model = onnx.load(folder / f"{name}.plugins.onnx", load_external_data=False)
        nodes = [node.op_type.rsplit("_", 1)[0] for node in model.graph.node if node.domain == "modes_fx"]
        assert nodes == chain * len(profile.layers)
        assert not model.functions
        assert DOMAIN not in {opset.domain for opset in model.opset_import}
        assert [layer for layer, _ in bundle.programs[name]] == [layer.name for layer in profile.layers]
        # All layers share their kernels; what differs between them are the thresholds.
        assert len({chain for _, chain in bundle.programs[name]}) == 1
        found = [
            onnx.numpy_helper.to_array(tensor).tolist()
            for tensor in model.graph.initializer
            if tensor.name.endswith("/thresholds")
        ]
        taus = profile.tau_text, profile.tau_vision
        wanted = [[layer.alpha_text, layer.alpha_vision, *taus] for layer in profile.layers]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted))


def test_no_tensor_is_uint8(folder):
    for path in folder.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {info.type.tensor_type.elem_type for info in inferred.graph.value_info}
        types |= {tensor.data_type for tensor in model.graph.initializer}
        assert onnx.TensorProto.UINT8 not in types


def test_weights_are_stored_once(folder, tiny):
    model, _ = tiny
    bytes_of_model = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (folder / "weights.bin").stat().st_size < 2 * bytes_of_model


def test_loading_here_says_what_is_missing(folder):
    if torch.cuda.is_available():
        pytest.skip("says so where there is no GPU")
    with pytest.raises(ExportError, match=r"here is no GPU.*pip install .*target=\"onnx\" or \"aoti\""):
        modes_fx.load(folder)


def test_options_that_do_not_fit(tmp_path):
    with pytest.raises(ExportError, match="takes architectures and buckets, got sparse"):
        tensorrt_target.write_programs(tmp_path, {}, {"sparse": True}, Bar())
    with pytest.raises(ExportError, match="buckets takes tokens and cache, got batch"):
        tensorrt_target.write_programs(tmp_path, {}, {"buckets": {"batch": (1,)}}, Bar())
    with pytest.raises(ExportError, match=r"buckets\['tokens'\] must be sizes from 1 to 4096.*\(128, 256\)"):
        check_buckets("tokens", (128, 256), Range(1, 4096))
    with pytest.raises(ExportError, match=r"architectures must be some of \(80, 90, 100\), got \(86,\)"):
        write_bundle(tmp_path, {}, (86,))


# Kernels, as a runtime would run them.


class Interpreter:
    """Runs steps by what the launch table says of them, on CPU tensors, with Triton's interpreter."""

    def __init__(self, steps, kind, arch=ARCH):
        self.steps, self.arch = steps, arch
        self.kernels = [entry(launch) for launch in launches_of(kind, arch)]
        self.constants = [launch.constants for launch in launches_of(kind, arch)]

    def run(self, index, given):
        step = self.steps[index]
        told = step.told
        tokens = told and given[told.input].shape[told.dimension] // told.times
        outputs = [
            # What was never written has to show where it is read.
            torch.full(
                [evaluate(size, tokens) for size in buffer.shape],
                float("nan") if buffer.dtype.startswith(("float", "bfloat")) else 2**31 - 1,
                dtype=getattr(torch, buffer.dtype),
            )
            for buffer in step.outputs.values()
        ]
        sizes = [evaluate(size, tokens) for size in step.sizes.values()]
        grid = tuple(evaluate(size, tokens) for size in step.kernels[self.arch].grid)
        self.kernels[index][grid](*given, *sizes, *outputs, **self.constants[index])
        return outputs

    def run_all(self, tensors):
        known = dict(tensors)
        for index, step in enumerate(self.steps):
            outputs = self.run(index, [known[name] for name in step.inputs.values()])
            known |= {buffer.name: x for buffer, x in zip(step.outputs.values(), outputs, strict=True)}
        return outputs[0]


def steps_of(kind, arch=ARCH):
    """The steps of a kind as `launch.json` has them, of kernels that nobody compiled."""
    compiled = SimpleNamespace(asm={"ptx": ""}, metadata=SimpleNamespace(name="k", num_warps=4, shared=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_bundle, "compile_launch", lambda *_: compiled)
        patch.setattr(kernel_bundle, "write_atomically", lambda *_: None)
        steps = [kernel_bundle._compile_step(Path(), [each], [arch]) for each in launches_of(kind, arch)]
    return tuple(kernel_bundle._step(json.loads(json.dumps(kernel_bundle._plain(step)))) for step in steps)


def as_chain_takes(call):
    """The tensors of a chain, from a call of the op."""
    tensors = {name: x for name, x in vars(call).items() if isinstance(x, torch.Tensor)}
    tensors |= {name: tensors[name].int() for name in ("experts", "modality") if name in tensors}
    return tensors | {"thresholds": torch.tensor([getattr(call, name) for name in THRESHOLDS])}


def check_chain(problem, assert_within_budget, tokens=None):
    call = Call(**problem)
    kind = dataclasses.replace(kind_of(call, {}), is_dynamic=True, tokens=tokens or call.hidden.shape[0])
    with torch.no_grad():
        got = Interpreter(steps_of(kind), kind).run_all(as_chain_takes(call))
    assert_within_budget(got, problem)


@interpreted
@pytest.mark.parametrize(
    ("skip", "dtype"),
    [(0.0, torch.float32), (0.5, torch.float32), (1.0, torch.float32), (0.5, torch.float16)],
)
@pytest.mark.parametrize(("tokens", "typical_tokens"), [(1, 16), (5, 16), (1, 4096), (5, 4096), (130, 4096)])
def test_chains_give_what_the_op_gives(
    tokens, typical_tokens, skip, dtype, typical, make_problem, assert_within_budget
):
    case = typical._replace(tokens=tokens, skip=skip, modality="text" if skip == 1 else "mixed")
    check_chain(make_problem(case, dtype), assert_within_budget, typical_tokens)


@interpreted
@pytest.mark.parametrize("typical_tokens", [16, 4096])
def test_chains_of_every_layout_and_formula(
    typical_tokens, layout, small, make_problem, assert_within_budget
):
    check_chain(make_problem(small, **layout), assert_within_budget, typical_tokens)


@interpreted
def test_chains_without_modality_and_of_one_size(small, make_problem, assert_within_budget):
    problem = make_problem(small._replace(modality=None))
    check_chain(problem, assert_within_budget, 16)
    call = Call(**problem)
    kind = kind_of(call, {})
    assert not kind.is_dynamic
    assert all(step.told is None for step in steps_of(kind))
    assert_within_budget(Interpreter(steps_of(kind), kind).run_all(as_chain_takes(call)), problem)


@interpreted
@torch.no_grad()
def test_programs_of_plugins_give_what_the_body_gives(folder, bundle, body):
    """Whole programs, node by node, each plugin by what the table says of it."""
    inputs = tiny_inputs(text=9, batch=2, seed=4, grid=None)
    tensors = body.prefill_tensors(**inputs)
    prefill = body.run("prefill", tensors)
    torch.testing.assert_close(run_plugins(folder, bundle, "prefill", tensors), prefill, atol=1e-4, rtol=0)
    ones = torch.ones(2, tensors["input_ids"].shape[1] + 1, dtype=torch.int64)
    step = {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": ones}
    step["position_ids"] = tensors["position_ids"][..., -1:] + 1
    names = body.manifest.programs["decode"].inputs[len(step) :]
    step |= dict(zip(names, prefill[1:], strict=True))
    decode = body.run("decode", step)
    torch.testing.assert_close(run_plugins(folder, bundle, "decode", step), decode, atol=1e-4, rtol=0)


def run_plugins(folder, bundle, name, tensors):
    (chain,) = {chain for _, chain in bundle.programs[name]}
    steps = bundle.chains[chain]
    interpreter = Interpreter(steps, bundle.kinds[chain])

    def plugin(index, step):
        class Plugin(OpRun):
            op_domain = "modes_fx"

            def _run(self, *given, **_):
                outputs = interpreter.run(index, [torch.from_numpy(x.copy()) for x in given])
                return tuple(x.numpy() for x in outputs)

        Plugin.__name__ = step.plugin
        return Plugin

    model = onnx.load(folder / f"{name}.plugins.onnx")
    evaluator = ReferenceEvaluator(model, new_ops=[plugin(i, step) for i, step in enumerate(steps)])
    found = evaluator.run(None, {key: x.numpy() for key, x in tensors.items()})
    return [torch.from_numpy(x) for x in found]


# The table, against the launcher.


@pytest.mark.parametrize(("most", "tokens"), [(16, (1, 2, 7, 16)), (4096, (17, 130, 1000, 4096))])
@pytest.mark.parametrize("arch", [80, 90])
def test_the_table_says_what_the_launcher_launches(most, tokens, arch, make_problem, typical):
    """At every number of tokens: grids, sizes that are passed, and sizes of what is written."""
    kind = dataclasses.replace(kind_of(Call(**make_problem(typical)), {}), tokens=most, is_dynamic=True)
    steps = steps_of(kind, arch)
    for num_tokens in tokens:
        exact = dataclasses.replace(kind, tokens=num_tokens, is_dynamic=False)
        launched = launches_of(exact, arch)
        assert [launch.name for launch in launched] == [step.plugin.rsplit("_", 1)[0] for step in steps]
        for launch, step in zip(launched, steps, strict=True):
            assert launch.grid == tuple(evaluate(size, num_tokens) for size in step.kernels[arch].grid)
            for name, size in step.sizes.items():
                assert launch.constants[name] == evaluate(size, num_tokens)
            for name, buffer in step.outputs.items():
                assert launch.outputs[name].shape == tuple(evaluate(s, num_tokens) for s in buffer.shape)


def test_the_recorder_sees_what_is_really_launched(make_problem, typical, monkeypatch):
    """The grids of the table are those of real launches of the real lowering on real tensors."""
    call = Call(**make_problem(typical))
    grids = []
    launcher = lowering._masked_moe

    def note(kernel):
        class Noted:
            def __getitem__(self, grid):
                grids.append((kernel.__name__.strip("_").removesuffix("_kernel"), tuple(grid)))
                return kernel[grid]

        return Noted()

    with monkeypatch.context() as patch:
        patch.setattr(lowering, "_masked_moe", lambda call, wrap, arch: launcher(call, note, arch))
        lowering.masked_moe_triton(call)
    kind = dataclasses.replace(kind_of(call, {}), tokens=4096, is_dynamic=True)
    table = [(launch.name, launch.grid) for launch in launches_of(kind, 90)]
    tokens = call.hidden.shape[0]
    assert grids == [(name, tuple(evaluate(size, tokens) for size in grid)) for name, grid in table]


# PTX.


def test_parameters_of_ptx_are_those_of_the_table(folder, bundle):
    for steps in bundle.chains.values():
        for step in steps:
            check_parameters(step, folder)


def check_parameters(step, folder):
    for kernel in step.kernels.values():
        ptx = (folder / kernel.file).read_text()
        name, parameters = re.findall(r"\.visible \.entry (\w+)\(\s*(.*?)\s*\)", ptx, re.DOTALL)[0]
        found = re.findall(r"\.param \.(\w+)", parameters)
        wanted = ["u64"] * len(step.inputs) + ["u32"] * len(step.sizes) + ["u64"] * len(step.outputs)
        assert name == kernel.entry
        # Triton adds two pointers for scratch memory, which no kernel here has; TensorRT passes null.
        assert found == [*wanted, "u64", "u64"]


@pytest.fixture(scope="module")
def typical_kernels(tmp_path_factory):
    """Kernels in bfloat16 of a layer as published models have them, for every architecture."""
    folder = tmp_path_factory.mktemp("kernels")
    sizes = {"hidden": (256,), "scores": (8,), "weights": (8,), "experts": (8,), "modality": ()}
    sizes |= {"gate_up": (32, 256, 256), "down": (32, 128, 256)}
    dtypes = {"scores": "float32", "experts": "int32", "modality": "int32"}
    tensors = {name: (dtypes.get(name, "bfloat16"), shape) for name, shape in sizes.items()}
    flags = {"activation": "silu(gate) * up", "interleaved": False, "is_transposed": True}
    flags |= {"weights_on_input": False, "renormalise": False}
    kinds = [Kind(tensors, flags, tokens, True) for tokens in (16, 4096)]
    programs = {str(kind.tokens): [("layer", kind)] for kind in kinds}
    return write_bundle(folder, programs, (80, 90, 100))


def test_every_architecture_gets_kernels_that_its_drivers_take(typical_kernels):
    for program, names in (("16", FEW), ("4096", MANY)):
        ((_, chain),) = typical_kernels.programs[program]
        steps = typical_kernels.chains[chain]
        assert [step.plugin.rsplit("_", 1)[0] for step in steps] == names
        for step in steps:
            check_parameters(step, typical_kernels.folder)
            for arch, kernel in step.kernels.items():
                ptx = (typical_kernels.folder / kernel.file).read_text()
                assert ptx_version(ptx) <= PTX_VERSIONS[arch] <= 90
                assert re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0].rstrip("a") == f"sm_{arch}"
                # No tensor memory, no clusters, no descriptors.
                assert not re.search(r"tcgen05|cluster|tensormap|cp\.async\.bulk", ptx)
                assert kernel.num_warps * 32 == int(re.findall(r"\.reqntid (\d+)", ptx)[0])
                # What the smallest of the GPUs has that it may run on; 8.6 and 12.0 have less than 8.0.
                assert kernel.shared <= {80: 99, 90: 227, 100: 227}[arch] * 1024


def test_no_kernel_spills(typical_kernels, tmp_path):
    """By the assembler that comes with Triton; drivers have their own."""
    script = "from triton.backends.nvidia.compiler import get_ptxas; print(get_ptxas(80).path)"
    run = {"check": True, "capture_output": True, "text": True}
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ptxas = subprocess.run([sys.executable, "-c", script], env=environment, **run).stdout.strip()
    for path in typical_kernels.folder.glob("*gate_up*.ptx"):
        target = re.findall(r"^\.target (\w+)", path.read_text(), re.MULTILINE)[0]
        command = [ptxas, "-v", "--gpu-name", target, str(path), "-o", str(tmp_path / "k.cubin")]
        said = subprocess.run(command, **run).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in said, (path.name, said)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"global_scratch_size": 8}, "scratch memory"),
        ({"profile_scratch_size": 8}, "scratch memory to be profiled"),
        ({"tmem_size": 128}, "tensor memory"),
        ({"tensordesc_meta": [1]}, "tensor descriptors"),
        ({"num_ctas": 2}, "clusters"),
        ({"launch_cooperative_grid": True}, "cooperative grid"),
        ({"launch_pdl": True}, "dependent launch"),
    ],
)
def test_kernels_that_need_more_than_a_launch_are_refused(change, why):
    plain = dict.fromkeys(kernel_bundle._UNLAUNCHABLE, 0) | {"num_ctas": 1}
    check_launchable("k", 90, SimpleNamespace(**plain))
    with pytest.raises(ExportError, match=f"TensorRT cannot launch k for sm_90: it .*{why}"):
        check_launchable("k", 90, SimpleNamespace(**(plain | change)))


# Buckets.


def test_buckets_hold_every_size():
    assert buckets_of(Range(1, 4096)) == (128, 256, 512, 1024, 2048, 4096)
    assert buckets_of(Range(1, 300)) == (128, 256, 300)
    assert buckets_of(Range(1, 64)) == (64,)
    assert buckets_of(Range(200, 1024)) == (256, 512, 1024)


@torch.no_grad()
def test_a_padded_call_gives_what_the_call_gives(body):
    inputs = tiny_inputs(text=9, batch=2, seed=2, grid=None)
    tensors = body.prefill_tensors(**inputs)
    names = body.manifest.programs["prefill"].outputs
    prefill = dict(zip(names, body.run("prefill", tensors), strict=True))
    padded = dict(zip(names, body.run("prefill", pad_inputs(tensors, 128, 0)), strict=True))
    torch.testing.assert_close(cut_outputs(tensors, padded, 128), prefill, atol=1e-4, rtol=0)
    length = tensors["input_ids"].shape[1]
    step = {
        "input_ids": inputs["input_ids"][:, -1:],
        "attention_mask": torch.ones(2, length + 1, dtype=torch.int64),
        "position_ids": tensors["position_ids"][..., -1:] + 1,
        **{f"past_{name}": x for name, x in prefill.items() if name != "logits"},
    }
    names = body.manifest.programs["decode"].outputs
    decode = dict(zip(names, body.run("decode", step), strict=True))
    padded = dict(zip(names, body.run("decode", pad_inputs(step, 64, 0)), strict=True))
    torch.testing.assert_close(cut_outputs(step, padded, 64), decode, atol=1e-4, rtol=0)


def test_pictures_are_padded_to_what_there_could_be():
    """Rows past the last placeholder are not read, so that their number need be no size of its own."""
    inputs = {
        "input_ids": torch.full((2, 9), 3),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
        "position_ids": torch.ones(3, 2, 9, dtype=torch.int64),
        "feature_0": torch.ones(8, 5),
    }
    padded = pad_inputs(inputs, 16, 7)
    assert padded["feature_0"].shape == (32, 5)
    assert padded["input_ids"].tolist() == [[3] * 9 + [7] * 7] * 2
    assert padded["attention_mask"].sum() == 18
    assert padded["position_ids"].shape == (3, 2, 16)


# Engines: TensorRT-RTX builds them here, in TensorRT's place.


@pytest.fixture(scope="module")
def engines():
    rtx = pytest.importorskip("tensorrt_rtx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", rtx)
        yield importlib.import_module("modes_fx.aot.tensorrt_engines")
        sys.modules.pop("modes_fx.aot.tensorrt_engines")


def test_an_engine_has_a_profile_for_each_bucket(engines, folder):
    manifest = Manifest.read(folder)
    program = manifest.programs["decode"]
    plan, report = engines.build_engine(
        folder / program.file, lambda shapes: engines.profiles(program, shapes, manifest)
    )
    assert report["engine_bytes"] == len(plan) > 10000
    known = {"input_ids": (-1, 1), "attention_mask": (-1, -1), "position_ids": (3, -1, 1)}
    known["past_key_0"] = (-1, 2, -1, 8)
    assert engines.profiles(program, known, manifest) == [
        {
            "input_ids": ((1, 1), (1, 1), (4, 1)),
            "attention_mask": ((1, size + 1), (1, size + 1), (4, size + 1)),
            "position_ids": ((3, 1, 1), (3, 1, 1), (3, 4, 1)),
            "past_key_0": ((1, 2, size, 8), (1, 2, size, 8), (4, 2, size, 8)),
        }
        for size in (32, 64)
    ]
    known = {"input_ids": (-1, -1), "position_ids": (3, -1, -1), "feature_0": (-1, 32)}
    assert engines.profiles(manifest.programs["prefill"], known, manifest) == [
        {
            "input_ids": ((1, size), (1, size), (4, size)),
            "position_ids": ((3, 1, size), (3, 1, size), (3, 4, size)),
            "feature_0": ((size, 32), (size, 32), (4 * size, 32)),
        }
        for size in (128, 256, 300)
    ]


def test_building_needs_a_gpu(engines, folder):
    with pytest.raises(ExportError, match="torch finds none here"):
        engines.build_engines(folder)


def test_a_folder_that_was_not_built_says_how(engines, folder):
    manifest = Manifest.read(folder)
    with pytest.raises(ExportError, match=r"not built.*python -m modes_fx\.aot\.tensorrt_engines"):
        engines.open_engine(folder, manifest, manifest.programs["prefill"])


def test_an_engine_of_another_gpu_is_refused(engines, folder, monkeypatch):
    manifest = Manifest.read(folder)
    gpu = {"gpu": "H100", "compute_capability": 90, "tensorrt": "11.1"}
    built = dataclasses.replace(manifest, requires=gpu, files={"prefill.engine": {}})
    monkeypatch.setattr(engines, "_gpu", lambda: gpu | {"compute_capability": 80})
    with pytest.raises(ExportError, match=r"built for compute_capability 90, here is 80; build it here"):
        engines.open_engine(folder, built, manifest.programs["prefill"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plugins", [True, False])
@torch.no_grad()
def test_engines_give_what_the_model_gives(folder, tiny, plugins, tmp_path):
    pytest.importorskip("tensorrt")
    from modes_fx.aot.tensorrt_engines import build_engines

    shutil.copytree(folder, tmp_path / "built")
    build_engines(tmp_path / "built", plugins=plugins)
    program = modes_fx.load(tmp_path / "built")
    model, profile = tiny
    for rows, text in ((1, 1), (3, 40)):
        inputs = tiny_inputs(text=text, grid=None, batch=rows)
        with simulate(model, profile):
            want = model(**inputs).logits
            tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(program(**inputs).logits, want, atol=1e-3, rtol=0)
        found = program.generate(max_new_tokens=3, **inputs)
        assert found.tolist() == tokens[:, inputs["input_ids"].shape[1] :].tolist()
