"""Native CPU lowering of `modes_fx::masked_moe`: the C++ of `native/`, compiled for the call's formula."""

import ctypes
import functools
import logging
import os
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from modes_fx.kernels._gate_formula_cpp import write_formula
from modes_fx.kernels._native_build import BuildError, load
from modes_fx.kernels.gate_formula import Formula
from modes_fx.kernels.masked_moe import Call

log = logging.getLogger(__name__)

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16"}
MIN_COLUMNS = 8  # a register tile's weight rows, which must fit in the narrowest matrix
# `struct Arguments` of native/dispatch.h: all members have 8 bytes.
_ARGUMENTS = struct.Struct("21q4d4q")

Kernel = Callable[[bytes], int]


@functools.cache
def kernel(formula: Formula, dtype: torch.dtype) -> Kernel | None:
    """The compiled function, or None where it cannot be built, which is logged once."""
    if os.environ.get("MODES_FX_NATIVE") == "0":
        return None
    source = (
        '#include "vectors.h"\n'
        f"using Element = {ELEMENTS[dtype]};\n"
        f"constexpr bool GATED = {str(formula.is_gated).lower()};\n"
        f"{write_formula(formula)}"
        '#include "masked_moe.h"\n'
    )
    try:
        function = load(source).masked_moe
    except (BuildError, OSError) as error:
        log.warning(
            "The CPU kernel runs on torch operators, which is slower: %s Set CXX to a C++ compiler for the "
            "native one, or MODES_FX_NATIVE=0 to do without and without this line.",
            error,
        )
        return None
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int64
    return function  # type: ignore[no-any-return]


def find_kernel(call: Call) -> Kernel | None:
    """The kernel for a call, or None where torch operators have to do: for other dtypes and layouts."""
    hidden, gate_up, down = call.hidden, call.gate_up, call.down
    if hidden.dtype not in ELEMENTS or not hidden.dtype == gate_up.dtype == down.dtype:
        return None
    if call.is_transposed or min(call.intermediate_size, call.output_size) < MIN_COLUMNS:
        return None
    if not hidden.stride(1) == gate_up.stride(2) == down.stride(2) == 1:
        return None
    return kernel(call.formula, hidden.dtype)


def masked_moe_native(call: Call, kernel: Kernel) -> Tensor:
    """The result of `masked_moe.reference`; float32 or bfloat16.

    Sums are taken in float32; the weighted output of each pair is rounded to the dtype of `hidden`, and so
    is, with a matrix unit, the input of `down`. An index outside of `[0, E)` drops its pair. The order of
    every sum is fixed, so equal inputs give equal bits with any number of threads.
    """
    hidden, gate_up, down = call.hidden, call.gate_up, call.down
    num_tokens, num_slots = call.scores.shape
    out = torch.empty(num_tokens, call.output_size, dtype=hidden.dtype)
    # Names, so that copies live until the kernel returns.
    scores, weights = call.scores.float().contiguous(), call.weights.float().contiguous()
    experts = call.experts.contiguous()
    modality = None if call.modality is None else call.modality.contiguous()
    gate_up_bias = None if call.gate_up_bias is None else call.gate_up_bias.to(hidden.dtype).contiguous()
    down_bias = None if call.down_bias is None else call.down_bias.to(hidden.dtype).contiguous()
    kept = kernel(
        _ARGUMENTS.pack(
            num_tokens,
            num_slots,
            down.shape[0],
            hidden.shape[1],
            call.intermediate_size,
            call.output_size,
            hidden.data_ptr(),
            hidden.stride(0),
            scores.data_ptr(),
            weights.data_ptr(),
            experts.data_ptr(),
            0 if modality is None else modality.data_ptr(),
            gate_up.data_ptr(),
            down.data_ptr(),
            gate_up.stride(0),
            gate_up.stride(1),
            down.stride(0),
            down.stride(1),
            0 if gate_up_bias is None else gate_up_bias.data_ptr(),
            0 if down_bias is None else down_bias.data_ptr(),
            out.data_ptr(),
            call.alpha_text,
            call.alpha_vision,
            call.tau_text,
            call.tau_vision,
            call.interleaved,
            call.weights_on_input,
            call.renormalise,
            torch.get_num_threads(),
        )
    )
    if kept < 0:
        raise MemoryError(f"The kernel found no memory for {num_tokens * num_slots} pairs.")
    return out
