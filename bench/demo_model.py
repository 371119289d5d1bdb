"""The demo model in training: transformers' own modules, called through a cheaper route.

The weights live in an unedited `Qwen3VLMoeForConditionalGeneration`. Training differs from its `forward` only
in speed: all pictures of one size go through the vision tower as one batch, tokens are sorted by expert so
that each expert is one matrix product, and one row asks several questions about its picture (demo_rows.py).
Logits agree with the plain forward to 4e-6, and the exported model is always measured by the plain forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import rotate_half
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from modes_fx.demo.text import END, IMAGE, MERGE, PAD, PATCH, VIDEO, VISION_END, VISION_START


def build_config(vocab_size: int) -> Qwen3VLMoeConfig:
    """The demo's architecture: 6 MoE layers of 32 experts (8 active), vision depth 3, 3.4 M parameters."""
    text = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=32,
        num_experts=32,
        num_experts_per_tok=8,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        router_aux_loss_coef=0.01,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
    )
    vision = dict(
        depth=3,
        hidden_size=96,
        num_heads=3,
        intermediate_size=256,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        out_hidden_size=128,
        num_position_embeddings=144,
        deepstack_visual_indexes=[1],
    )
    return Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )


class SortedExperts(torch.autograd.Function):
    """`sum_k w[t, k] * down[e] @ (silu(gate[e] @ x) * up[e] @ x)`, by expert e = index[t, k]."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        tokens, slots = index.shape
        order = torch.argsort(index.flatten())
        edges = [0, *torch.bincount(index.flatten(), minlength=gate_up.shape[0]).cumsum(0).tolist()]
        spans = list(enumerate(pairwise(edges)))
        rows = order // slots
        xs = x[rows]
        hidden = x.new_empty(len(order), gate_up.shape[1])
        ys = x.new_empty(len(order), x.shape[1])
        for e, (a, b) in spans:
            torch.mm(xs[a:b], gate_up[e].t(), out=hidden[a:b])
        gate, up = hidden.chunk(2, dim=-1)
        act = F.silu(gate)
        inner = act * up
        for e, (a, b) in spans:
            torch.mm(inner[a:b], down[e].t(), out=ys[a:b])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        out = torch.bmm(weight.unsqueeze(1), ys[place].view(tokens, slots, -1)).squeeze(1)
        ctx.save_for_backward(weight, gate_up, down, order, rows, place, xs, hidden, act, inner, ys)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, gate_up, down, order, rows, place, xs, hidden, act, inner, ys = ctx.saved_tensors
        tokens, slots = weight.shape
        gate, up = hidden.chunk(2, dim=-1)
        grad_rows = grad[rows]
        grad_weight = (grad_rows * ys).sum(-1)[place].view(tokens, slots)
        grad_ys = grad_rows.mul_(weight.flatten()[order].unsqueeze(1))
        grad_inner = torch.empty_like(inner)
        grad_down = torch.empty_like(down)
        grad_gate_up = torch.empty_like(gate_up)
        grad_xs = torch.empty_like(xs)
        for e, (a, b) in ctx.spans:
            torch.mm(grad_ys[a:b], down[e], out=grad_inner[a:b])
            torch.mm(grad_ys[a:b].t(), inner[a:b], out=grad_down[e])
        sigmoid = torch.sigmoid(gate)
        grad_gate = grad_inner * up * (sigmoid + act * (1 - sigmoid))
        grad_hidden = torch.cat([grad_gate, grad_inner * act], dim=-1)
        for e, (a, b) in ctx.spans:
            torch.mm(grad_hidden[a:b], gate_up[e], out=grad_xs[a:b])
            torch.mm(grad_hidden[a:b].t(), xs[a:b], out=grad_gate_up[e])
        grad_x = grad_xs[place].view(tokens, slots, -1).sum(1)
        return grad_x, None, grad_weight, grad_gate_up, grad_down


def sorted_experts(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    return SortedExperts.apply(
        hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj
    )


def new_model(vocab_size: int) -> Qwen3VLMoeForConditionalGeneration:
    """A freshly initialised fp32 model on the sorted experts; seed torch first."""
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model = Qwen3VLMoeForConditionalGeneration(build_config(vocab_size))
    model.set_experts_implementation("sorted")
    for layer in model.model.language_model.layers:
        experts = layer.mlp.experts
        nn.init.normal_(experts.gate_up_proj, std=experts.hidden_dim**-0.5)
        nn.init.normal_(experts.down_proj, std=experts.intermediate_dim**-0.5 / 2)
    return model.train()


@dataclass
class Routing:
    """What the routers did in one forward: per layer `(logits [T, E], weights [T, K], index [T, K])`."""

    layers: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def balance_loss(self, real: Tensor) -> Tensor:
        """Switch loss, mean over layers: 1 is perfectly even; `real [T]` leaves out pads."""
        losses = []
        count = real.sum()
        for logits, _, index in self.layers:
            experts, slots = logits.shape[1], index.shape[1]
            used = torch.zeros(experts).index_add_(0, index[real].flatten(), torch.ones(int(count) * slots))
            mass = (logits.softmax(-1) * real.unsqueeze(1)).sum(0) / count
            losses.append(experts * (used / (count * slots) * mass).sum())
        return torch.stack(losses).mean()

    def peak_loss(self, real: Tensor, hinge: float) -> Tensor:
        """Mean over tokens and layers of `relu(sum_k w_k^2 - hinge)`; the sum is 1/K if flat."""
        return torch.stack(
            [F.relu(w[real].square().sum(-1) - hinge).mean() for _, w, _ in self.layers]
        ).mean()


def watch_routers(model: Qwen3VLMoeForConditionalGeneration) -> Routing:
    """Record every router's output of the forwards to come; clear `layers` before each."""
    routing = Routing()
    for layer in model.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: routing.layers.append(out))
    return routing


class VisionGrid:
    """Constants of the vision tower for one picture size, in its merge-block patch order."""

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration, side: int) -> None:
        tower = model.model.visual
        grid = torch.tensor([[1, side // PATCH, side // PATCH]])
        self.index, self.weight = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=MERGE,
        )
        cos, sin = tower.rotary_pos_emb(self.weight, get_vision_position_ids(grid, MERGE))
        self.cos, self.sin = cos, sin  # [patches, head_dim]


def vision_features(
    model: Qwen3VLMoeForConditionalGeneration, pixels: Tensor, grid: VisionGrid
) -> tuple[Tensor, Tensor]:
    """Picture tokens and the deepstack features of layer 0, each `[B * patches / 4, 128]`.

    `pixels` is `[B, patches, 3 * 8 * 8]`: one of the two equal time frames, so both kernels are summed.
    """
    tower = model.model.visual
    batch, patches, _ = pixels.shape
    kernel = tower.patch_embed.proj.weight.sum(2).flatten(1)
    x = F.linear(pixels, kernel, tower.patch_embed.proj.bias)
    x = x + (tower.pos_embed(grid.index) * grid.weight[:, :, None]).sum(1)
    deep = None
    for number, block in enumerate(tower.blocks):
        heads = block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x)).view(batch, patches, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # [B, heads, patches, head_dim]
        q = q * grid.cos + rotate_half(q) * grid.sin
        k = k * grid.cos + rotate_half(k) * grid.sin
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, patches, -1)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp(block.norm2(x))
        if number in tower.deepstack_visual_indexes:
            deep = tower.deepstack_merger_list[0](x.flatten(0, 1))
    assert deep is not None
    return tower.merger(x.flatten(0, 1)), deep
