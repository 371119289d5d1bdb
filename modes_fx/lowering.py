"""From Dynamo's graph to compiled code: functional aten for the passes, then Inductor as it always runs.

Inductor decomposes while AOTAutograd traces, and a pass after that would have to match the pieces. So
AOTAutograd is run without decompositions, the passes see whole operators, and the rewritten graph is traced
once more with Inductor's decompositions.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode, dispatch_functionalize
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from modes_fx.kernels.masked_moe import Call, masked_moe

# Takes its arguments as one list, which it may empty (it says so with `_boxed_call`); returns its outputs.
Compiled = Callable[[list[Any]], Sequence[Any]]
# Edits the aten graph in place; returns what wraps the compiled graph, to feed and take what the edit added.
Rewrite = Callable[[GraphModule], Callable[[Compiled], Compiled]]


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    lowering: str,
    rewrite: Rewrite | None = None,
    profile_digest: str = "",
) -> Callable[..., Any]:
    """Compile one Dynamo graph, for inference.

    Args:
        gm: As Dynamo gives it.
        inputs: The real example inputs.
        lowering: "inductor" or "eager".
        rewrite: Applied to the functional aten graph; None to compile the graph as it is.
        profile_digest: What `rewrite` depends on besides its own source, for Inductor's cache key.
    """
    # Dynamo and Inductor load Triton and take seconds, so only who compiles imports them.
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import compile_fx as inductor

    # A no_grad in the model ends by switching gradients on again, where the caller has them on.
    for node in gm.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled):
        gm.graph.erase_node(node)
    gm.recompile()
    if rewrite is None:
        if lowering == "eager":
            return torch.no_grad()(gm.forward)
        return inductor.compile_fx(gm, list(inputs))  # type: ignore[return-value]
    num_outputs = inductor.get_num_model_outputs(gm)
    extra = inductor.create_compiler_config_extra(gm)

    def lower(aten_gm: GraphModule, fake_inputs: Sequence[Any]) -> Compiled:
        wrap = rewrite(aten_gm)
        placeholders = [node for node in aten_gm.graph.nodes if node.op == "placeholder"]
        fake_inputs = [*fake_inputs, *(node.meta["val"] for node in placeholders[len(fake_inputs) :])]
        if lowering == "eager":
            return wrap(make_boxed_func(aten_gm))
        decomposed = decompose(aten_gm, fake_inputs)
        with cache_key(profile_digest):
            compiled = inductor.compile_fx_forward(
                decomposed,
                fake_inputs,
                num_orig_model_outputs=num_outputs,
                num_example_inputs=len(inputs),
                compiler_config_extra=extra,
                is_inference=True,
            )
        return wrap(compiled)

    with _inductor_context(inputs):
        return aot_autograd(
            fw_compiler=lower,
            inference_compiler=lower,
            decompositions={},
            keep_inference_input_mutations=True,
        )(gm, list(inputs))


def cache_key(profile_digest: str) -> contextlib.AbstractContextManager[Any]:
    """Make profile, passes and kernels part of Inductor's cache key, beside the user's tag."""
    config = torch.compiler.config
    tag = f"modes_fx passes {source_digest()} profile {profile_digest}"
    whole = " ".join(filter(None, [config.cache_key_tag, tag]))
    return config.patch(cache_key_tag=whole)  # type: ignore[attr-defined,no-any-return]


@functools.cache
def source_digest() -> str:
    """sha256 over the files of passes/ and kernels/."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for pattern in ("passes/*.py", "kernels/*.py", "kernels/native/*.*"):
        for path in sorted(root.glob(pattern)):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def decompose(gm: GraphModule, fake_inputs: Sequence[Any]) -> GraphModule:
    """Trace a rewritten graph again, with Inductor's decompositions; plain functions become operators.

    `masked_moe` on a GPU becomes its launches, see `masked_moe_traced`.
    """
    from torch._inductor.decomposition import select_decomp_table

    mode = detect_fake_mode(fake_inputs) or contextlib.nullcontext()
    table = {**select_decomp_table(), masked_moe: _functional_launches}
    with mode, preserve_node_meta():
        return make_fx(Interpreter(gm).run, decomposition_table=table)(*fake_inputs)


def _functional_launches(*args: Any, **kwargs: Any) -> Any:
    if not args[0].is_cuda:
        return NotImplemented
    return dispatch_functionalize(_launches)(*args, **kwargs)


def _launches(*args: Any, **kwargs: Any) -> Tensor:
    from modes_fx.kernels._masked_moe_triton import masked_moe_traced

    call = Call(*args, **kwargs)
    # Sizes may be symbols; what is checked about them becomes a guard.
    call.check()
    return masked_moe_traced(call)


def _trace_launches(mode: Any, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """The same where AOTAutograd meets the operator: AOTInductor on a program from `modes_fx.rewrite`."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    # An exported program keeps the operator: it is the same program for every device. And tensors of a
    # subclass, say distributed ones, have no place in a launch.
    is_plain = set(types) <= {Tensor, FakeTensor, FunctionalTensor}
    if not (args[0].is_cuda and is_plain) or custom_triton_ops_decomposition_disabled():
        return mode.__torch_dispatch__(op, types, args, kwargs)
    with mode:
        return _launches(*args, **(kwargs or {}))


_library = torch.library.Library("modes_fx", "FRAGMENT")
torch.library.register_torch_dispatch(
    "modes_fx::masked_moe", FunctionalTensorMode, _trace_launches, lib=_library
)


@contextlib.contextmanager
def _inductor_context(inputs: Sequence[Any]) -> Iterator[None]:
    """What Inductor's own entry point sets up around AOTAutograd."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo import compiled_autograd
    from torch._inductor.virtualized import V

    mode = detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)
    context = torch._guards.TracingContext.try_get() or torch._guards.TracingContext(mode)
    with (
        enable_python_dispatcher(),
        V.set_fake_mode(mode),
        torch._guards.tracing(context),
        compiled_autograd._disable(),
    ):
        yield
