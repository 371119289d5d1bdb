"""The native CPU lowering of `modes_fx::masked_moe`: builds it, and hands it to torch.

`native/op.cpp` becomes torch's kernel for CPU tensors, and picks, by formula and dtype, one of the kernels
that were built from `native/masked_moe.h`. Those take float32 and bfloat16, and expert weights whose rows
are contiguous. Sums are taken in float32; the weighted output of each pair is rounded to the dtype of
`hidden`, and so is, where a matrix unit is used, the input of `down`. An index outside of `[0, E)` drops its
pair. The order of every sum is fixed, so equal inputs give equal bits with any number of threads.
"""

import ctypes
import functools
import logging
import os
import threading

import torch

from modes_fx.kernels._gate_formula_cpp import write_formula
from modes_fx.kernels._native_build import BuildError, build_kernel, build_operator
from modes_fx.kernels.gate_formula import parse

log = logging.getLogger(__name__)

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_tried: set[tuple[str, torch.dtype]] = set()
_lock = threading.Lock()


@functools.cache
def operator() -> ctypes.CDLL | None:
    """The library that holds the operator, or None where it cannot be built, which is logged once."""
    if os.environ.get("MODES_FX_NATIVE") == "0":
        return None
    try:
        return build_operator()
    except (BuildError, OSError) as error:
        _warn(error)
        return None


def take_over() -> bool:
    """Give the operator to torch. Whether it has it by this call, so that calling once more goes there."""
    with _lock:
        return operator.cache_info().currsize == 0 and operator() is not None


def add_kernel(activation: str, dtype: torch.dtype) -> bool:
    """Build the kernel of a formula. Whether the operator has it by this call."""
    with _lock:
        if dtype not in ELEMENTS or (activation, dtype) in _tried or operator() is None:
            return False
        _tried.add((activation, dtype))
        try:
            build(activation, dtype)
        except (BuildError, OSError) as error:
            _warn(error)
            return False
        return True


def build(activation: str, dtype: torch.dtype) -> None:
    """Build a kernel for this processor; the operator uses it from now on.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    formula = parse(activation)
    kernel = build_kernel(
        '#include "vectors.h"\n'
        f"using Element = {ELEMENTS[dtype]};\n"
        f"constexpr bool GATED = {str(formula.is_gated).lower()};\n"
        f"{write_formula(formula)}"
        '#include "masked_moe.h"\n'
    )
    library = operator()
    assert library is not None
    library.register_kernel(
        ctypes.c_char_p(activation.encode()),
        ctypes.c_bool(dtype == torch.bfloat16),
        ctypes.c_bool(formula.is_gated),
        kernel.run_masked_moe,
    )


def _warn(error: Exception) -> None:
    log.warning(
        "The CPU kernel runs on torch operators, which is slower: %s Set CXX to a C++ compiler for the "
        "native one, or MODES_FX_NATIVE=0 to do without and without this line.",
        error,
    )
