"""The experts over their kept pairs: gate_up (formula fused), down (routing weight fused), combine.

A program computes `BLOCK_W` rows of one expert's weights times a tile of at most `WIDTHS[-1]` kept pairs. The
weights are the left operand, so that the pairs are the side that tensor cores cut finest: with 88 % dropped
an expert of a 4096-token prompt has about 30 pairs, and a product as wide as the next multiple of 8 wastes a
tenth where one of 16 rows would waste a quarter. `WIDTHS` are the widths there is code for; a tile takes the
narrowest that holds it. A width is a power of two, or the sum of two (24 = 16 + 8): Triton's tensors have
sizes that are powers of two, and two products share the weights that were loaded for the first.

Letters as in `_masked_moe_triton`.
"""

# Triton gives annotations of a kernel's parameters a meaning; shapes and dtypes stand in comments instead.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from modes_fx.kernels._gate_formula_triton import compile_formula
from modes_fx.kernels.gate_formula import SILU, parse

# What the kernels below call; `with_formula` gives a kernel another one.
formula = compile_formula(parse(SILU))


@triton.constexpr_function
def _wide(width):
    """The wider of the two products that a width is computed in."""
    return 1 << (width.bit_length() - 1)


@triton.jit
def _find_tile(
    total,  # [POW2_E], int32: kept pairs of each expert
    program,
    NUM_BLOCKS: tl.constexpr,  # blocks of weight rows
    POW2_E: tl.constexpr,
    TILE: tl.constexpr,
):
    """What a program works on: expert (at least E if nothing), block of weight rows, first position, pairs.

    Each expert starts a new tile, so no tile mixes two. Programs that read the same weights are neighbours,
    so that they run at the same time and L2 serves all but the first: DRAM is read once.
    """
    e = tl.arange(0, POW2_E)
    programs = (total + TILE - 1) // TILE * NUM_BLOCKS
    expert = tl.sum((tl.cumsum(programs, axis=0) <= program).to(tl.int32), axis=0)
    local = program - tl.sum(tl.where(e < expert, programs, 0), axis=0)
    num_pairs = tl.sum(tl.where(e == expert, total, 0), axis=0)
    # At least 1: there is no expert to divide by where there is nothing to do.
    tiles = tl.maximum((num_pairs + TILE - 1) // TILE, 1)
    row = (local % tiles) * TILE
    position = tl.sum(tl.where(e < expert, total, 0), axis=0) + row
    return expert, local // tiles, position.to(tl.int64), tl.minimum(num_pairs - row, TILE)


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
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    POW2_E: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (I + BLOCK_W - 1) // BLOCK_W
    every_e = tl.arange(0, POW2_E)
    # Loaded here and not in `_find_tile`: of a pointer that goes into a function Inductor believes that it is
    # stored to where the function's results make an address.
    total = tl.load(totals + every_e, mask=every_e < E, other=0)
    expert, block, position, num_pairs = _find_tile(
        total, tl.program_id(0), NUM_BLOCKS, POW2_E, WIDTHS[len(WIDTHS) - 1]
    )
    if expert >= E:
        return
    e = expert.to(tl.int64)
    i = (block * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)
    # Rows of gate_up: of the gates, of both where they alternate; without a gate they are all there is.
    ROWS: tl.constexpr = 2 * BLOCK_W if INTERLEAVED else BLOCK_W
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    firsts = gate_up + e * stride_gate_up_e + row * stride_gate_up_i  # [ROWS]
    seconds = firsts + tl.full((), I, tl.int64) * stride_gate_up_i  # [ROWS]
    is_row = row < (2 * I if INTERLEAVED else I)
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
    for n in tl.static_range(len(WIDTHS)):
        fits = num_pairs <= WIDTHS[n]
        if n > 0:
            fits = fits & (num_pairs > WIDTHS[n - 1])
        if fits:
            _gate_up_tile(
                hidden,
                firsts,
                seconds,
                is_row,
                first_bias,
                second_bias,
                scales,
                order,
                out,
                i,
                position,
                num_pairs,
                stride_hidden_t,
                stride_hidden_h,
                stride_gate_up_h,
                K,
                H,
                I,
                formula,
                GATED,
                INTERLEAVED,
                PRECISION,
                WIDTHS[n],
                BLOCK_W,
                BLOCK_R,
            )


@triton.jit
def _gate_up_tile(
    hidden,
    firsts,  # [ROWS] pointers
    seconds,  # [ROWS] pointers
    is_row,  # [ROWS]
    first_bias,  # [BLOCK_W]
    second_bias,  # [BLOCK_W]
    scales,
    order,
    out,
    i,  # [BLOCK_W]
    position,
    num_pairs,
    stride_hidden_t,
    stride_hidden_h,
    stride_gate_up_h,
    K: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ROWS: tl.constexpr = 2 * BLOCK_W if INTERLEAVED else BLOCK_W
    WIDE: tl.constexpr = _wide(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    column = tl.arange(0, WIDE)
    pair = tl.load(order + position + column, mask=column < num_pairs, other=0)
    x_rows = hidden + (pair // K).to(tl.int64) * stride_hidden_t
    first = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    second = tl.zeros((BLOCK_W, WIDE), dtype=tl.float32)
    if NARROW:
        more_column = WIDE + tl.arange(0, NARROW)
        more_pair = tl.load(order + position + more_column, mask=more_column < num_pairs, other=0)
        more_rows = hidden + (more_pair // K).to(tl.int64) * stride_hidden_t
        more_first = tl.zeros((ROWS, NARROW), dtype=tl.float32)
        more_second = tl.zeros((BLOCK_W, NARROW), dtype=tl.float32)
    for start in range(0, H, BLOCK_R):
        h = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        inside = is_row[:, None] & (h < H)[None, :]
        w = tl.load(firsts[:, None] + h[None, :] * stride_gate_up_h, mask=inside, other=0)
        x = tl.load(
            x_rows[None, :] + h[:, None] * stride_hidden_h,
            mask=(h < H)[:, None] & (column < num_pairs)[None, :],
            other=0,
        )
        first = tl.dot(w, x, first, input_precision=PRECISION)
        if NARROW:
            more_x = tl.load(
                more_rows[None, :] + h[:, None] * stride_hidden_h,
                mask=(h < H)[:, None] & (more_column < num_pairs)[None, :],
                other=0,
            )
            more_first = tl.dot(w, more_x, more_first, input_precision=PRECISION)
        if GATED and not INTERLEAVED:
            w = tl.load(seconds[:, None] + h[None, :] * stride_gate_up_h, mask=inside, other=0)
            second = tl.dot(w, x, second, input_precision=PRECISION)
            if NARROW:
                more_second = tl.dot(w, more_x, more_second, input_precision=PRECISION)
    if INTERLEAVED:
        first, second = split_rows(first, BLOCK_W, WIDE)
    _store_formula(
        first,
        second,
        first_bias,
        second_bias,
        scales,
        out,
        pair,
        i,
        position + column,
        column < num_pairs,
        I,
        FORMULA,
        GATED,
    )
    if NARROW:
        if INTERLEAVED:
            more_first, more_second = split_rows(more_first, BLOCK_W, NARROW)
        _store_formula(
            more_first,
            more_second,
            first_bias,
            second_bias,
            scales,
            out,
            more_pair,
            i,
            position + more_column,
            more_column < num_pairs,
            I,
            FORMULA,
            GATED,
        )


@triton.jit
def split_rows(y, BLOCK_W: tl.constexpr, COLUMNS: tl.constexpr):
    """The even and the odd rows of `y`, `[2 * BLOCK_W, COLUMNS]`."""
    return tl.split(tl.permute(tl.reshape(y, (BLOCK_W, 2, COLUMNS)), (0, 2, 1)))


@triton.jit
def _store_formula(
    first,  # [BLOCK_W, columns]
    second,  # [BLOCK_W, columns]
    first_bias,  # [BLOCK_W]
    second_bias,  # [BLOCK_W]
    scales,
    out,
    pair,  # [columns]
    i,  # [BLOCK_W]
    position,  # [columns]
    is_pair,  # [columns]
    I: tl.constexpr,
    FORMULA: tl.constexpr,
    GATED: tl.constexpr,
):
    if scales is not None:
        # What multiplies a row multiplies its products; here it costs nothing in the loop.
        scale = tl.load(scales + pair, mask=is_pair, other=0)[None, :]
        first *= scale
        second *= scale
    first += first_bias[:, None]
    second += second_bias[:, None]
    y = FORMULA(first, second) if GATED else FORMULA(first)
    tl.store(
        out + position[None, :] * I + i[:, None],
        y.to(out.dtype.element_ty),
        mask=(i < I)[:, None] & is_pair[None, :],
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
    WIDTHS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (H_OUT + BLOCK_W - 1) // BLOCK_W
    every_e = tl.arange(0, POW2_E)
    # Loaded here and not in `_find_tile`: of a pointer that goes into a function Inductor believes that it is
    # stored to where the function's results make an address.
    total = tl.load(totals + every_e, mask=every_e < E, other=0)
    expert, block, position, num_pairs = _find_tile(
        total, tl.program_id(0), NUM_BLOCKS, POW2_E, WIDTHS[len(WIDTHS) - 1]
    )
    if expert >= E:
        return
    e = expert.to(tl.int64)
    h = (block * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)
    weights = down + e * stride_down_e + h * stride_down_h  # [BLOCK_W]
    row_bias = tl.zeros((BLOCK_W,), dtype=tl.float32)
    if bias is not None:
        biases = bias + e * stride_bias_e + h * stride_bias_h
        row_bias += tl.load(biases, mask=h < H_OUT, other=0).to(tl.float32)
    for n in tl.static_range(len(WIDTHS)):
        fits = num_pairs <= WIDTHS[n]
        if n > 0:
            fits = fits & (num_pairs > WIDTHS[n - 1])
        if fits:
            _down_tile(
                inner,
                weights,
                row_bias,
                scales,
                order,
                out,
                h,
                position,
                num_pairs,
                stride_down_i,
                H_OUT,
                I,
                PRECISION,
                WIDTHS[n],
                BLOCK_W,
                BLOCK_R,
            )


@triton.jit
def _down_tile(
    inner,
    weights,  # [BLOCK_W] pointers
    row_bias,  # [BLOCK_W]
    scales,
    order,
    out,
    h,  # [BLOCK_W]
    position,
    num_pairs,
    stride_down_i,
    H_OUT: tl.constexpr,
    I: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    WIDE: tl.constexpr = _wide(WIDTH)
    NARROW: tl.constexpr = WIDTH - WIDE
    column = tl.arange(0, WIDE)
    x_rows = inner + (position + column) * I
    y = tl.zeros((BLOCK_W, WIDE), dtype=tl.float32)
    if NARROW:
        more_column = WIDE + tl.arange(0, NARROW)
        more_rows = inner + (position + more_column) * I
        more_y = tl.zeros((BLOCK_W, NARROW), dtype=tl.float32)
    for start in range(0, I, BLOCK_R):
        i = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        w = tl.load(
            weights[:, None] + i[None, :] * stride_down_i,
            mask=(h < H_OUT)[:, None] & (i < I)[None, :],
            other=0,
        )
        x = tl.load(
            x_rows[None, :] + i[:, None], mask=(i < I)[:, None] & (column < num_pairs)[None, :], other=0
        )
        y = tl.dot(w, x, y, input_precision=PRECISION)
        if NARROW:
            more_x = tl.load(
                more_rows[None, :] + i[:, None],
                mask=(i < I)[:, None] & (more_column < num_pairs)[None, :],
                other=0,
            )
            more_y = tl.dot(w, more_x, more_y, input_precision=PRECISION)
    _store_weighted(y, row_bias, scales, order, out, h, position + column, column < num_pairs, H_OUT)
    if NARROW:
        _store_weighted(
            more_y, row_bias, scales, order, out, h, position + more_column, more_column < num_pairs, H_OUT
        )


@triton.jit
def _store_weighted(
    y,  # [BLOCK_W, columns]
    row_bias,  # [BLOCK_W]
    scales,
    order,
    out,
    h,  # [BLOCK_W]
    position,  # [columns]
    is_pair,  # [columns]
    H_OUT: tl.constexpr,
):
    pair = tl.load(order + position, mask=is_pair, other=0).to(tl.int64)
    y += row_bias[:, None]
    if scales is not None:
        y *= tl.load(scales + pair, mask=is_pair, other=0)[None, :]
    tl.store(
        out + pair[None, :] * H_OUT + h[:, None],
        y.to(out.dtype.element_ty),
        mask=(h < H_OUT)[:, None] & is_pair[None, :],
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
