"""One block alone, router and experts, in any combination of the traits that families have; and its graph.

A model takes seconds to trace, a block a twentieth of one, so that tests can go through hundreds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from modes_fx.profile import Layer, Profile, fingerprint

# What an expert computes between its products, by name: of the halves, or of the whole product.
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu by tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu, up first": lambda gate, up: up * F.relu(gate),
    "tanh": lambda gate, up: torch.tanh(gate) * up,
    "limits": lambda gate, up: F.silu(gate.clamp(max=7.0)) * up.clamp(-7.0, 7.0),
    "gpt-oss": lambda gate, up: (
        (up.clamp(-7.0, 7.0) + 1) * gate.clamp(max=7.0) * torch.sigmoid(gate.clamp(max=7.0) * 1.702)
    ),
    "softcaps": lambda gate, up: F.silu(7 * torch.tanh(gate / 7)) * (7 * torch.tanh(up / 7)),
    "in float32": lambda gate, up: (F.silu(gate.float()) * up.float()).to(gate.dtype),
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu squared": lambda x: torch.square(F.relu(x)),
    "gelu of all": F.gelu,
}


@dataclass(frozen=True)
class Traits:
    """What a block is like.

    Attributes:
        implementation: "grouped_mm" or "batched_mm" of transformers, or "dense": every expert on every token,
            with a weight of zero where it was not chosen.
        score: "softmax", "sigmoid", or "chosen" for a softmax over the chosen logits.
        choice_bias: Added to the scores for the choice alone.
        groups: The choice is limited to half of so many groups of experts; 1 for none.
        renormalise: Not at all, or divided by the sum: "plain", "eps" or "clamp".
        factor: Multiplies the weights.
        per_expert_scale: A learned factor of each expert multiplies its weights.
        is_sorted: `sorted=` of the top-k.
        gate: A key of `GATED` or `UNGATED`.
        weights_on_input: Of a dense block.
        shared: Adds a shared expert.
    """

    num_experts: int = 8
    top_k: int = 3
    hidden: int = 16
    intermediate: int = 8
    dtype: torch.dtype = torch.float32
    implementation: str = "grouped_mm"
    score: str = "softmax"
    choice_bias: bool = False
    groups: int = 1
    renormalise: str | None = "plain"
    factor: float = 1.0
    per_expert_scale: bool = False
    is_sorted: bool = True
    gate: str = "silu"
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    weights_on_input: bool = False
    shared: bool = False
    seed: int = 0

    @property
    def has_gate(self) -> bool:
        return self.gate in GATED


class SmallBlock(nn.Module):
    """Maps `[T, H]` to `[T, H]`. The attributes without a docstring are those that transformers asks for."""

    def __init__(self, traits: Traits) -> None:
        super().__init__()
        self.traits = t = traits
        g = torch.Generator().manual_seed(t.seed)

        def parameter(*shape: int, std: float = 1.0) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=g) * std).to(t.dtype), requires_grad=False)

        rows = t.intermediate * (2 if t.has_gate else 1)
        first, second = (rows, t.hidden), (t.hidden, t.intermediate)
        if t.transposed:
            first, second = first[::-1], second[::-1]
        self.router = parameter(t.num_experts, t.hidden, std=t.hidden**-0.5)
        self.choice_bias = parameter(t.num_experts, std=0.3).float() if t.choice_bias else None
        self.scale = nn.Parameter(parameter(t.num_experts).exp(), False) if t.per_expert_scale else None
        up, down = parameter(t.num_experts, *first), parameter(t.num_experts, *second)
        up.data *= t.hidden**-0.5
        down.data *= t.intermediate**-0.5
        up_bias = parameter(t.num_experts, rows) if t.biased else None
        setattr(self, "gate_up_proj" if t.has_gate else "up_proj", up)
        setattr(self, "gate_up_proj_bias" if t.has_gate else "up_proj_bias", up_bias)
        self.down_proj = down
        self.down_proj_bias = parameter(t.num_experts, t.hidden) if t.biased else None
        self.shared = parameter(t.hidden, t.hidden, std=t.hidden**-0.5) if t.shared else None
        self.num_experts, self.has_gate, self.has_bias = t.num_experts, t.has_gate, t.biased
        self.is_transposed, self.has_post_expert_norm, self._is_expert_parallel = t.transposed, False, False

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        return self.finish(x, self.run_experts(x, experts, weights))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, `[T, K]` each."""
        t = self.traits
        logits = F.linear(x, self.router)
        if t.score == "chosen":
            values, experts = logits.topk(t.top_k, sorted=t.is_sorted)
            weights = values.softmax(-1, dtype=torch.float32)
        else:
            scores = logits.float().sigmoid() if t.score == "sigmoid" else logits.softmax(-1, torch.float32)
            choice = scores if self.choice_bias is None else scores + self.choice_bias
            if t.groups > 1:
                best = choice.view(-1, t.groups, t.num_experts // t.groups).amax(-1)
                groups = best.topk(math.ceil(t.groups / 2), sorted=False).indices
                allowed = (
                    torch.zeros_like(best)
                    .scatter_(1, groups, 1)
                    .repeat_interleave(t.num_experts // t.groups, dim=1)
                )
                choice = choice.masked_fill(allowed == 0, -math.inf)
            values, experts = choice.topk(t.top_k, dim=-1, sorted=t.is_sorted)
            weights = values if choice is scores else scores.gather(1, experts)
        if t.renormalise is not None:
            total = weights.sum(-1, keepdim=True)
            total = total + 1e-20 if t.renormalise == "eps" else total
            weights = weights / (total.clamp(min=1e-12) if t.renormalise == "clamp" else total)
        if t.factor != 1:
            weights = weights * t.factor
        if self.scale is not None:
            weights = weights * self.scale[experts]
        return weights.to(x.dtype), experts

    def run_experts(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """The routed experts, `[T, H]`, by the implementation."""
        from transformers.integrations import moe

        if self.traits.implementation == "dense":
            return self._dense(
                x, weights.new_zeros(x.shape[0], self.num_experts).scatter(1, experts, weights)
            )
        run = {
            "grouped_mm": moe.grouped_mm_experts_forward,
            "batched_mm": moe.batched_mm_experts_forward,
        }[self.traits.implementation]
        with mock.patch.object(moe, "_can_use_grouped_mm", _grouped_mm_under_dynamo):
            return run(self, x, experts, weights)

    def finish(self, x: Tensor, routed: Tensor) -> Tensor:
        """With the shared expert, where there is one."""
        return routed if self.shared is None else routed + F.linear(x, self.shared)

    def act_fn(self, x: Tensor) -> Tensor:
        return UNGATED[self.traits.gate](x)

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = (y[..., ::2], y[..., 1::2]) if self.traits.interleaved else y.chunk(2, dim=-1)
        return GATED[self.traits.gate](gate, up)

    def between(self, y: Tensor) -> Tensor:
        """What an expert computes between its products."""
        return self._apply_gate(y) if self.has_gate else self.act_fn(y)

    def first_product(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[E, H, rows]`, whatever the layout, and bias."""
        name = "gate_up_proj" if self.has_gate else "up_proj"
        return self._upright(getattr(self, name)), getattr(self, f"{name}_bias")

    def second_product(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[E, I, H]`, whatever the layout, and bias."""
        return self._upright(self.down_proj), self.down_proj_bias

    def _upright(self, weight: Tensor) -> Tensor:
        return weight if self.is_transposed else weight.transpose(1, 2)

    def _dense(self, x: Tensor, weights: Tensor) -> Tensor:
        # As Llama 4 does it; and as transformers 4 did it for some others, with the weights on the output.
        column = weights.t().reshape(-1, 1)
        rows = x.repeat(self.num_experts, 1)
        rows = rows * column if self.traits.weights_on_input else rows
        up, down = self.first_product()[0], self.second_product()[0]
        y = torch.bmm(self.between(torch.bmm(rows.view(self.num_experts, -1, x.shape[1]), up)), down)
        if not self.traits.weights_on_input:
            y = y * column.view(self.num_experts, -1, 1)
        return y.sum(dim=0)


def _grouped_mm_under_dynamo(x: Tensor, weight: Tensor, offs: Tensor) -> bool:
    """When transformers compiles to torch's grouped product, which also wants strides of 16 bytes."""
    strides = (x.stride(0), *sorted(weight.stride())[1:])
    return weight.dtype == torch.bfloat16 and all(2 * stride % 16 == 0 for stride in strides)


def trace_block(block: nn.Module, x: Tensor, dynamic: bool = False) -> tuple[GraphModule, list[Any]]:
    """The functional aten graph of a block, as AOTAutograd makes it, and the real tensors behind its inputs.

    Args:
        x: `[T, H]`; T is symbolic where `dynamic`.
    """
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    named = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC, DimDynamic.STATIC]
    fake = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.block(x),)

    def call(*inputs: Tensor) -> tuple[Tensor]:
        *parameters, x = inputs
        return (torch.func.functional_call(block, dict(zip(named, parameters, strict=True)), (x,)),)

    with torch.no_grad():
        if dynamic:
            traced, _ = aot_export_module(Returns(), (fake,), trace_joint=False, decompositions={})
        else:
            fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in named.values()]
            traced = make_fx(dispatch_functionalize(call))(*fakes, fake)
    gm = cast(GraphModule, traced)
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, [*named.values(), x]


def block_profile(block: SmallBlock, **constants: Any) -> Profile:
    """A profile of the block alone, without visual or special tokens unless given.

    Args:
        constants: Of the layer (alpha_text, alpha_vision, weight_scale) and of the profile.
    """
    layer = {k: constants.pop(k) for k in ("alpha_text", "alpha_vision", "weight_scale") if k in constants}
    t = block.traits
    return Profile(
        layers=(
            Layer(
                name="block",
                num_experts=t.num_experts,
                top_k=t.top_k,
                fingerprint=fingerprint(block.router),
                **{"alpha_text": 1.0, "alpha_vision": 1.0, **layer},
            ),
        ),
        vocab_size=32,
        hidden_size=t.hidden,
        **{
            "tau_text": 0.2,
            "tau_vision": 0.2,
            "visual_token_ids": (),
            "special_token_ids": (),
            **constants,
        },
    )
