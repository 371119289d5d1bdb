"""The counting interpreter against Triton's own, which runs every program and computes every element."""

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from counting import SECTOR, Launch, counting
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from modes_fx.kernels._masked_moe_triton import masked_moe_triton
from modes_fx.kernels.masked_moe import Call

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in the interpreter"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]


@pytest.fixture
def run_and_count(monkeypatch):
    """Runs a function under Triton's interpreter and returns its launches."""
    launches: list[Launch] = []
    spans: dict[tuple[int, int], str] = {}
    touched: dict[str, dict[str, set[int]]] = {}
    working = set()
    original = {name: getattr(InterpreterBuilder, name) for name in vars(InterpreterBuilder)}
    run = InterpretedFunction.run

    def counted_run(self, *args, grid, **kwargs):
        launches.append(Launch(self.fn.__name__, programs=torch.Size(grid).numel()))
        spans.clear()
        touched.clear()
        working.clear()
        for name, value in [*zip(self.arg_names, args, strict=False), *kwargs.items()]:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                spans.setdefault((storage.data_ptr(), storage.data_ptr() + storage.nbytes()), name)
        run(self, *args, grid=grid, **kwargs)
        launches[-1].working = len(working)
        for kind, sectors in touched.items():
            sizes = {name: SECTOR * len(found) for name, found in sectors.items()}
            setattr(launches[-1], f"distinct_{kind}", Counter(sizes))

    def note(kind, ptrs, mask):
        addresses = ptrs.data[mask.data]
        if not len(addresses):
            return
        (name,) = [name for (start, end), name in spans.items() if start <= addresses[0] < end]
        width = ptrs.get_element_ty().primitive_bitwidth // 8
        getattr(launches[-1], kind)[name] += len(addresses) * width
        touched.setdefault(kind, {}).setdefault(name, set()).update((addresses // SECTOR).tolist())

    def load(self, ptrs, mask, *others):
        note("loaded", ptrs, mask)
        return original["create_masked_load"](self, ptrs, mask, *others)

    def store(self, ptrs, value, mask, *others):
        note("stored", ptrs, mask)
        if mask.data.any():
            working.add(self.grid_idx)
        return original["create_masked_store"](self, ptrs, value, mask, *others)

    def dot(self, a, b, *others):
        launches[-1].flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return original["create_dot"](self, a, b, *others)

    def count(function):
        with monkeypatch.context() as patch:
            patch.setattr(InterpretedFunction, "run", counted_run)
            patch.setattr(InterpreterBuilder, "create_masked_load", load)
            patch.setattr(InterpreterBuilder, "create_masked_store", store)
            patch.setattr(InterpreterBuilder, "create_dot", dot)
            function()
        return launches

    return count


def assert_equal_counts(function, run_and_count):
    with counting() as launches:
        function()
    assert launches == run_and_count(function)
    assert any(launch.loaded for launch in launches)


def make_call(problem):
    """With the weights that are read to dispatch in float32, which is computed."""
    return Call(**problem | {"weights": problem["weights"].float()})


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 1, "slots": 2, "experts": 4},
        {"tokens": 16, "slots": 4, "experts": 8},
        {"tokens": 65, "slots": 1, "routing": "one", "skip": 0.0},
        {"tokens": 150, "experts": 2, "slots": 2, "hidden": 80, "intermediate": 144},
        {"slots": 6, "experts": 35},
        {"skip": 1.0, "modality": "text"},
        {"modality": None},
        {"hidden": 7, "intermediate": 3},
    ],
    ids=lambda shape: "-".join(f"{name}-{value}" for name, value in shape.items()) or "typical",
)
def test_counts_what_the_interpreter_executes(shape, typical, make_problem, run_and_count):
    call = make_call(make_problem(typical._replace(**shape), torch.float16))
    assert_equal_counts(lambda: masked_moe_triton(call), run_and_count)


@pytest.mark.parametrize(
    "flags",
    [
        {"bias": True, "interleaved": True},
        {"is_transposed": True, "weights_on_input": True, "renormalise": True},
        {"activation": "square(relu(x))", "width_out": 50},
    ],
    ids=str,
)
def test_counts_every_kind_of_expert(flags, typical, make_problem, run_and_count):
    call = make_call(make_problem(typical, torch.float16, **flags))
    assert_equal_counts(lambda: masked_moe_triton(call), run_and_count)


@triton.jit
def _branches(x, n, out, counter, N: tl.constexpr):
    """What makes programs of a batch go different ways: a branch, a number of turns, an atomic operation."""
    program = tl.program_id(0)
    limit = tl.load(n + program)
    if limit == 0:
        return
    i = tl.arange(0, N)
    total = tl.zeros((N,), dtype=tl.int32)
    tl.store(out + program * N + i, i)
    for turn in range(0, limit):
        # Reads what it has written: a batch that is run again must find what was there before.
        total += tl.load(out + program * N + i) + tl.load(x + turn * N + i, mask=i < limit, other=0)
        tl.store(out + program * N + i, total)
    tl.atomic_add(counter, tl.sum(total))


def test_programs_may_go_different_ways(run_and_count):
    n = torch.tensor([0, 3, 1, 0, 3, 7, 2], dtype=torch.int32)
    x = torch.arange(64, dtype=torch.int32)

    def launch():
        out, counter = torch.zeros(len(n) * 8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        _branches[(len(n),)](x, n, out, counter, N=8)
        return out, counter

    want = launch()
    with counting() as launches:
        got = launch()
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert launches[0].working == 5
    assert launches[0].loaded == Counter(
        {"n": 28, "out": 16 * 8 * 4, "x": 4 * (3 * 3 + 1 + 3 * 3 + 7 * 7 + 2 * 2), "counter": 5 * 4}
    )


@triton.jit
def _copy(x, out, stride, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    at = m[:, None] * stride + n[None, :]
    mask = (m < M - 1)[:, None] & (n > 2)[None, :]
    tl.store(out + at, tl.load(x + at, mask=mask, other=0), mask=mask & (m[:, None] != n[None, :]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("stride", [32, 33, 48, 1])
def test_sectors_of_any_stride(dtype, stride, run_and_count):
    x, out = torch.zeros(2, 2000, dtype=dtype)
    assert_equal_counts(lambda: _copy[(1,)](x, out, stride, M=8, N=32), run_and_count)


def test_a_branch_on_what_is_not_computed_is_refused():
    @triton.jit
    def branch(x, out):
        if tl.load(x).to(tl.float32) > 0:
            tl.store(out, 1)

    x, out = torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.int32)
    with counting(), pytest.raises(Exception, match="not computed"):
        branch[(1,)](x, out)


def test_nothing_stays_replaced(run_and_count):
    x, out = torch.ones(2, 16, dtype=torch.float32)
    with counting():
        _copy[(1,)](x, out, 2, M=4, N=4)
    out.zero_()
    _copy[(1,)](x, out, 4, M=4, N=4)
    assert out[3] == 1
    assert out[:3].sum() == 0
