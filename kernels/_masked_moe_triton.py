"""Triton lowering of `modes_fx::masked_moe`: dropped pairs are neither gathered, multiplied nor summed.

    dispatch    threshold -> scan -> place      kept pairs, grouped by expert, in `order`
    experts     gate_up (formula fused) -> down (routing weight fused)
    combine     per token, its kept slots in slot order

Nothing waits for the host: the number of kept pairs stays on the device, grids have the size of the static
bound, and a program without rows returns. The order of every sum is fixed (no atomics), so equal inputs give
equal bits. Uninitialised memory is never read: rows of dropped pairs are neither written nor loaded.

Letters: T tokens, K slots, P = T * K pairs (pair p is slot p % K of token p // K), E experts, H hidden size,
I intermediate size, N rows of gate_up (2I, or I without a gate), H_out width of the result, C chunks of
tokens. A position is an index into `order`, R of them are filled.
"""

# Triton gives annotations of a kernel's parameters a meaning; shapes and dtypes stand in comments instead.
# mypy: disable-error-code="no-untyped-def"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from modes_fx.kernels._gate_formula_triton import compile_formula
from modes_fx.kernels.masked_moe import Call


class Tile(NamedTuple):
    """How one program of an expert kernel works: `rows x columns` of its result, `reduction` a step."""

    rows: int
    columns: int
    reduction: int
    num_warps: int
    num_stages: int


# Chosen to fit sm_80, sm_90 and sm_100 without spills (tests/numerics/test_masked_moe_aot.py); none has been
# timed, since no GPU was at hand. A tile that replaces one of these names the shape and the GPU it won on.
FEW_ROWS, MANY_ROWS = Tile(16, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3)
# Exact float32 products run outside the tensor cores and hold their operands in registers.
FEW_ROWS_F32, MANY_ROWS_F32 = Tile(16, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)

CHUNK_PAIRS = 128  # pairs of one dispatch program
BLOCK_E = 32  # experts counted at a time


def choose_tile(dtype: torch.dtype, num_pairs: int, num_experts: int, *sizes: int) -> Tile:
    """The tile for a call, from what the host knows without asking the device. `sizes`: H, I and H_out."""
    # Odd sizes, which no published model has, cannot be copied 16 bytes at a time; their loads go through
    # registers, and the larger tile would spill.
    few = num_pairs <= 16 * num_experts or any(size % 16 for size in sizes)
    if dtype == torch.float32:
        return FEW_ROWS_F32 if few else MANY_ROWS_F32
    return FEW_ROWS if few else MANY_ROWS


def max_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """The most tiles that any routing needs: each expert with a pair may leave one tile partly empty."""
    return min(num_pairs, (num_pairs + min(num_experts, num_pairs) * (rows - 1)) // rows)


@triton.jit(do_not_specialize=["num_tokens"])
def _threshold_kernel(
    scores,  # [T, K]
    weights,  # [T, K]
    experts,  # [T, K]
    modality,  # [T] or None
    keys,  # out [P], int32: the expert of a kept pair, -1 of a dropped one
    scales,  # out [P], float32: the weight of a kept pair; unset where dropped
    counts,  # out [C, E], int32: kept pairs of a chunk
    num_tokens,
    alpha_text,
    alpha_vision,
    tau_text,
    tau_vision,
    K: tl.constexpr,
    E: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    token = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.arange(0, BLOCK_K)
    inside = (token < num_tokens)[:, None] & (slot < K)[None, :]
    pair = token[:, None] * K + slot[None, :]

    # Scalars arrive as double from Inductor and the interpreter; the contract compares in float32.
    score = tl.load(scores + pair, mask=inside, other=0).to(tl.float32)
    # `not (a < b)`, not `a >= b`: a score that is NaN stays, as in the reference.
    keep = (score * tl.full((), alpha_text, tl.float32) < tl.full((), tau_text, tl.float32)) == 0
    if modality is not None:
        kind = tl.load(modality + token, mask=token < num_tokens, other=0)[:, None]
        below = score * tl.full((), alpha_vision, tl.float32) < tl.full((), tau_vision, tl.float32)
        keep = ((kind == 0) & keep) | ((kind == 1) & (below == 0)) | (kind > 1)
    keep = keep & inside

    weight = tl.load(weights + pair, mask=inside, other=0).to(tl.float32)
    if RENORMALISE:
        mass = tl.sum(tl.where(keep, weight, 0.0), axis=1)
        ratio = tl.where(mass > 0, tl.sum(weight, axis=1) / tl.where(mass > 0, mass, 1.0), 1.0)
        weight = weight * ratio[:, None]
    expert = tl.load(experts + pair, mask=inside, other=-1).to(tl.int32)
    # An index outside the experts must not become an address.
    key = tl.where(keep & (expert >= 0) & (expert < E), expert, -1)
    tl.store(keys + pair, key, mask=inside)
    tl.store(scales + pair, weight, mask=keep)

    flat = tl.reshape(key, (BLOCK_T * BLOCK_K,))
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        num = tl.sum((flat[:, None] == e[None, :]).to(tl.int32), axis=0)
        tl.store(counts + chunk * E + e, num, mask=e < E)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_kernel(
    counts,  # [C, E], int32
    before,  # out [C, E], int32: kept pairs of the expert in earlier chunks
    totals,  # out [E], int32: kept pairs of the expert
    num_chunks,
    E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    running = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, num_chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        inside = (chunk < num_chunks)[:, None] & (e < E)[None, :]
        at = chunk.to(tl.int64)[:, None] * E + e[None, :]
        num = tl.load(counts + at, mask=inside, other=0)
        # Not in place: a thread may hold a copy of an element that another thread stores.
        tl.store(before + at, running[None, :] + tl.cumsum(num, axis=0) - num, mask=inside)
        running += tl.sum(num, axis=0)
    tl.store(totals + e, running, mask=e < E)


@triton.jit(do_not_specialize=["num_pairs"])
def _place_kernel(
    keys,  # [P], int32
    before,  # [C, E], int32
    totals,  # [E], int32
    order,  # out [R of P], int32: kept pairs by expert, then by pair; unset past R
    num_pairs,
    E: tl.constexpr,
    CHUNK: tl.constexpr,  # pairs in a chunk
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK_P)
    pair = chunk * CHUNK + offset
    inside = (offset < CHUNK) & (pair < num_pairs)
    key = tl.load(keys + pair, mask=inside, other=-1)
    position = tl.zeros((BLOCK_P,), dtype=tl.int32)
    start = tl.zeros((), dtype=tl.int32)
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        total = tl.load(totals + e, mask=e < E, other=0)
        earlier = tl.load(before + chunk * E + e, mask=e < E, other=0)
        base = start + tl.cumsum(total, axis=0) - total + earlier
        mine = (key[:, None] == e[None, :]).to(tl.int32)
        position += tl.sum(mine * (base[None, :] + tl.cumsum(mine, axis=0) - 1), axis=1)
        start += tl.sum(total, axis=0)
    tl.store(order + position.to(tl.int64), pair.to(tl.int32), mask=key >= 0)


@triton.jit
def _find_tile(
    totals,  # [E], int32
    tile,
    E: tl.constexpr,
    POW2_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The expert of a tile (at least E if there is none), its first position, and its rows, at most BLOCK_M.

    Tiles are numbered over the experts, each expert starting a new one, so no tile mixes two experts.
    """
    e = tl.arange(0, POW2_E)
    total = tl.load(totals + e, mask=e < E, other=0)
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    row = (tile - tl.sum(tl.where(e < expert, tiles, 0), axis=0)) * BLOCK_M
    position = tl.sum(tl.where(e < expert, total, 0), axis=0) + row
    num_rows = tl.sum(tl.where(e == expert, total, 0), axis=0) - row
    return expert, position, num_rows


@triton.jit
def _gate_up_kernel(
    hidden,  # [T, H]
    gate_up,  # [E, N, H] in any strides
    bias,  # [E, N] or None
    scales,  # [P], float32, or None: what multiplies the rows of hidden
    order,  # [R of P], int32
    totals,  # [E], int32
    out,  # out [R of P, I]: the formula's value by position; unset past R
    stride_hidden_t,
    stride_hidden_h,
    stride_gate_up_e,
    stride_gate_up_i,
    stride_gate_up_h,
    stride_bias_e,
    stride_bias_i,
    K: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    FORMULA: tl.constexpr,  # what `compile_formula` returns
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    POW2_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    NUM_N: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // NUM_N
    expert, position, num_rows = _find_tile(totals, tile, E, POW2_E, BLOCK_M)
    if expert >= E:
        return
    m = tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % NUM_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    at = position.to(tl.int64) + m
    pair = tl.load(order + at, mask=m < num_rows, other=0)
    token = (pair // K).to(tl.int64)
    # Without a gate, `first` is all there is.
    first_i = n.to(tl.int64)
    second_i = first_i + I
    if INTERLEAVED:
        first_i = 2 * first_i
        second_i = first_i + 1

    rows = hidden + token[:, None] * stride_hidden_t  # [BLOCK_M, 1]
    columns = gate_up + expert.to(tl.int64) * stride_gate_up_e  # scalar
    firsts = columns + first_i[None, :] * stride_gate_up_i  # [1, BLOCK_N]
    seconds = columns + second_i[None, :] * stride_gate_up_i  # [1, BLOCK_N]
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, H, BLOCK_R):
        h = (start + r).to(tl.int64)
        x = tl.load(
            rows + h[None, :] * stride_hidden_h,
            mask=(m < num_rows)[:, None] & (h < H)[None, :],
            other=0,
        )
        inside = (h < H)[:, None] & (n < I)[None, :]
        w = tl.load(firsts + h[:, None] * stride_gate_up_h, mask=inside, other=0)
        first = tl.dot(x, w, first, input_precision=PRECISION)
        if GATED:
            w = tl.load(seconds + h[:, None] * stride_gate_up_h, mask=inside, other=0)
            second = tl.dot(x, w, second, input_precision=PRECISION)
    if scales is not None:
        # What multiplies a row multiplies its products; here it costs nothing in the loop.
        scale = tl.load(scales + pair, mask=m < num_rows, other=0)[:, None]
        first *= scale
        second *= scale
    if bias is not None:
        biases = bias + expert.to(tl.int64) * stride_bias_e
        first += tl.load(biases + first_i * stride_bias_i, mask=n < I, other=0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(biases + second_i * stride_bias_i, mask=n < I, other=0).to(tl.float32)[None, :]
    y = FORMULA(first, second) if GATED else FORMULA(first)
    tl.store(
        out + at[:, None] * I + n[None, :],
        y.to(out.dtype.element_ty),
        mask=(m < num_rows)[:, None] & (n < I)[None, :],
    )


@triton.jit
def _down_kernel(
    inner,  # [R of P, I] by position
    down,  # [E, H_out, I] in any strides
    bias,  # [E, H_out] or None
    scales,  # [P], float32, or None: what multiplies the results
    order,  # [R of P], int32
    totals,  # [E], int32
    out,  # out [P, H_out]: the expert's weighted result by pair; unset where dropped
    stride_down_e,
    stride_down_h,
    stride_down_i,
    stride_bias_e,
    stride_bias_h,
    E: tl.constexpr,
    H_OUT: tl.constexpr,
    I: tl.constexpr,
    PRECISION: tl.constexpr,
    POW2_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    NUM_N: tl.constexpr = (H_OUT + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // NUM_N
    expert, position, num_rows = _find_tile(totals, tile, E, POW2_E, BLOCK_M)
    if expert >= E:
        return
    m = tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % NUM_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    at = position.to(tl.int64) + m
    pair = tl.load(order + at, mask=m < num_rows, other=0).to(tl.int64)

    rows = inner + at[:, None] * I  # [BLOCK_M, 1]
    h = n.to(tl.int64)
    columns = down + expert.to(tl.int64) * stride_down_e + h[None, :] * stride_down_h  # [1, BLOCK_N]
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, I, BLOCK_R):
        i = (first + r).to(tl.int64)
        x = tl.load(rows + i[None, :], mask=(m < num_rows)[:, None] & (i < I)[None, :], other=0)
        w = tl.load(
            columns + i[:, None] * stride_down_i,
            mask=(i < I)[:, None] & (n < H_OUT)[None, :],
            other=0,
        )
        y = tl.dot(x, w, y, input_precision=PRECISION)
    if bias is not None:
        biases = bias + expert.to(tl.int64) * stride_bias_e
        y += tl.load(biases + h * stride_bias_h, mask=n < H_OUT, other=0).to(tl.float32)[None, :]
    if scales is not None:
        y *= tl.load(scales + pair, mask=m < num_rows, other=0)[:, None]
    tl.store(
        out + pair[:, None] * H_OUT + n[None, :],
        y.to(out.dtype.element_ty),
        mask=(m < num_rows)[:, None] & (n < H_OUT)[None, :],
    )


@triton.jit
def _combine_kernel(
    rows,  # [P, H_out] by pair
    keys,  # [P], int32
    out,  # out [T, H_out]
    K: tl.constexpr,
    H_OUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    y = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for slot in range(0, K):
        pair = token * K + slot
        # A mask, not a product with zero: the row of a dropped pair is uninitialised and may hold NaN. It is
        # made from integers because the interpreter's broadcast of a boolean scalar is not boolean.
        end = tl.where(tl.load(keys + pair) >= 0, H_OUT, 0)
        y += tl.load(rows + pair * H_OUT + h, mask=h < end, other=0).to(tl.float32)
    tl.store(out + token * H_OUT + h, y.to(out.dtype.element_ty), mask=h < H_OUT)


class Dispatch(NamedTuple):
    """Where the kept pairs are; all on the device, int32 but for `scales`, which is float32."""

    keys: Tensor  # [P]
    scales: Tensor  # [P]
    order: Tensor  # [P], the first R filled
    totals: Tensor  # [E]


def dispatch(
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    modality: Tensor | None,
    num_experts: int,
    alpha_text: float,
    alpha_vision: float,
    tau_text: float,
    tau_vision: float,
    renormalise: bool,
) -> Dispatch:
    """Group the kept pairs by expert. `scores`, `weights`, `experts`: `[T, K]`; `modality`: `[T]` or None."""
    num_tokens, num_slots = scores.shape
    block_k = triton.next_power_of_2(num_slots)
    block_t = max(1, CHUNK_PAIRS // block_k)
    num_chunks = triton.cdiv(num_tokens, block_t)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": scores.device}
    keys = torch.empty(num_tokens * num_slots, **ints)
    scales = torch.empty(num_tokens * num_slots, dtype=torch.float32, device=scores.device)
    order = torch.empty(num_tokens * num_slots, **ints)
    counts = torch.empty(num_chunks, num_experts, **ints)
    before = torch.empty(num_chunks, num_experts, **ints)
    totals = torch.empty(num_experts, **ints)
    _threshold_kernel[(num_chunks,)](
        scores.contiguous(),
        weights.contiguous(),
        experts.contiguous(),
        None if modality is None else modality.contiguous(),
        keys,
        scales,
        counts,
        num_tokens,
        alpha_text,
        alpha_vision,
        tau_text,
        tau_vision,
        K=num_slots,
        E=num_experts,
        RENORMALISE=renormalise,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_E=BLOCK_E,
    )
    _scan_kernel[(triton.cdiv(num_experts, BLOCK_E),)](
        counts, before, totals, num_chunks, E=num_experts, BLOCK_C=64, BLOCK_E=BLOCK_E
    )
    _place_kernel[(num_chunks,)](
        keys,
        before,
        totals,
        order,
        num_tokens * num_slots,
        E=num_experts,
        CHUNK=block_t * num_slots,
        BLOCK_P=block_t * block_k,
        BLOCK_E=BLOCK_E,
    )
    return Dispatch(keys, scales, order, totals)


def masked_moe_triton(call: Call) -> Tensor:
    """The result of `masked_moe.reference`; float16, bfloat16 or float32.

    The expert weights are read where they lie, in any strides. Products accumulate in float32; the input of
    `down` and the weighted output of each pair are rounded to the dtype of `hidden`. An index outside of
    `[0, E)` drops its pair. Does not wait for the device.
    """
    hidden, gate_up, down, formula = call.hidden, call.gate_up, call.down, call.formula
    gate_up_bias, down_bias = call.gate_up_bias, call.down_bias
    num_tokens, hidden_size = hidden.shape
    intermediate_size, output_size = call.intermediate_size, call.output_size
    num_slots = call.scores.shape[-1]
    num_pairs = num_tokens * num_slots
    num_experts = gate_up.shape[0]
    out = hidden.new_empty(num_tokens, output_size)
    if num_pairs == 0:
        return out.zero_()
    # Logical order is [E, N, H] and [E, H_out, I] whatever the layout; only the strides differ.
    if call.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    sizes = hidden_size, intermediate_size, output_size
    tile = choose_tile(hidden.dtype, num_pairs, num_experts, *sizes)
    num_tiles = max_tiles(num_pairs, num_experts, tile.rows)
    common = {
        "E": num_experts,
        "I": intermediate_size,
        # TF32 would keep 10 bits of a float32; torch does not use it unless asked either.
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "POW2_E": triton.next_power_of_2(num_experts),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_R": tile.reduction,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(hidden):
        pairs = dispatch(
            call.scores,
            call.weights,
            call.experts,
            None if call.modality is None else call.modality.reshape(-1),
            num_experts,
            call.alpha_text,
            call.alpha_vision,
            call.tau_text,
            call.tau_vision,
            call.renormalise,
        )
        inner = hidden.new_empty(num_pairs, intermediate_size)
        _gate_up_kernel[(num_tiles * triton.cdiv(intermediate_size, tile.columns),)](
            hidden,
            gate_up,
            gate_up_bias,
            pairs.scales if call.weights_on_input else None,
            pairs.order,
            pairs.totals,
            inner,
            *hidden.stride(),
            *gate_up.stride(),
            *((0, 0) if gate_up_bias is None else gate_up_bias.stride()),
            K=num_slots,
            H=hidden_size,
            FORMULA=compile_formula(formula),
            GATED=formula.is_gated,
            INTERLEAVED=call.interleaved and formula.is_gated,
            **common,
        )
        rows = hidden.new_empty(num_pairs, output_size)
        _down_kernel[(num_tiles * triton.cdiv(output_size, tile.columns),)](
            inner,
            down,
            down_bias,
            None if call.weights_on_input else pairs.scales,
            pairs.order,
            pairs.totals,
            rows,
            *down.stride(),
            *((0, 0) if down_bias is None else down_bias.stride()),
            H_OUT=output_size,
            **common,
        )
        block_h = min(1024, triton.next_power_of_2(output_size))
        _combine_kernel[(num_tokens, triton.cdiv(output_size, block_h))](
            rows, pairs.keys, out, K=num_slots, H_OUT=output_size, BLOCK_H=block_h
        )
    return out
