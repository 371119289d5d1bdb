"""The experts for few tokens, in two launches: gate_up (which also thresholds), down (which also combines).

Few tokens are a matter of bytes: each kept expert's weights are read once, and nothing else is big. So
nothing is sorted. A program of the first launch stands for a pair and a block of weight rows; it thresholds
all pairs itself, leaves if its pair is dropped or another pair with its expert comes first, and else computes
the block for all tokens with that expert. The program of the first block also lists the expert for the second
launch, where a program owns some columns of the result: it goes through the listed experts, adds up in
float32, and writes every token once.

Letters as in `_masked_moe_triton`. L is the number of listed experts, at most P.
"""

# Triton gives annotations of a kernel's parameters a meaning; shapes and dtypes stand in comments instead.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from modes_fx.kernels._gate_formula_triton import compile_formula
from modes_fx.kernels._masked_moe_triton_dispatch import is_kept
from modes_fx.kernels._masked_moe_triton_experts import split_rows
from modes_fx.kernels.gate_formula import SILU, parse

# The most that a call may have. A program looks at all pairs at once; tokens are the columns of its products.
MAX_TOKENS = 16
MAX_PAIRS = 128

# What the kernel below calls; `with_formula` gives it another one.
formula = compile_formula(parse(SILU))


@triton.jit(do_not_specialize=["num_pairs"])
def _decode_gate_up_kernel(
    hidden,  # [T, H]
    scores,  # [T, K]
    weights,  # [T, K]
    experts,  # [T, K]
    modality,  # [T] or None
    gate_up,  # [E, N, H] in any strides
    bias,  # [E, N] or None
    inner,  # out [P, I]: the formula's weighted value, at the first pair of a token with an expert
    count,  # out [1], int32: L
    listed,  # out [L of P], int32: the experts with a kept pair, by their first pairs
    rows,  # out [L of P, MAX_TOKENS], int32: where in inner a token's value for an expert is; -1: nowhere
    shares,  # out [L of P, MAX_TOKENS], float32: what multiplies an expert's bias of down for a token
    stride_hidden_t,
    stride_hidden_h,
    stride_gate_up_e,
    stride_gate_up_i,
    stride_gate_up_h,
    stride_bias_e,
    stride_bias_i,
    num_pairs,
    alpha_text,
    alpha_vision,
    tau_text,
    tau_vision,
    K: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ON_INPUT: tl.constexpr,  # the weights multiply hidden
    RENORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    MAX_PAIRS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    mine = tl.program_id(0)
    block = tl.program_id(1)
    my_kind = tl.zeros_like(mine)
    if modality is not None:
        my_kind += tl.load(modality + mine // K)
    is_mine_kept = is_kept(tl.load(scores + mine), my_kind, alpha_text, alpha_vision, tau_text, tau_vision)
    # The first program says how many experts are listed, whatever becomes of its pair.
    if (is_mine_kept == 0) & (mine + block > 0):
        return

    pair = tl.arange(0, MAX_PAIRS)
    is_pair = pair < num_pairs
    score = tl.load(scores + pair, mask=is_pair, other=0)
    kind = tl.zeros_like(pair)
    if modality is not None:
        kind += tl.load(modality + pair // K, mask=is_pair, other=0)
    keep = is_kept(score, kind, alpha_text, alpha_vision, tau_text, tau_vision) & is_pair
    expert = tl.load(experts + pair, mask=is_pair, other=-1).to(tl.int32)
    # An index outside the experts must not become an address.
    key = tl.where(keep & (expert >= 0) & (expert < E), expert, -1)
    my_key = tl.sum(tl.where(pair == mine, key, 0), axis=0)
    is_listed = (my_key >= 0) & (tl.sum(((key == my_key) & (pair < mine)).to(tl.int32), axis=0) == 0)

    token = tl.arange(0, MAX_TOKENS)
    same_token = (pair // K)[None, :] == token[:, None]
    chosen = same_token & (key == my_key)[None, :]  # [MAX_TOKENS, MAX_PAIRS]
    row = tl.min(tl.where(chosen, pair[None, :], MAX_PAIRS), axis=1)
    is_chosen = row < MAX_PAIRS
    # Not a product with zero: a dropped pair may weigh infinity.
    kept_weight = tl.load(weights + pair, mask=(key == my_key) & (key >= 0), other=0).to(tl.float32)
    ratio = tl.full((MAX_TOKENS,), 1.0, tl.float32)
    if RENORMALISE:
        weight = tl.load(weights + pair, mask=is_pair, other=0).to(tl.float32)
        keep_weight = tl.where(keep, weight, 0.0)
        mass = tl.sum(tl.where(same_token, keep_weight[None, :], 0.0), axis=1)
        whole = tl.sum(tl.where(same_token, weight[None, :], 0.0), axis=1)
        ratio = tl.where(mass > 0, whole / tl.where(mass > 0, mass, 1.0), 1.0)
    share = tl.sum(tl.where(chosen, kept_weight[None, :], 0.0), axis=1) * ratio

    if block == 0:
        same_key = (key[:, None] == key[None, :]) & (pair[None, :] < pair[:, None])
        is_first = (key >= 0) & (tl.sum(same_key.to(tl.int32), axis=1) == 0)
        if mine == 0:
            tl.store(count, tl.sum(is_first.to(tl.int32), axis=0))
        if is_listed:
            n = tl.sum((is_first & (pair < mine)).to(tl.int32), axis=0)
            tl.store(listed + n, my_key)
            tl.store(rows + n * MAX_TOKENS + token, tl.where(is_chosen, row, -1))
            times = tl.sum(chosen.to(tl.int32), axis=1).to(tl.float32)
            tl.store(shares + n * MAX_TOKENS + token, times if ON_INPUT else share)
    if is_listed == 0:
        return

    e = my_key.to(tl.int64)
    i = (block * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)
    # Rows of gate_up: of the gates, of both where they alternate; without a gate they are all there is.
    ROWS: tl.constexpr = 2 * BLOCK_W if INTERLEAVED else BLOCK_W
    NUM_ROWS: tl.constexpr = 2 * I if INTERLEAVED else I
    row_i = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    firsts = gate_up + e * stride_gate_up_e + row_i * stride_gate_up_i  # [ROWS]
    seconds = firsts + tl.full((), I, tl.int64) * stride_gate_up_i  # [ROWS]
    x_rows = hidden + token.to(tl.int64) * stride_hidden_t  # [MAX_TOKENS]
    first = tl.zeros((ROWS, MAX_TOKENS), dtype=tl.float32)
    second = tl.zeros((BLOCK_W, MAX_TOKENS), dtype=tl.float32)
    for start in range(0, H, BLOCK_R):
        h = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = (row_i < NUM_ROWS)[:, None] & (h < H)[None, :]
        x = tl.load(
            x_rows[None, :] + h[:, None] * stride_hidden_h,
            mask=(h < H)[:, None] & is_chosen[None, :],
            other=0,
        )
        w = tl.load(firsts[:, None] + h[None, :] * stride_gate_up_h, mask=inside, other=0)
        first = tl.dot(w, x, first, input_precision=PRECISION)
        if GATED and not INTERLEAVED:
            w = tl.load(seconds[:, None] + h[None, :] * stride_gate_up_h, mask=inside, other=0)
            second = tl.dot(w, x, second, input_precision=PRECISION)
    if INTERLEAVED:
        first, second = split_rows(first, BLOCK_W, MAX_TOKENS)

    first_bias = tl.zeros((BLOCK_W,), dtype=tl.float32)
    second_bias = tl.zeros((BLOCK_W,), dtype=tl.float32)
    if bias is not None:
        # Where gates end and ups begin, or alternate.
        first_i = 2 * i if INTERLEAVED else i
        second_i = first_i + (1 if INTERLEAVED else I)
        biases = bias + e * stride_bias_e
        first_bias += tl.load(biases + first_i * stride_bias_i, mask=i < I, other=0).to(tl.float32)
        if GATED:
            second_bias += tl.load(biases + second_i * stride_bias_i, mask=i < I, other=0).to(tl.float32)
    if ON_INPUT:
        y = tl.zeros((BLOCK_W, MAX_TOKENS), dtype=tl.float32)
        # A token may have an expert in several slots, and the formula is not linear.
        for slot in range(K):
            at = token * K + slot
            there = at < num_pairs
            # Names of their own: a loop must not change the shape of what was there before.
            slot_score = tl.load(scores + at, mask=there, other=0)
            slot_kind = tl.zeros_like(at)
            if modality is not None:
                slot_kind += tl.load(modality + token, mask=there, other=0)
            is_slot = is_kept(slot_score, slot_kind, alpha_text, alpha_vision, tau_text, tau_vision) & there
            is_slot = is_slot & (tl.load(experts + at, mask=there, other=-1) == e)
            scale = (tl.load(weights + at, mask=is_slot, other=0).to(tl.float32) * ratio)[None, :]
            a = first * scale + first_bias[:, None]
            value = formula(a, second * scale + second_bias[:, None]) if GATED else formula(a)
            y += tl.where(is_slot[None, :], value, 0.0)
    else:
        a = first + first_bias[:, None]
        y = (formula(a, second + second_bias[:, None]) if GATED else formula(a)) * share[None, :]
    tl.store(
        inner + row.to(tl.int64)[None, :] * I + i[:, None],
        y.to(inner.dtype.element_ty),
        mask=(i < I)[:, None] & is_chosen[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _decode_down_kernel(
    inner,  # [P, I]
    down,  # [E, H_out, I] in any strides
    bias,  # [E, H_out] or None
    count,  # [1], int32
    listed,  # [L of P], int32
    rows,  # [L of P, MAX_TOKENS], int32
    shares,  # [L of P, MAX_TOKENS], float32
    out,  # out [T, H_out]
    stride_down_e,
    stride_down_h,
    stride_down_i,
    stride_bias_e,
    stride_bias_h,
    num_tokens,
    H_OUT: tl.constexpr,
    I: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    STEPS: tl.constexpr = (I + BLOCK_R - 1) // BLOCK_R
    token = tl.arange(0, MAX_TOKENS)
    h = (tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)
    num_listed = tl.load(count)
    y = tl.zeros((BLOCK_W, MAX_TOKENS), dtype=tl.float32)
    # One loop and not two, so that the loads of the next expert start while this one is multiplied.
    for step in range(num_listed * STEPS):
        n = step // STEPS
        e = tl.load(listed + n).to(tl.int64)
        row = tl.load(rows + n * MAX_TOKENS + token).to(tl.int64)
        i = ((step % STEPS) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        w = tl.load(
            down + e * stride_down_e + h[:, None] * stride_down_h + i[None, :] * stride_down_i,
            mask=(h < H_OUT)[:, None] & (i < I)[None, :],
            other=0,
        )
        x = tl.load(
            inner + row[None, :] * I + i[:, None], mask=(i < I)[:, None] & (row >= 0)[None, :], other=0
        )
        y = tl.dot(w, x, y, input_precision=PRECISION)
    if bias is not None:
        for n in range(num_listed):
            biases = bias + tl.load(listed + n).to(tl.int64) * stride_bias_e + h * stride_bias_h
            share = tl.load(shares + n * MAX_TOKENS + token)
            # A token without this expert has a share of 0, which an infinite bias would make NaN.
            row = tl.load(rows + n * MAX_TOKENS + token)
            value = tl.load(biases, mask=h < H_OUT, other=0).to(tl.float32)[:, None] * share[None, :]
            y += tl.where((row >= 0)[None, :], value, 0.0)
    tl.store(
        out + token.to(tl.int64)[None, :] * H_OUT + h[:, None],
        y.to(out.dtype.element_ty),
        mask=(h < H_OUT)[:, None] & (token < num_tokens)[None, :],
    )
