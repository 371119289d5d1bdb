"""CPU lowering of `modes_fx::masked_moe`: only kept pairs are gathered, multiplied and summed."""

import torch
from torch import Tensor

from modes_fx.kernels.masked_moe import expert_forward


def masked_moe_cpu(
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    keep: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    is_transposed: bool,
) -> Tensor:
    """Kept pairs, grouped by expert, one GEMM pair for each expert that has rows.

    Compaction comes first: everything after `nonzero` has as many rows as there are kept pairs, so work and
    memory traffic fall with the skip rate, and an expert without kept pairs is never read.

    Args:
        hidden: `[T, H]`.
        weights: Weights of kept pairs, `[T, K]`; the values at dropped pairs are not read.
        experts: `[T, K]`, int64.
        keep: `[T, K]`, bool.
        gate_up, down, gate_up_bias, down_bias, activation, interleaved, is_transposed: See `reference`.
    Returns:
        `[T, H]`, the dtype of `hidden`. The order of summation is fixed, so equal inputs give equal bits.
    """
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    kept = keep.reshape(-1).nonzero().squeeze(-1)
    if kept.numel() == 0:
        return out
    ids, order = experts.reshape(-1)[kept].sort(stable=True)
    kept = kept[order]
    tokens = kept // experts.shape[-1]
    rows = hidden[tokens]
    scale = weights.reshape(-1)[kept].unsqueeze(-1)
    hit, counts = torch.unique_consecutive(ids, return_counts=True)
    outputs = [
        expert_forward(
            x,
            gate_up[e],
            down[e],
            None if gate_up_bias is None else gate_up_bias[e],
            None if down_bias is None else down_bias[e],
            activation,
            interleaved,
            is_transposed,
        )
        for e, x in zip(hit.tolist(), rows.split(counts.tolist()), strict=True)
    ]
    y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out.index_add_(0, tokens, (y * scale).to(hidden.dtype))
