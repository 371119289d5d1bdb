"""What TensorRT's own plugin code (of tensorrt-cu13-bindings, in Python) makes of a launch table.

Its library cannot be had without a GPU host, so that its compiled types are TensorRT-RTX's, and what that
lacks are the few stand-ins here; expressions are computed with numbers. The code that registers plugins,
checks signatures, asks for shapes and dtypes, and sets up launches is the real one.
"""

import dataclasses
import importlib
import importlib.util
import operator
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from modes_fx.aot import kernel_bundle
from modes_fx.aot.kernel_bundle import Kind
from modes_fx.errors import ExportError
from modes_fx.kernels._masked_moe_triton_launches import evaluate
from modes_fx.kernels.masked_moe import Call

ARCH = 80


class Expression:
    """An `IDimensionExpr` that is known."""

    def __init__(self, value):
        self.value = value

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value


class Builder:
    """An `IExprBuilder`."""

    def constant(self, value):
        return Expression(value)

    def operation(self, operation, a, b):
        known = {
            "SUM": operator.add,
            "SUB": operator.sub,
            "PROD": operator.mul,
            "FLOOR_DIV": operator.floordiv,
        }
        return Expression((known | {"MIN": min, "MAX": max})[operation.name](a.value, b.value))


class Description:
    """A `DynamicPluginTensorDesc`."""

    def __init__(self, dims, dtype, layout):
        self.desc = SimpleNamespace(dims=dims, type=dtype, format=layout, scale=1.0)


class Registry:
    """TensorRT's register of plugins."""

    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[namespace, creator.name] = creator
        return True

    def get_creator(self, name, version, namespace):
        return self.creators.get((namespace, name))


@pytest.fixture(scope="module")
def tensorrt():
    """A module `tensorrt` whose `plugin` is that of the bindings."""
    rtx = pytest.importorskip("tensorrt_rtx")
    bindings = importlib.util.find_spec("tensorrt_bindings")
    if bindings is None:
        pytest.skip("needs tensorrt-cu13-bindings, which installs without a GPU")
    registry = Registry()
    absent = ["IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick", "QuickPluginCreationRequest", "ISymExpr"]
    module = ModuleType("tensorrt")
    module.__path__ = [str(Path(bindings.origin).parent)]
    module.__spec__ = ModuleSpec("tensorrt", None, is_package=True)  # which torch looks for
    module.__dict__.update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    module.__dict__.update({name: type(name, (), {}) for name in absent})
    module.__dict__.update(
        __version__="11.1",
        ITensor=torch.Tensor,
        IDimensionExpr=Expression,
        DimsExprs=lambda length: [None] * length,
        DynamicPluginTensorDesc=Description,
        get_plugin_registry=lambda: registry,
    )
    ours = ("modes_fx.aot.tensorrt_plugins", "modes_fx.aot.tensorrt_engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        yield module
        for name in [*sys.modules]:
            if name.startswith("tensorrt.") or name in ours:
                del sys.modules[name]


@pytest.fixture(scope="module")
def plugins(tensorrt):
    return importlib.import_module("modes_fx.aot.tensorrt_plugins")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """For few tokens and for many, with biases; nothing here looks into the PTX."""
    sizes = {"hidden": (32,), "scores": (4,), "weights": (4,), "experts": (4,), "modality": ()}
    sizes |= {"gate_up": (8, 32, 32), "down": (8, 16, 32), "gate_up_bias": (8, 32), "down_bias": (8, 32)}
    dtypes = {"scores": "float32", "experts": "int32", "modality": "int32"}
    tensors = {name: (dtypes.get(name, "float16"), shape) for name, shape in sizes.items()}
    flags = {"activation": "silu(gate) * up", "interleaved": False, "is_transposed": True}
    flags |= {"weights_on_input": False, "renormalise": True}
    kinds = {"decode": Kind(tensors, flags, 16, True), "prefill": Kind(tensors, flags, 4096, True)}
    folder = tmp_path_factory.mktemp("bundle")
    metadata = SimpleNamespace(name="the_entry", num_warps=8, shared=1234)
    compiled = SimpleNamespace(asm={"ptx": "// the code"}, metadata=metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_bundle, "compile_launch", lambda *_: compiled)
        kernel_bundle.compile_chains(folder, kinds.values(), (ARCH,))
    programs = {name: (("layer", kind.digest()),) for name, kind in kinds.items()}
    return dataclasses.replace(kernel_bundle.Bundle.read(folder), programs=programs)


@pytest.fixture(scope="module")
def registered(plugins, bundle):
    plugins.register(bundle, ARCH)
    plugins.register(bundle, ARCH)  # again changes nothing
    return bundle


def run_plugin(tensorrt, step, inputs):
    """Everything TensorRT asks of a plugin, in its order: outputs' (dtype, shape), launch, sizes, kernel."""
    known = tensorrt.plugin._lib.QDP_REGISTRY[f"modes_fx::{step.plugin}"]
    plugin = tensorrt.plugin._plugin_class._TemplateAOTPlugin(step.plugin, "modes_fx", known.num_outputs)
    plugin.init(known.register_func, {}, known.aot_impl_attr_names, known.aot_impl_func, [], None)
    plugin.set_tactic(0)
    dtypes = plugin.get_output_data_types([dtype for dtype, _ in inputs], [len(shape) for _, shape in inputs])
    expressions = [[Expression(size) for size in shape] for _, shape in inputs]
    found = plugin.get_output_shapes(expressions, [], Builder())
    shapes = [tuple(each.value for each in shape) for shape in found]
    linear = tensorrt.TensorFormat.LINEAR
    described = [Description(shape, dtype, linear) for dtype, shape in inputs]
    described += [Description(shape, dtype, linear) for dtype, shape in zip(dtypes, shapes, strict=True)]
    launch = SimpleNamespace()
    sizes = _Sizes()
    plugin.get_launch_params(expressions, described, len(inputs), launch, sizes, Builder())
    chosen = [each.desc for each in described]
    kernel = plugin.get_kernel(chosen[: len(inputs)], chosen[len(inputs) :])
    return list(zip(dtypes, shapes, strict=True)), launch, sizes.values, kernel


class _Sizes:
    nbSymExprs = 0

    def __init__(self):
        self.values = []

    def __setitem__(self, index, size):
        assert size.dtype.name == "INT32" and index == len(self.values) < self.nbSymExprs
        self.values.append(size.expr.value)


@pytest.mark.parametrize(("program", "tokens"), [("decode", (1, 5, 16)), ("prefill", (1, 5, 130, 4096))])
def test_tensorrt_reads_the_table_as_it_is_meant(tensorrt, plugins, registered, program, tokens):
    ((_, chain),) = registered.programs[program]
    kind = registered.kinds[chain]
    for num_tokens in tokens:
        fixed = ("gate_up", "down", "gate_up_bias", "down_bias")
        tensors = {"thresholds": (tensorrt.float32, (4,))}
        for name, (dtype, shape) in kind.tensors.items():
            tensors[name] = plugins.DTYPES[dtype], shape if name in fixed else (num_tokens, *shape)
        for step in registered.chains[chain]:
            given = [tensors[name] for name in step.inputs.values()]
            outputs, launch, sizes, (entry, ptx) = run_plugin(tensorrt, step, given)
            kernel = step.kernels[ARCH]
            grid = [evaluate(size, num_tokens) for size in kernel.grid]
            blocks = [x.expr.value for x in (launch.grid_x, launch.grid_y, launch.grid_z)]
            assert blocks == grid + [1] * (3 - len(grid))
            assert launch.block_x.expr.value == kernel.num_warps * 32
            assert launch.block_y.expr.value == launch.block_z.expr.value == 1
            assert launch.shared_mem.expr.value == kernel.shared
            assert sizes == [evaluate(size, num_tokens) for size in step.sizes.values()]
            assert (entry, ptx) == (kernel.entry, (registered.folder / kernel.file).read_bytes())
            for buffer, found in zip(step.outputs.values(), outputs, strict=True):
                shape = tuple(evaluate(size, num_tokens) for size in buffer.shape)
                assert found == (plugins.DTYPES[buffer.dtype], shape)
                tensors[buffer.name] = found
        (result,) = outputs
        assert result == (tensorrt.float16, (num_tokens, 32))


class Network:
    """An `INetworkDefinition` that notes what is added; its tensors are of torch."""

    def __init__(self):
        self.read = []

    def add_plugin(self, create, aot):
        assert aot
        given, _, _ = create
        self.read.append(given)
        outputs = [torch.empty(0) for _ in range(9)]
        self.last = outputs[0]
        return SimpleNamespace(get_output=outputs.__getitem__)

    def add_shuffle(self, tensor):
        layer = SimpleNamespace(get_output=lambda _: tensor.reshape(layer.reshape_dims))
        return layer


@pytest.fixture
def network(tensorrt, registered, monkeypatch):
    monkeypatch.setattr(tensorrt.plugin._lib.PluginDef, "__call__", lambda self, *given: (given, [], self))
    return Network()


def test_a_chain_links_what_is_written_to_what_is_read(plugins, registered, network):
    ((_, chain),) = registered.programs["prefill"]
    tensors = {name: torch.empty(0) for name in (*registered.kinds[chain].tensors, "thresholds")}
    result = plugins.add_chain(network, registered.chains[chain], tensors)
    assert result is network.last
    names = {id(tensor): name for name, tensor in tensors.items()}
    read = [[names.get(id(tensor), "written") for tensor in given] for given in network.read]
    steps = registered.chains[chain]
    assert read == [[n if n in tensors else "written" for n in step.inputs.values()] for step in steps]


def test_the_converter_adds_the_chain_of_its_layer(
    plugins, registered, network, make_problem, small, monkeypatch
):
    """Against stand-ins for the five names of torch-tensorrt that it uses."""
    conversion, utilities = ModuleType("conversion"), ModuleType("converter_utils")
    found = {}
    conversion.ConverterPriority = SimpleNamespace(HIGH="high")
    conversion.dynamo_tensorrt_converter = lambda op, **options: lambda f: found.update({op: f, **options})
    utilities.get_trt_tensor = lambda ctx, value, name: value
    utilities.cast_trt_tensor = lambda ctx, value, dtype, name, target: value.to(torch.int32)
    package = "torch_tensorrt.dynamo.conversion"
    for name, module in ((package, conversion), (f"{package}.converter_utils", utilities)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("torch_tensorrt", "torch_tensorrt.dynamo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    plugins.add_converter(registered, "decode")
    assert found["supports_dynamic_shapes"] and found["priority"] == "high"
    problem = make_problem(small, bias=True)
    problem["modality"] = problem["modality"].reshape(3, -1)
    call = Call(**problem, layer="layer")
    arguments = {name: value for name, value in vars(call).items()}
    args = [arguments.pop(name) for name in kernel_bundle.TENSORS]
    context = SimpleNamespace(net=network)
    convert = found[torch.ops.modes_fx.masked_moe.default]
    assert convert(context, "op", args, arguments, "node") is network.last
    gate_up, _ = network.read
    scores, weights, experts, modality = gate_up[1:5]
    assert scores is call.scores and weights is call.weights
    assert experts.dtype == modality.dtype == torch.int32
    assert torch.equal(experts, call.experts.int())
    assert torch.equal(modality, problem["modality"].flatten().int())


def test_operands_are_laid_out_as_the_kernels_read_them(plugins, make_problem, small):
    call = Call(**make_problem(small))
    found = plugins.operands(call)
    assert found["gate_up"].shape == call.gate_up.transpose(1, 2).shape and found["gate_up"].is_contiguous()
    assert found["thresholds"].tolist() == pytest.approx(
        [call.alpha_text, call.alpha_vision, call.tau_text, call.tau_vision]
    )
    assert "gate_up_bias" not in found


def test_what_is_missing_is_named(plugins, registered):
    with pytest.raises(ExportError, match=r"pip install torch-tensorrt==2\.\d+\.0"):
        plugins.add_converter(registered, "prefill")


def test_kernels_that_are_not_there(plugins, registered):
    with pytest.raises(
        ExportError, match=r"kernels for architectures 80, not for 90; export with .*\(80, 90\)"
    ):
        plugins.register(registered, 90)
