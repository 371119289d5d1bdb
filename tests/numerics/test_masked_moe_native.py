"""The native CPU kernel on every instruction set of this machine, and what is done without a compiler."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from modes_fx.kernels import _masked_moe_native as native
from modes_fx.kernels import _masked_moe_torch
from modes_fx.kernels import _native_build as native_build
from modes_fx.kernels._gate_formula_cpp import write_formula
from modes_fx.kernels.gate_formula import FUNCTIONS, SILU, parse
from modes_fx.kernels.masked_moe import Call, masked_moe

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXACT = {"rtol": 0, "atol": 0}
DTYPES = [torch.float32, torch.bfloat16]
MIN_SIDE = 8  # as in native/op.cpp
needs_compiler = pytest.mark.skipif(native.operator() is None, reason="no C++ compiler")


@pytest.fixture
def run_native(monkeypatch):
    """The op, which may not fall back."""

    def refuse(call):
        raise AssertionError("torch operators ran in place of the native kernel")

    monkeypatch.setattr(_masked_moe_torch, "masked_moe_torch", refuse)
    return lambda problem: masked_moe(**problem)


SETS = ["none", *native_build.INSTRUCTIONS]  # each holds those before it


@pytest.fixture(params=SETS, scope="module")
def instructions(request):
    """Kernels of one instruction set in place of the usual ones."""
    here = native_build.instruction_set()
    if request.param != "none" and SETS.index(request.param) > (SETS.index(here) if here in SETS else 0):
        pytest.skip(f"this processor has no {request.param}")
    flags = native_build.INSTRUCTIONS.get(request.param, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "instructions", lambda: flags)
        for dtype in DTYPES:
            native.build(SILU, dtype)
    yield request.param
    for dtype in DTYPES:
        native.build(SILU, dtype)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_matches_the_reference(
    instructions, dtype, case, run_native, make_problem, assert_within_budget
):
    if min(case.intermediate, case.hidden) < MIN_SIDE:
        pytest.skip("too narrow for the native kernel")
    # A matrix unit takes only widths that fill its tiles.
    for sizes in ({}, {"hidden": 64, "intermediate": 96}):
        for flags in (
            {},
            {"bias": True, "interleaved": True},
            {"weights_on_input": True, "renormalise": True},
        ):
            problem = make_problem(case._replace(**sizes), dtype, **flags)
            assert_within_budget(run_native(problem), problem)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*range(1, 36), 47, 48, 49, 95, 96, 97, 200])
def test_any_number_of_rows_on_an_expert(
    rows, dtype, typical, run_native, make_problem, assert_within_budget
):
    # Every mix of full vectors, vectors with idle lanes, and rows; one task and several.
    case = typical._replace(tokens=rows, slots=1, experts=1, hidden=64, intermediate=32)
    problem = make_problem(case, dtype, bias=True) | {"tau_text": 0.0, "tau_vision": 0.0}
    assert_within_budget(run_native(problem), problem)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 400])
def test_threads_change_no_bit(tokens, dtype, typical, run_native, make_problem):
    # Over a megabyte for each thread, so that several do run: one task in parts, or tasks side by side.
    case = typical._replace(tokens=tokens, experts=24, hidden=512, intermediate=96)
    problem = make_problem(case, dtype) | {"tau_text": 0.0, "tau_vision": 0.0}
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run_native(problem))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], **EXACT)


@needs_compiler
def test_an_index_outside_the_experts_drops_its_pair(typical, make_problem):
    problem = make_problem(typical) | {"tau_text": 0.0, "tau_vision": 0.0}
    outside = problem["experts"].clone()
    outside[:, 0] = torch.tensor([-1, typical.experts, 10**12]).repeat(len(outside))[: len(outside)]
    without = problem | {name: problem[name][:, 1:] for name in ("scores", "weights", "experts")}
    for lowering in (masked_moe, lambda **call: _masked_moe_torch.masked_moe_torch(Call(**call))):
        got, wanted = lowering(**problem | {"experts": outside}), lowering(**without)
        torch.testing.assert_close(got, wanted, **EXACT)


@needs_compiler
def test_reads_views_where_they_lie(typical, run_native, make_problem, assert_within_budget):
    problem = make_problem(typical, bias=True)
    views = dict(problem)
    for name in ("hidden", "gate_up", "down"):
        # Rows further apart than they are long.
        views[name] = torch.cat([problem[name], torch.full_like(problem[name], torch.nan)], -1)
        views[name] = views[name][..., : problem[name].shape[-1]]
    for name in ("scores", "weights", "experts", "gate_up_bias", "down_bias"):
        views[name] = torch.stack([problem[name]] * 2, dim=-1)[..., 0]
        assert not views[name].is_contiguous()
    assert_within_budget(run_native(views), problem)


NUMBERS = ["-x", "x ** 3.0", "x ** -2.0", "x ** 0.5", "x ** 1.7", "x ** 9.0", "x ** 11.0"]
NUMBERS += [f"x {symbol} 2.5" for symbol in "+-*/"] + [f"-0.7 {symbol} x" for symbol in "+-*/"]
LIMITS = [f"{name}(x, {limit})" for name in ("clamp_min", "clamp_max") for limit in (-1.5, "inf", "-inf")]
PAIRS = ["minimum(x, 0.5 * x)", "maximum(x, 0.5 * x)"]
OTHERS = [f"{name}(x)" for name in FUNCTIONS if name not in ("clamp_min", "clamp_max", "minimum", "maximum")]
TEXTS = [*NUMBERS, *LIMITS, *PAIRS, *OTHERS]


@pytest.fixture(scope="module")
def apply():
    """`apply(i, x)`: TEXTS[i] of each value of x. One library holds them all."""
    lines = ['#include "vectors.h"', "#include <initializer_list>"]
    for i, text in enumerate(TEXTS):
        lines.append(f"namespace n{i} {{ {write_formula(parse(text))} }}")
    lines.append('extern "C" void apply(i64 which, const float* x, float* y, i64 n) {')
    lines.append("  for (i64 i = 0; i < n; i += LANES) switch (which) {")
    for i in range(len(TEXTS)):
        lines.append(f"    case {i}: store(y + i, n{i}::formula(load(x + i), vec{{}})); break;")
    function = native_build.build_kernel("\n".join([*lines, "  }", "}"])).apply
    function.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def apply(i, x):
        assert len(x) % 16 == 0
        y = torch.empty_like(x)
        function(i, x.data_ptr(), y.data_ptr(), len(x))
        return y

    return apply


@needs_compiler
@pytest.mark.parametrize("text", TEXTS)
def test_every_function_of_a_formula_is_torchs(text, apply):
    x = torch.tensor([0.0, 1e-30, 0.3, -0.3, 1.0, -2.0, 2.5, 19.0, -30.0, 88.0, -100.0, 1e18, -1e18])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan]), torch.linspace(-9, 9, 112)])
    if text == "x ** 1.7":  # by a logarithm, which -inf has none of
        x = x.where(x != -torch.inf, 1.0)
    got, wanted = apply(TEXTS.index(text), x), parse(text).evaluate(x.double()).float()
    # Powers of 1e18 have to be right to many digits before the last step.
    relative = 5e-6 if "**" in text else 2e-6
    torch.testing.assert_close(got, wanted, rtol=relative, atol=2e-6, equal_nan=True)


# Building.

SCRIPT = """
import logging, sys, torch
from modes_fx.kernels.masked_moe import masked_moe, reference
logging.basicConfig(format="%(name)s: %(message)s")
g = torch.Generator().manual_seed(0)
hidden, gate_up, down = (torch.randn(s, generator=g) for s in ((5, 16), (4, 32, 16), (4, 16, 16)))
scores = torch.rand(5, 2, generator=g)
experts = torch.rand(5, 4, generator=g).topk(2).indices
problem = (hidden, scores, scores, experts, None, gate_up, down, None, None)
rule = {"alpha_text": 1.0, "alpha_vision": 1.0, "tau_text": 0.5, "tau_vision": 0.5}
for _ in range(3):
    torch.testing.assert_close(masked_moe(*problem, **rule), reference(*problem, **rule))
"""


def run_script(cache, **environment):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, sorted(cache.rglob("*.so"))


@pytest.mark.parametrize("cxx", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_does_it_and_one_line_says_so(cxx, tmp_path):
    said, libraries = run_script(tmp_path, CXX=cxx)
    assert said.count("modes_fx.kernels._masked_moe_native:") == 1
    assert cxx in said and "Set CXX" in said
    assert libraries == []


def test_can_be_switched_off(tmp_path):
    assert run_script(tmp_path, MODES_FX_NATIVE="0") == ("", [])


@needs_compiler
def test_builds_once_and_leaves_nothing_else(tmp_path):
    said, libraries = run_script(tmp_path)
    assert (said, len(libraries)) == ("", 2)  # the operator and one kernel
    built = [library.stat().st_mtime_ns for library in libraries]
    assert run_script(tmp_path) == ("", libraries)
    assert built == [library.stat().st_mtime_ns for library in libraries]
    assert sorted(libraries[0].parent.iterdir()) == libraries


def test_a_formula_is_written_as_it_is_read():
    source = write_formula(parse("same(silu(float32(gate))) * clamp_max(up, 7.0)"))
    assert "v_silu" in source and "v_clamp_max(up, splat(7.0f))" in source
