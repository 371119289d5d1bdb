"""Which pairs are kept, and their order by expert: threshold -> scan -> place.

Letters as in `_masked_moe_triton`, and C chunks of tokens. The counts stay on the device.
"""

# Triton gives annotations of a kernel's parameters a meaning; shapes and dtypes stand in comments instead.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def is_kept(score, kind, alpha_text, alpha_vision, tau_text, tau_vision):
    """The rule, for scores and kinds of tokens that broadcast.

    Takes what was loaded, not pointers: of a pointer that goes into a function Inductor believes that it is
    stored to where the function's results make an address.
    """
    # Scalars arrive as double from Inductor and the interpreter; the contract compares in float32.
    score = score.to(tl.float32)
    below_text = score * tl.full((), alpha_text, tl.float32) < tl.full((), tau_text, tl.float32)
    below_vision = score * tl.full((), alpha_vision, tl.float32) < tl.full((), tau_vision, tl.float32)
    # `not (a < b)`, not `a >= b`: a score that is NaN stays, as in the reference.
    return ((kind == 0) & (below_text == 0)) | ((kind == 1) & (below_vision == 0)) | (kind > 1)


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

    score = tl.load(scores + pair, mask=inside, other=0)
    kind = tl.zeros_like(pair)
    if modality is not None:
        kind += tl.load(modality + token, mask=token < num_tokens, other=0)[:, None]
    keep = is_kept(score, kind, alpha_text, alpha_vision, tau_text, tau_vision) & inside

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
