"""The lowering of `modes_fx::masked_moe` on torch operators: for what no native kernel takes.

Only kept pairs are gathered, multiplied and summed, and experts without kept pairs are not read.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from modes_fx.kernels.masked_moe import Call, kept_weights


def masked_moe_torch(call: Call) -> Tensor:
    """Kept pairs, grouped by expert, through two grouped products.

    Compaction comes first: everything after `nonzero` has as many rows as there are kept pairs, so work and
    memory traffic fall with the skip rate, and an expert without kept pairs is never read.

    Returns:
        `[T, H_out]`, the dtype of `hidden`. The order of summation is fixed, so equal inputs give equal bits.
    """
    hidden = call.hidden
    # An index outside of the experts drops its pair, as in the other lowerings.
    keep = call.keep() & (call.experts >= 0) & (call.experts < call.down.shape[0])
    # A token's slots add up in float32, as in a reduction of the model's own.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = hidden.new_zeros(hidden.shape[0], call.output_size, dtype=wide)
    kept = keep.reshape(-1).nonzero().squeeze(-1)
    if kept.numel() == 0:
        return out.to(hidden.dtype)
    ids, order = call.experts.reshape(-1)[kept].sort(stable=True)
    kept = kept[order]
    tokens = kept // keep.shape[-1]
    weights = kept_weights(call.weights, keep, call.renormalise).reshape(-1)[kept].unsqueeze(-1)
    gate_up, down = call.gate_up, call.down
    if not call.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    x = hidden[tokens]
    if call.weights_on_input:
        x = (x * weights).to(hidden.dtype)
    y = _grouped_product(x, gate_up, ids)
    if call.gate_up_bias is not None:
        y += call.gate_up_bias[ids]
    y = _grouped_product(call.formula.evaluate(y, call.interleaved), down, ids)
    if call.down_bias is not None:
        y += call.down_bias[ids]
    if not call.weights_on_input:
        y = y * weights
    return out.index_add_(0, tokens, y.to(wide)).to(hidden.dtype)


def _grouped_product(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """`rows[i] @ weights[ids[i]]` for sorted `ids`: `[P, A], [E, A, B], [P] -> [P, B]`.

    torch's grouped product costs one small call for each expert, with rows or without; with few rows, as in
    decode, going through the experts that have some is quicker (`bench/grouped_product.py`).
    """
    num_experts = weights.shape[0]
    if 2 * rows.shape[0] > num_experts and _grouped_mm_takes(rows, weights):
        return _grouped_mm(rows, weights, ids)
    return _loop(rows, weights, ids)


def _grouped_mm(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    offsets = torch.bincount(ids, minlength=weights.shape[0]).cumsum(0).to(torch.int32)
    return F.grouped_mm(rows, weights, offs=offsets)


def _loop(rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = rows.new_empty(rows.shape[0], weights.shape[-1])
    hit, counts = torch.unique_consecutive(ids, return_counts=True)
    start = 0
    for expert, count in zip(hit.tolist(), counts.tolist(), strict=True):
        torch.mm(rows[start : start + count], weights[expert], out=out[start : start + count])
        start += count
    return out


def _grouped_mm_takes(rows: Tensor, weights: Tensor) -> bool:
    """torch's grouped product wants float32, float16 or bfloat16 and strides of a multiple of 16 bytes."""
    strides = (rows.stride(0), *sorted(weights.stride())[1:])
    return rows.dtype in (torch.float32, torch.float16, torch.bfloat16) and all(
        stride * rows.element_size() % 16 == 0 for stride in strides
    )
