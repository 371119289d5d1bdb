"""Triton lowering of `modes_fx::masked_moe`: dropped pairs are neither gathered, multiplied nor summed.

    many tokens    threshold -> scan -> place        kept pairs, grouped by expert, in `order`
                   -> gate_up (formula fused) -> down (routing weight fused)
                   -> combine                        per token, its kept slots in slot order
    few tokens     gate_up (threshold, formula and routing weight fused) -> down (sum over experts fused)

Nothing waits for the host: the number of kept pairs stays on the device, grids have the size of the static
bound, and a program without work returns. So a call can be captured in a CUDA graph. The order of every sum
is fixed (no atomics), so equal inputs give equal bits. Uninitialised memory is never read: rows of dropped
pairs are neither written nor loaded.

Letters: T tokens, K slots, P = T * K pairs (pair p is slot p % K of token p // K), E experts, H hidden size,
I intermediate size, N rows of gate_up (2I, or I without a gate), H_out width of the result. A position is an
index into `order`, R of them are filled.

Scan and place stay two launches: in one, each of the C programs that place would read the counts of all C
chunks, which grows with the square of the number of tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from modes_fx.kernels._gate_formula_triton import with_formula
from modes_fx.kernels._masked_moe_tiles import (
    Tile,
    architecture,
    choose_tiles,
    is_decode,
    max_tiles,
    tiles_for_few_tokens,
)
from modes_fx.kernels._masked_moe_triton_decode import (
    MAX_PAIRS,
    MAX_TOKENS,
    _decode_down_kernel,
    _decode_gate_up_kernel,
)
from modes_fx.kernels._masked_moe_triton_dispatch import _place_kernel, _scan_kernel, _threshold_kernel
from modes_fx.kernels._masked_moe_triton_experts import _combine_kernel, _down_kernel, _gate_up_kernel
from modes_fx.kernels.masked_moe import Call

CHUNK_PAIRS = 128  # pairs of one dispatch program
BLOCK_E = 32  # experts counted at a time


def masked_moe_triton(call: Call) -> Tensor:
    """The result of `masked_moe.reference`; float16, bfloat16 or float32.

    The expert weights are read where they lie, in any strides. Products accumulate in float32; the input of
    `down` and, with many tokens, the weighted output of each pair are rounded to the dtype of `hidden`. An
    index outside of `[0, E)` drops its pair. Does not wait for the device.
    """
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(call.hidden):
        return _masked_moe(call, lambda kernel: kernel, architecture(call.hidden.device))


def masked_moe_traced(call: Call) -> Tensor:
    """The same, written into the graph that is being traced: a node for each launch, for Inductor to compile.

    The number of tokens may be symbolic; which path and which tiles it takes becomes a guard.
    """
    return _masked_moe(call, torch.library.wrap_triton, architecture(call.hidden.device))


def masked_moe_launched_by(call: Call, wrap: "Wrap", arch: int) -> Tensor:
    """The same with another way to launch, and tiles for `arch` (80, 90 or 100), which need not be here."""
    return _masked_moe(call, wrap, arch)


# Turns a kernel into what is launched.
Wrap = Callable[[Any], Any]


def _masked_moe(call: Call, wrap: Wrap, arch: int) -> Tensor:
    if call.scores.numel() == 0:
        return call.hidden.new_zeros(call.hidden.shape[0], call.output_size)
    return (_few_tokens if is_decode(*call.scores.shape) else _many_tokens)(call, wrap, arch)


def _few_tokens(call: Call, wrap: Wrap, arch: int) -> Tensor:
    hidden, num_tokens = call.hidden, call.hidden.shape[0]
    num_pairs = call.scores.numel()
    gate_up, down = _weights(call)
    tiles = tiles_for_few_tokens(arch, hidden.dtype)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": hidden.device}
    inner = hidden.new_empty(num_pairs, call.intermediate_size)
    count, listed = torch.empty(1, **ints), torch.empty(num_pairs, **ints)
    rows = torch.empty(num_pairs, MAX_TOKENS, **ints)
    shares = hidden.new_empty(num_pairs, MAX_TOKENS, dtype=torch.float32)
    out = hidden.new_empty(num_tokens, call.output_size)
    kernel = wrap(with_formula(_decode_gate_up_kernel, call.formula))
    kernel[(num_pairs, triton.cdiv(call.intermediate_size, tiles.gate_up.block_w))](
        hidden,
        *_routing(call),
        gate_up,
        call.gate_up_bias,
        inner,
        count,
        listed,
        rows,
        shares,
        *hidden.stride(),
        *gate_up.stride(),
        *_strides(call.gate_up_bias),
        num_pairs,
        *_thresholds(call),
        K=call.scores.shape[1],
        E=gate_up.shape[0],
        H=hidden.shape[1],
        I=call.intermediate_size,
        GATED=call.formula.is_gated,
        INTERLEAVED=call.interleaved and call.formula.is_gated,
        ON_INPUT=call.weights_on_input,
        RENORMALISE=call.renormalise,
        MAX_PAIRS=MAX_PAIRS,
        MAX_TOKENS=MAX_TOKENS,
        **_options(hidden, tiles.gate_up),
    )
    wrap(_decode_down_kernel)[(triton.cdiv(call.output_size, tiles.down.block_w),)](
        inner,
        down,
        call.down_bias,
        count,
        listed,
        rows,
        shares,
        out,
        *down.stride(),
        *_strides(call.down_bias),
        num_tokens,
        H_OUT=call.output_size,
        I=call.intermediate_size,
        MAX_TOKENS=MAX_TOKENS,
        **_options(hidden, tiles.down),
    )
    return out


def _many_tokens(call: Call, wrap: Wrap, arch: int) -> Tensor:
    hidden = call.hidden
    num_tokens, num_slots = call.scores.shape
    num_pairs, num_experts = num_tokens * num_slots, call.gate_up.shape[0]
    gate_up, down = _weights(call)
    sizes = hidden.shape[1], call.intermediate_size, call.output_size
    tiles = choose_tiles(arch, hidden.dtype, num_pairs, num_experts, *sizes)
    experts = {"E": num_experts, "POW2_E": triton.next_power_of_2(num_experts)}
    pairs = dispatch(call, wrap)

    inner = hidden.new_empty(num_pairs, call.intermediate_size)
    tile = tiles.gate_up
    interleaved = call.interleaved and call.formula.is_gated
    if interleaved:
        # Gates and ups in one product, which then has as many rows as each of the two has elsewhere.
        tile = tile._replace(block_w=tile.block_w // 2)
    num_tiles = max_tiles(num_pairs, num_experts, tile.widths[-1])
    kernel = wrap(with_formula(_gate_up_kernel, call.formula))
    kernel[(num_tiles * triton.cdiv(call.intermediate_size, tile.block_w),)](
        hidden,
        gate_up,
        call.gate_up_bias,
        pairs.scales if call.weights_on_input else None,
        pairs.order,
        pairs.totals,
        inner,
        *hidden.stride(),
        *gate_up.stride(),
        *_strides(call.gate_up_bias),
        K=num_slots,
        H=hidden.shape[1],
        I=call.intermediate_size,
        GATED=call.formula.is_gated,
        INTERLEAVED=interleaved,
        WIDTHS=tile.widths,
        **experts,
        **_options(hidden, tile),
    )
    rows = hidden.new_empty(num_pairs, call.output_size)
    tile = tiles.down
    num_tiles = max_tiles(num_pairs, num_experts, tile.widths[-1])
    wrap(_down_kernel)[(num_tiles * triton.cdiv(call.output_size, tile.block_w),)](
        inner,
        down,
        call.down_bias,
        None if call.weights_on_input else pairs.scales,
        pairs.order,
        pairs.totals,
        rows,
        *down.stride(),
        *_strides(call.down_bias),
        H_OUT=call.output_size,
        I=call.intermediate_size,
        WIDTHS=tile.widths,
        **experts,
        **_options(hidden, tile),
    )
    out = hidden.new_empty(num_tokens, call.output_size)
    block_h = min(1024, triton.next_power_of_2(call.output_size))
    wrap(_combine_kernel)[(num_tokens, triton.cdiv(call.output_size, block_h))](
        rows, pairs.keys, out, K=num_slots, H_OUT=call.output_size, BLOCK_H=block_h
    )
    return out


class Dispatch(NamedTuple):
    """Where the kept pairs are; all on the device, int32 but for `scales`, which is float32."""

    keys: Tensor  # [P]: the expert of a kept pair, -1 of a dropped one
    scales: Tensor  # [P]: the weight of a kept pair
    order: Tensor  # [P], the first R filled: kept pairs by expert, then by pair
    totals: Tensor  # [E]: kept pairs of an expert


def dispatch(call: Call, wrap: Wrap = lambda kernel: kernel) -> Dispatch:
    """Group the kept pairs of a call by expert."""
    num_tokens, num_slots = call.scores.shape
    num_pairs, num_experts = num_tokens * num_slots, call.gate_up.shape[0]
    block_k = triton.next_power_of_2(num_slots)
    block_t = max(1, CHUNK_PAIRS // block_k)
    num_chunks = triton.cdiv(num_tokens, block_t)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": call.scores.device}
    keys, order = torch.empty(num_pairs, **ints), torch.empty(num_pairs, **ints)
    scales = torch.empty(num_pairs, dtype=torch.float32, device=call.scores.device)
    # Flat: a shape of which one size may be 1 would be a guard where the number of tokens is symbolic.
    counts, before = (torch.empty(num_chunks * num_experts, **ints) for _ in range(2))
    totals = torch.empty(num_experts, **ints)
    wrap(_threshold_kernel)[(num_chunks,)](
        *_routing(call),
        keys,
        scales,
        counts,
        num_tokens,
        *_thresholds(call),
        K=num_slots,
        E=num_experts,
        RENORMALISE=call.renormalise,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_E=BLOCK_E,
    )
    wrap(_scan_kernel)[(triton.cdiv(num_experts, BLOCK_E),)](
        counts, before, totals, num_chunks, E=num_experts, BLOCK_C=64, BLOCK_E=BLOCK_E
    )
    wrap(_place_kernel)[(num_chunks,)](
        keys,
        before,
        totals,
        order,
        num_pairs,
        E=num_experts,
        CHUNK=block_t * num_slots,
        BLOCK_P=block_t * block_k,
        BLOCK_E=BLOCK_E,
    )
    return Dispatch(keys, scales, order, totals)


def _routing(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    modality = None if call.modality is None else call.modality.reshape(-1).contiguous()
    return call.scores.contiguous(), call.weights.contiguous(), call.experts.contiguous(), modality


def _thresholds(call: Call) -> tuple[float, float, float, float]:
    return call.alpha_text, call.alpha_vision, call.tau_text, call.tau_vision


def _weights(call: Call) -> tuple[Tensor, Tensor]:
    """As `[E, N, H]` and `[E, H_out, I]` whatever the layout; only the strides differ."""
    if call.is_transposed:
        return call.gate_up.transpose(1, 2), call.down.transpose(1, 2)
    return call.gate_up, call.down


def _strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if bias is None else bias.stride()


def _options(hidden: Tensor, tile: Tile) -> dict[str, Any]:
    return {
        # TF32 would keep 10 bits of a float32; torch does not use it unless asked either.
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "BLOCK_W": tile.block_w,
        "BLOCK_R": tile.block_r,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
