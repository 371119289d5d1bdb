"""Experts that really leave dropped pairs out, so that measuring many policies takes less time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from modes_fx.blocks import Block, find_blocks
from modes_fx.kernels.masked_moe import masked_moe

_NAME = "modes_fx_bench_kept"
# Weights that a rule has set to zero lie below it, all others above.
_LEAST = 1e-30


def leave_out_dropped(model: nn.Module) -> None:
    """Run the model's experts through `modes_fx::masked_moe`, which does no work for a weight of zero.

    With gradients they run as transformers' `grouped_mm`, for the op has none.

    Raises:
        ValueError: The two differ, as they may for experts of another form.
    """
    ExpertsInterface.register(_NAME, _experts_forward)
    for block in find_blocks(model):
        _compare(block)
        config: Any = block.experts.config
        config._experts_implementation = _NAME


def _experts_forward(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    run = grouped_mm_experts_forward if torch.is_grad_enabled() else _kept
    out: Tensor = run(experts, hidden, index, weights)
    return out


def _kept(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    parameters = (experts.gate_up_proj, experts.down_proj)
    constants = {"alpha_text": 1.0, "alpha_vision": 1.0, "tau_text": _LEAST, "tau_vision": _LEAST}
    out: Tensor = masked_moe(hidden, weights, weights, index, None, *parameters, None, None, **constants)
    return out


@torch.no_grad()
def _compare(block: Block) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, block.router_weight.shape[1], generator=generator)
    index = torch.rand(64, block.num_experts, generator=generator).topk(block.top_k).indices
    weights = torch.rand(64, block.top_k, generator=generator)
    weights[weights < 0.5] = 0
    ours, theirs = (run(block.experts, hidden, index, weights) for run in (_kept, grouped_mm_experts_forward))
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        error = float((ours - theirs).abs().max())
        raise ValueError(f"The experts of {block.name} differ from modes_fx::masked_moe by {error:.2g}.")
