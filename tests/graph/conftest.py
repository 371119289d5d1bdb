"""The functional aten graphs of the tiny model, traced once a session and copied, and of single blocks."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import Graph, GraphModule, Node

from modes_fx.kernels import _masked_moe_native
from modes_fx.kernels.rows_modality import row_keys
from modes_fx.passes.find_blocks import find_blocks
from modes_fx.passes.provide_modality import TABLE_KEYS, TABLE_MODALITY
from modes_fx.passes.unit import Unit
from modes_fx.profile import Profile
from modes_fx.testing import VOCABULARY, tiny_inputs, tiny_profile, tiny_qwen3_vl_moe
from modes_fx.testing.small_block import SmallBlock, Traits, trace_block

aten = torch.ops.aten


class Traced(NamedTuple):
    """One graph as the passes get it, and the real inputs behind its placeholders."""

    gm: GraphModule
    inputs: list[Any]

    @property
    def graph(self) -> Graph:
        return self.gm.graph

    def copy(self) -> "Traced":
        return Traced(GraphModule(self.gm, copy.deepcopy(self.gm.graph)), self.inputs)

    def unit(self, profile: Profile, **known: Any) -> Unit:
        return Unit(profile, list(self.inputs), **known)

    def count(self, *targets: Any) -> int:
        return len(self.all(*targets))

    def all(self, *targets: Any) -> list[Node]:
        return [node for node in self.graph.nodes if node.target in targets]

    def block(self, index: int = 0) -> Any:
        return find_blocks(self.graph)[index]

    def input_of_shape(self, *shape: int) -> int:
        """Index of the input that is no parameter and has this shape."""
        return next(
            i
            for i, value in enumerate(self.inputs)
            if not isinstance(value, nn.Parameter) and tuple(getattr(value, "shape", ())) == shape
        )

    def real(self, placeholder: Node) -> Any:
        return self.inputs[[n for n in self.graph.nodes if n.op == "placeholder"].index(placeholder)]


def traced_graphs(
    function: Callable[..., Any], *, dynamic: bool | None = None, **inputs: Any
) -> list[Traced]:
    graphs: list[Traced] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        real = list(example_inputs)

        def keep(aten_gm: GraphModule, _: Any) -> Any:
            graphs.append(Traced(aten_gm, real))
            return make_boxed_func(aten_gm.forward)

        return aot_autograd(
            fw_compiler=keep, inference_compiler=keep, decompositions={}, keep_inference_input_mutations=True
        )(gm, real)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(**inputs)
    return graphs


def only(graphs: list[Traced]) -> Traced:
    assert len(graphs) == 1
    return graphs[0]


@pytest.fixture(autouse=True)
def no_kernel_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewritten graphs run on torch operators: each wrong formula would be a native kernel, seconds to build.

    What the native kernels compute is for tests/numerics and tests/e2e.
    """
    monkeypatch.setattr(_masked_moe_native, "add_kernel", lambda activation, dtype: False)


@pytest.fixture(scope="session")
def trace() -> Callable[..., list[Traced]]:
    """`trace(function, dynamic=None, **inputs)`: its aten graphs, in the order of their compilation."""
    return traced_graphs


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_qwen3_vl_moe()


@pytest.fixture(scope="session")
def profile(model: Any) -> Profile:
    return tiny_profile(model)


@pytest.fixture(scope="session")
def input_ids() -> torch.Tensor:
    return tiny_inputs()["input_ids"]


@pytest.fixture(scope="session")
def _prefill(model: Any, input_ids: torch.Tensor) -> Traced:
    return only(traced_graphs(model.get_decoder().forward, input_ids=input_ids))


@pytest.fixture
def prefill(_prefill: Traced) -> Traced:
    """The decoder, called with token ids: embedding and all three blocks in one graph."""
    return _prefill.copy()


@pytest.fixture(scope="session")
def _embedded(model: Any, input_ids: torch.Tensor) -> Traced:
    def logits(embeds: torch.Tensor) -> Any:
        return model.lm_head(model.get_decoder()(inputs_embeds=embeds).last_hidden_state)

    embeds = model.get_input_embeddings()(input_ids).detach()
    return only(traced_graphs(logits, embeds=embeds))


@pytest.fixture
def embedded(_embedded: Traced) -> Traced:
    """The decoder and the output head, called with embedded tokens: no token ids in the graph."""
    return _embedded.copy()


@pytest.fixture(scope="session")
def _dynamic(model: Any, input_ids: torch.Tensor) -> Traced:
    return only(traced_graphs(model.get_decoder().forward, dynamic=True, input_ids=input_ids))


@pytest.fixture
def dynamic(_dynamic: Traced) -> Traced:
    """`prefill` with symbolic sizes."""
    return _dynamic.copy()


@pytest.fixture(scope="session")
def _decode(model: Any, input_ids: torch.Tensor) -> Traced:
    decoder = model.get_decoder()
    with torch.no_grad():
        cache = decoder(input_ids=input_ids, use_cache=True).past_key_values
    step = {"input_ids": input_ids[:, :1], "past_key_values": cache, "use_cache": True}
    return only(traced_graphs(decoder.forward, **step))


@pytest.fixture
def decode(_decode: Traced) -> Traced:
    """One token after a cache."""
    return _decode.copy()


@pytest.fixture(scope="session")
def _bfloat16(input_ids: torch.Tensor) -> Traced:
    model = tiny_qwen3_vl_moe(dtype=torch.bfloat16)
    return only(traced_graphs(model.get_decoder().forward, input_ids=input_ids))


@pytest.fixture
def bfloat16(_bfloat16: Traced) -> Traced:
    """`prefill` of the same model in bfloat16."""
    return _bfloat16.copy()


@pytest.fixture
def table_shape() -> tuple[int, int]:
    """Of the token embedding and of the output head."""
    return VOCABULARY, 32


@pytest.fixture(scope="session")
def row_table() -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """`row_table(x)`: inputs that tell modality by the rows of embedded tokens; every other is vision."""

    def tell(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        keys = row_keys(rows).unique()
        return {TABLE_KEYS: keys, TABLE_MODALITY: (torch.arange(len(keys)) % 2).to(torch.uint8)}

    return tell


class Small(NamedTuple):
    """One block alone: the module, its graph, and the input it was traced with."""

    block: SmallBlock
    traced: Traced
    x: torch.Tensor

    def run(self, *extra: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.traced.gm(*self.traced.inputs, *extra)[0]


@pytest.fixture(scope="session")
def small() -> Callable[..., Small]:
    """`small(tokens=9, scale=1.0, dynamic=False, **traits)`; `scale` multiplies the expert weights."""
    graphs: dict[Any, Small] = {}

    def make(tokens: int = 9, *, scale: float = 1.0, dynamic: bool = False, **traits: Any) -> Small:
        key = (tokens, scale, dynamic, Traits(**traits))
        if key not in graphs:
            block = SmallBlock(Traits(**traits))
            for name, parameter in block.named_parameters():
                if name.endswith("_proj"):
                    parameter.data *= scale
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, block.traits.hidden, generator=generator).to(block.traits.dtype)
            graphs[key] = Small(block, Traced(*trace_block(block, x, dynamic)), x)
        found = graphs[key]
        return found._replace(traced=found.traced.copy())

    return make
