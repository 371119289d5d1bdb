"""The Triton lowering as Inductor sees it: its launches in the graph, and in the code that Inductor writes.

On fake CUDA tensors, with a GPU that is described and not there. Triton must not interpret, which it decides
once per process, so a child process does the work: this file, run as a script.
"""

import ast
import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from modes_fx.kernels import _masked_moe_triton as lowering
from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.lowering import decompose

H, I, E, K = 64, 32, 16, 4
ARCH = 90
FEW = ["_decode_gate_up_kernel", "_decode_down_kernel"]
MANY = ["_threshold_kernel", "_scan_kernel", "_place_kernel", "_gate_up_kernel", "_down_kernel"]
MANY += ["_combine_kernel"]


def fake_inputs(num_tokens: Any, bias: bool) -> list[Tensor | None]:
    def empty(*shape: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    T = num_tokens
    return [
        empty(T, H),
        empty(T, K, dtype=torch.float32),
        empty(T, K),
        empty(T, K, dtype=torch.int64),
        empty(T, dtype=torch.uint8),
        empty(E, 2 * I, H),
        empty(E, H, I),
        empty(E, 2 * I) if bias else None,
        empty(E, H) if bias else None,
    ]


def block(inputs: list[Tensor | None], activation: str) -> GraphModule:
    """A graph with something before and after the experts."""
    graph = Graph()
    hidden, *others = [graph.placeholder(f"a{n}") if x is not None else None for n, x in enumerate(inputs)]
    flags = {"alpha_text": 0.5, "alpha_vision": 0.3, "tau_text": 0.1, "tau_vision": 0.2}
    x = graph.call_function(torch.ops.aten.relu.default, (hidden,))
    y = graph.call_function(masked_moe, (x, *others), {**flags, "activation": activation})
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (y, hidden)),))
    return GraphModule(torch.nn.Module(), graph)


def launches(gm: GraphModule) -> list[dict[str, Any]]:
    """The launches in a functional graph."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    found = []
    for node in gm.graph.find_nodes(op="call_function", target=triton_kernel_wrapper_functional):
        kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        grid = [str(size.meta["val"]) if hasattr(size, "meta") else size for size in node.kwargs["grid"][0]]
        written = node.kwargs["tensors_to_clone"]
        found.append({"kernel": kernel.fn.__name__, "grid": grid, "written": written})
    return found


def static(num_tokens: int, bias: bool = False, activation: str = "silu(gate) * up") -> dict[str, Any]:
    """Launches of a block, and of the code that Inductor writes for it: launches, copies, formulas."""
    with FakeTensorMode() as mode:
        inputs = fake_inputs(num_tokens, bias)
        given = [x for x in inputs if x is not None]
        gm = decompose(block(inputs, activation), given)
        result: dict[str, Any] = {"launches": launches(gm)}
        code = inductor_code(gm, given, mode)
    with tempfile.TemporaryDirectory() as folder:
        result["compiled"] = compile_written(code, Path(folder)) if num_tokens <= 16 else []
    result["runs"] = re.findall(r"^ +(\w+)\.run\(", code, re.MULTILINE)
    # Not in comments, which name files, in whatever folder they lie.
    statements = re.sub(r"#.*", "", code)
    result["copies"] = len(re.findall(r"copy_|clone", statements))
    return result | {"formulas": re.findall(r"^def formula\(.*\n(?:    .*\n)+", code, re.MULTILINE)}


def symbolic() -> dict[str, Any]:
    """The same with a symbolic number of tokens, for one trace of each path."""
    result: dict[str, Any] = {}
    for hint in (8, 100):
        shapes = ShapeEnv()
        symbol = shapes.create_symbol(hint, ConstantSource("T"), dynamic_dim=DimDynamic.DYNAMIC)
        num_tokens = shapes.create_symintnode(symbol, hint=hint)
        with FakeTensorMode(shape_env=shapes):
            inputs = fake_inputs(num_tokens, False)
            gm = decompose(block(inputs, "silu(gate) * up"), [x for x in inputs if x is not None])
        guards = [str(guard.expr).replace(str(symbol), "T") for guard in shapes.guards]
        found = json.loads(json.dumps(launches(gm)).replace(str(symbol), "T"))
        result[str(hint)] = {"launches": found, "guards": guards}
    return result


def through_aot_autograd() -> list[dict[str, Any]]:
    """What AOTAutograd makes of the operator, as in AOTInductor."""
    with FakeTensorMode():
        inputs = fake_inputs(8, False)
        gm = block(inputs, "silu(gate) * up")
        return launches(make_fx(dispatch_functionalize(gm))(*(x for x in inputs if x is not None)))


def inductor_code(gm: GraphModule, inputs: list[Tensor], mode: FakeTensorMode) -> str:
    """The Python that Inductor writes for a graph after `decompose`, without running it."""
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(mode), DebugContext():
        post_grad_passes(gm, is_inference=True)
        graph = GraphLowering(gm, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            code: str = graph.codegen()[0].value
    return code


def compile_written(code: str, folder: Path) -> list[str]:
    """Compile our kernels in Inductor's code for `ARCH`, from their source there; which compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = []
    for name, written in re.findall(r"async_compile\.triton\('(_\w+)', '''(.*?)'''", code, re.DOTALL):
        description = re.search(r"triton_meta=(.*?),\n *filename", written, re.DOTALL)
        assert description is not None
        # A literal but for the description of the device.
        meta = ast.literal_eval(re.sub(r"DeviceProperties\(.*?\)", "None", description[1]))
        file = folder / f"{name}.py"
        kernel_source = written[written.index("@triton.jit") :]
        file.write_text(f"import triton\nimport triton.language as tl\n{kernel_source}")
        function = runpy.run_path(str(file))[name]
        source = ASTSource(function, meta["signature"], meta["constants"], meta["configs"][0])
        compiled.append(triton.compile(source, target=GPUTarget("cuda", ARCH, 32)).metadata.name)
    return compiled


@contextlib.contextmanager
def described_gpu() -> Iterator[None]:
    """Answers to what Inductor and Triton ask about a GPU: one as of sm_90."""
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCH, 32)

    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=ARCH,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
    }
    triton.runtime.driver.set_active(Driver())
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(f"torch.cuda.{name}", lambda *_, answer=answer: answer))
        create = "torch._inductor.runtime.hints.DeviceProperties.create"
        stack.enter_context(patch(create, lambda _: properties))
        stack.enter_context(patch.object(lowering, "architecture", lambda _: ARCH))
        yield


def trace_all() -> dict[str, Any]:
    with described_gpu():
        return {
            "few": static(8),
            "many": static(100),
            "bias": static(100, bias=True, activation="up * gelu(gate)"),
            "symbolic": symbolic(),
            "aot": through_aot_autograd(),
        }


@pytest.fixture(scope="module")
def traced():
    child = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def kernels(found):
    return [launch["kernel"] for launch in found]


def test_the_graph_holds_the_launches(traced):
    assert kernels(traced["few"]["launches"]) == FEW
    assert kernels(traced["many"]["launches"]) == MANY
    assert kernels(traced["bias"]["launches"]) == MANY


def test_a_launch_writes_its_results_and_nothing_else(traced):
    """What Inductor believes is written to, it may copy; experts' weights above all must not be."""
    results = ["inner", "count", "listed", "rows", "shares"]
    assert [launch["written"] for launch in traced["few"]["launches"]] == [results, ["out"]]
    many = [["keys", "scales", "counts"], ["before", "totals"], ["order"], ["out"], ["out"], ["out"]]
    assert [launch["written"] for launch in traced["many"]["launches"]] == many
    assert [launch["written"] for launch in traced["bias"]["launches"]] == many


def test_inductor_writes_the_launches_and_no_copies(traced):
    for case, names in (("few", FEW), ("many", MANY), ("bias", MANY)):
        runs = [re.sub(r"_\d+$", "", run) for run in traced[case]["runs"]]
        assert [run for run in runs if not run.startswith("triton_")] == names
        # The relu before and the addition after.
        assert len(runs) == len(names) + 2
        assert traced[case]["copies"] == 0


def test_what_inductor_writes_compiles(traced):
    assert traced["few"]["compiled"] == FEW


def test_inductor_copies_the_formula_into_the_code(traced):
    (silu,), (gelu,) = traced["many"]["formulas"], traced["bias"]["formulas"]
    assert "tl.sigmoid(gate)" in silu
    assert "tl.erf(gate" in gelu


def test_grids_follow_a_symbolic_number_of_tokens(traced):
    few, many = traced["symbolic"]["8"], traced["symbolic"]["100"]
    assert kernels(few["launches"]) == FEW
    assert few["guards"] == ["T <= 16"]
    assert few["launches"][0]["grid"] == ["4*T", 2, 1]
    assert kernels(many["launches"]) == MANY
    assert many["guards"] == ["T > 16", "4*T <= 8192"]
    assert many["launches"][0]["grid"] == ["((T + 31)//32)", 1, 1]
    assert many["launches"][5]["grid"] == ["T", 1, 1]


def test_aot_autograd_sees_the_launches(traced):
    assert kernels(traced["aot"]) == FEW


if __name__ == "__main__":
    print(json.dumps(trace_all()))
