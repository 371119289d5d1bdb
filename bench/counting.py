"""What Triton kernels would execute, load and store, counted without multiplying anything.

    with counting() as launches:
        masked_moe_triton(call)
    launches[0].kernel, launches[0].flops, launches[0].loaded, ...

Triton's interpreter runs one program after another and computes every element, which takes hours for real
sizes. Here its builder is replaced by one that runs hundreds of programs of a launch at once and knows only
what decides where memory is read and what is branched on: integers, booleans and float32. Elements of 16-bit
floating point (hidden states, weights of experts, results) are counted but neither loaded nor computed, so
their tensors may be as large as a model's: memory that `torch.empty` gave and nobody touches.

Pointers and masks of a tile are a sum, or a conjunction, of a part that varies with the row and one that
varies with the column; they are kept as these parts (`Block.terms`), not written out. Where programs of a
batch disagree on a branch, what they have stored is taken back and the batch is run again in groups that
agree. Nothing is sampled or extrapolated, and tests/bench/test_counting.py compares with Triton's own
interpreter.
"""

# The builder's methods have the names and parameters that Triton calls them by.
# mypy: disable-error-code="no-untyped-def"

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

# Triton decides once, when it is imported. Who asked for compiled kernels has them, and cannot count.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

BATCH = 512  # programs at a time; a matter of memory, not of the result
SECTOR = 32  # bytes; the least that one of NVIDIA's GPUs moves between DRAM and its L2 cache


@dataclass
class Launch:
    """What one launch did. Bytes are those under the masks, program by program, as if nothing were cached.

    `distinct_*` are bytes of the sectors touched, each counted once: what has to come from DRAM, or go there,
    if the caches held everything else.
    """

    kernel: str
    programs: int = 0
    working: int = 0  # programs that stored something
    flops: int = 0  # 2 M N K of a `tl.dot`, 2 n of a `tl.sum` over n elements that are not computed here
    loaded: Counter[str] = field(default_factory=Counter)  # bytes by argument
    stored: Counter[str] = field(default_factory=Counter)
    distinct_loaded: Counter[str] = field(default_factory=Counter)
    distinct_stored: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Launch") -> None:
        for name in ("programs", "working", "flops", *KINDS, *map("distinct_{}".format, KINDS)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


KINDS = ("loaded", "stored")


class Memory:
    """A tensor's storage during one launch, and which of its sectors were touched."""

    def __init__(self, name: str, storage: torch.UntypedStorage) -> None:
        self.name = name
        self.start = storage.data_ptr()  # a multiple of 64, as torch allocates
        self.sectors = {kind: np.zeros(-(-storage.nbytes() // SECTOR), dtype=bool) for kind in KINDS}


class Diverged(Exception):
    """Programs of one batch disagree on a branch; `groups` agree."""

    def __init__(self, groups: list[np.ndarray]) -> None:
        self.groups = groups


class Alone(Exception):
    """An operation that several programs cannot do at once."""


class Block:
    """A value of each program of the batch: the sum, or the conjunction, of `terms`.

    A term has the batch as its first axis, then those of `shape`; along an axis of size 1 it is constant.
    There are none where the elements are not known. `memory` is what a pointer points into.
    """

    def __init__(
        self, shape: Sequence[int], terms: list[np.ndarray] | None, memory: Memory | None = None
    ) -> None:
        self.shape = tuple(shape)
        self.memory = memory
        self.terms = terms if terms is None else _merge(terms)

    @property
    def itemsize(self) -> int:  # asked for by TensorHandle
        return self.terms[0].itemsize if self.terms else 0

    def dense(self) -> np.ndarray:
        """All in one array, whose axes may have size 1 still."""
        if self.terms is None:
            raise NotImplementedError(
                "A branch, an address or a mask depends on 16-bit floating point, which is not computed here."
            )
        joined = self.terms[0]
        for term in self.terms[1:]:
            joined = _join(joined, term)
        return joined

    def map(self, shape: Sequence[int], move: Callable[[np.ndarray], np.ndarray]) -> "Block":
        """The same elements otherwise arranged, where that can be said of each term."""
        terms = self.terms if self.terms is None else [move(term) for term in self.terms]
        return Block(shape, terms, self.memory)


def _join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a & b if a.dtype == bool else a + b


def _axes(term: np.ndarray) -> set[int]:
    """Along which axes of the block a term varies; that of the batch is not one."""
    return {axis for axis in range(1, term.ndim) if term.shape[axis] > 1}


def _merge(terms: list[np.ndarray]) -> list[np.ndarray]:
    """Fewer terms, as long as none varies along more axes than one of its parts did."""
    merged: list[np.ndarray] = []
    for term in sorted(terms, key=lambda term: -len(_axes(term))):
        for i, other in enumerate(merged):
            if _axes(term) <= _axes(other):
                merged[i] = _join(other, term)
                break
        else:
            merged.append(term)
    return merged


def _block(handle: Any) -> Block:
    """What a handle holds. Triton's own constants are arrays of one element, which is a batch of one."""
    data = handle.data if isinstance(handle, TensorHandle) else handle
    return data if isinstance(data, Block) else Block(data.shape[1:], [data])


def _elementwise(op: Callable[..., np.ndarray], dtype: np.dtype, *handles: Any) -> Block:
    blocks = [_block(handle) for handle in handles]
    shape = np.broadcast_shapes(*(block.shape for block in blocks))
    if any(block.terms is None for block in blocks):
        return Block(shape, None)
    if (op is np.bitwise_and and dtype.kind == "b") or (op is np.add and dtype.kind in "iu"):
        return Block(shape, [_aligned(term, len(shape)) for block in blocks for term in block.terms or []])
    # The dtype is that of Triton's type: numpy widens by rules of its own.
    values = op(*(_aligned(block.dense(), len(shape)) for block in blocks))
    return Block(shape, [values.astype(dtype, copy=False)])


def _aligned(term: np.ndarray, ndim: int) -> np.ndarray:
    missing = ndim + 1 - term.ndim
    return term.reshape(term.shape[:1] + (1,) * missing + term.shape[1:])


class CountingBuilder(InterpreterBuilder):
    """Replaces the methods of Triton's; the state of a batch is in the attributes below."""

    launches: list[Launch]
    launch: Launch  # of the batch
    programs: np.ndarray  # [B, 3], the program ids of the batch
    stored_something: np.ndarray  # [B], bool
    undo: list[Callable[[], None]]

    # Programs.

    def create_get_program_id(self, axis):
        return TensorHandle(Block((), [self.programs[:, axis]]), tl.int32)

    # Elementwise.

    def unary_op(self, arg, op):
        return self._apply(op, arg.dtype.scalar, arg)

    def binary_op(self, lhs, rhs, op):
        comparison = op in COMPARISONS
        return self._apply(op, tl.int1 if comparison else lhs.dtype.scalar, lhs, rhs)

    def ternary_op(self, lhs, rhs, other, op):
        return self._apply(op, other.dtype.scalar, lhs, rhs, other)

    def create_idiv(self, lhs, rhs):
        return self._apply(lambda a, b: (a - np.fmod(a, b)) // b, lhs.dtype.scalar, lhs, rhs)

    def create_ashr(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.right_shift)

    def create_fma(self, x, y, z):
        return self._apply(lambda a, b, c: a * b + c, z.dtype.scalar, x, y, z)

    def create_fabs(self, arg):
        return self.unary_op(arg, np.abs)

    def create_erf(self, arg):
        return TensorHandle(Block(_block(arg).shape, None), arg.dtype.scalar)

    def create_rsqrt(self, arg):
        return self.unary_op(arg, lambda a: 1 / np.sqrt(a))

    def cast_impl(self, src, dst_type):
        scalar = dst_type.scalar
        if scalar.is_floating() and scalar.primitive_bitwidth < 32:
            return TensorHandle(Block(_block(src).shape, None), scalar)
        return self._apply(lambda a: a, scalar, src)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return self.cast_impl(src, dst_type)

    def create_bitcast(self, src, dst_type):
        numpy_type = interpreter._get_np_dtype(dst_type)
        block = _block(src)
        return TensorHandle(block.map(block.shape, lambda term: term.view(numpy_type)), dst_type.scalar)

    def _apply(self, op, dtype, *handles):
        return TensorHandle(_elementwise(op, interpreter._get_np_dtype(dtype), *handles), dtype)

    # Shapes. Axis 0 of an array is the batch.

    def create_make_range(self, ret_ty, start, stop):
        return TensorHandle(Block((stop - start,), [np.arange(start, stop, dtype=np.int32)[None]]), tl.int32)

    def create_splat(self, ret_ty, arg):
        block, shape = _block(arg), ret_ty.shape
        return TensorHandle(block.map(shape, lambda term: _aligned(term, len(shape))), arg.dtype.scalar)

    def create_unsplat(self, arg):
        return TensorHandle(_block(arg).map((), lambda term: term.reshape(term.shape[0])), arg.dtype.scalar)

    def create_expand_dims(self, arg, axis):
        block = _block(arg)
        shape = (*block.shape[:axis], 1, *block.shape[axis:])
        return TensorHandle(block.map(shape, lambda term: np.expand_dims(term, axis + 1)), arg.dtype.scalar)

    def create_broadcast(self, arg, shape):
        block = _block(arg)
        return TensorHandle(block.map(shape, lambda term: _aligned(term, len(shape))), arg.dtype.scalar)

    def create_trans(self, arg, perm):
        block = _block(arg)
        order = [0, *(axis + 1 for axis in perm)]
        shape = [block.shape[axis] for axis in perm]
        return TensorHandle(block.map(shape, lambda term: term.transpose(order)), arg.dtype.scalar)

    def create_reshape(self, arg, shape, allow_reorder):
        return self._rearrange(arg, shape, lambda a: a.reshape(len(a), *shape))

    def create_join(self, lhs, rhs):
        shape = (*_block(lhs).shape, 2)
        return self._gather_up(lambda *parts: np.stack(parts, axis=-1), shape, lhs, rhs)

    def create_cat(self, lhs, rhs):
        shape = (_block(lhs).shape[0] + _block(rhs).shape[0],)
        return self._gather_up(lambda *parts: np.concatenate(parts, axis=1), shape, lhs, rhs)

    def create_split(self, val):
        shape = _block(val).shape[:-1]
        return tuple(self._rearrange(val, shape, lambda a, i=i: a[..., i]) for i in range(2))

    def create_gather(self, src, indices, axis):
        shape = _block(indices).shape
        return self._gather_up(lambda a, at: np.take_along_axis(a, at, axis + 1), shape, src, indices)

    def _rearrange(self, arg, shape, move):
        return self._gather_up(move, shape, arg)

    def _gather_up(self, move, shape, *args):
        """`move` the elements of `args`, written out in full but for the batch if it is the same for all."""
        blocks = [_block(arg) for arg in args]
        dtype = args[0].dtype.scalar
        if any(block.terms is None for block in blocks):
            return TensorHandle(Block(shape, None), dtype)
        arrays = [_in_full(block) for block in blocks]
        batch = max(len(array) for array in arrays)
        arrays = [np.broadcast_to(array, (batch, *array.shape[1:])) for array in arrays]
        return TensorHandle(Block(shape, [move(*arrays)]), dtype)

    # Products and sums.

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        shape = _block(d).shape
        self.launch.flops += 2 * prod(shape) * _block(a).shape[-1] * len(self.programs)
        return TensorHandle(Block(shape, None), d.dtype.scalar)

    def reduce(self, x, axis, combine_fn, keep_dims):
        """`tl.reduce` with what `tl.sum`, `tl.max` and `tl.min` call it with."""
        block, dtype = _block(x.handle), x.dtype
        if combine_fn not in REDUCTIONS:
            raise NotImplementedError(f"A reduction by {combine_fn} cannot be counted; add it to REDUCTIONS.")
        axes = range(len(block.shape)) if axis is None else [axis % len(block.shape)]
        shape = [size for i, size in enumerate(block.shape) if i not in axes]
        if keep_dims:
            shape = [1 if i in axes else size for i, size in enumerate(block.shape)]
        terms = None
        if block.terms is None:
            self.launch.flops += 2 * prod(block.shape) * len(self.programs)
        else:
            values = block.dense()
            # Only the reduced axes have to be there in full.
            sizes = [block.shape[i] if i in axes else values.shape[i + 1] for i in range(len(block.shape))]
            values = np.broadcast_to(values, (len(values), *sizes))
            values = REDUCTIONS[combine_fn](values, axis=tuple(i + 1 for i in axes), keepdims=keep_dims)
            terms = [values.astype(interpreter._get_np_dtype(dtype), copy=False)]
        return _tensor(Block(shape, terms), dtype, shape)

    def scan(self, x, axis, combine_fn, reverse):
        """`tl.associative_scan` with what `tl.cumsum` calls it with."""
        block, dtype = _block(x.handle), x.dtype
        if combine_fn is not tl.standard._sum_combine:
            raise NotImplementedError(f"A scan by {combine_fn} cannot be counted.")
        if block.terms is None:
            return _tensor(Block(block.shape, None), dtype, block.shape)
        values = _in_full(block)
        at = axis % len(block.shape) + 1
        values = np.flip(np.flip(values, at).cumsum(at), at) if reverse else values.cumsum(at)
        values = values.astype(interpreter._get_np_dtype(dtype), copy=False)
        return _tensor(Block(block.shape, [values]), dtype, block.shape)

    # Memory.

    def create_addptr(self, ptr, offset):
        block = _block(ptr)
        width = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        ndim = max(len(block.shape), len(_block(offset).shape))
        if block.terms is None or _block(offset).terms is None:
            _block(offset).dense()
        terms = [_aligned(term, ndim) for term in block.terms or []]
        # Negative offsets wrap around twice.
        terms += [
            _aligned(term.astype(np.uint64) * np.uint64(width), ndim) for term in _block(offset).terms or []
        ]
        shape = np.broadcast_shapes(block.shape, _block(offset).shape)
        return TensorHandle(Block(shape, terms, block.memory), ptr.dtype)

    def create_load(self, ptr, cache_policy, is_volatile):
        return self.create_masked_load(ptr, EVERYTHING, None, cache_policy, is_volatile)

    def create_store(self, ptr, val, cache_policy):
        return self.create_masked_store(ptr, val, EVERYTHING, cache_policy)

    def create_masked_load(self, ptrs, mask, other, cache_policy, is_volatile):
        block, element = _block(ptrs), ptrs.get_element_ty()
        self._count("loaded", block, _block(mask), element)
        if element.is_floating() and element.primitive_bitwidth < 32:
            return TensorHandle(Block(block.shape, None), element)
        numpy_type = interpreter._get_np_dtype(element)
        default = np.zeros((1,) * (len(block.shape) + 1), numpy_type)
        if other is not None:
            default = _aligned(_block(other).dense(), len(block.shape))
        arrays = np.broadcast_arrays(block.dense(), _aligned(_block(mask).dense(), len(block.shape)), default)
        arrays = [np.ascontiguousarray(array) for array in arrays]
        values = interpreter._interpreter.load(*arrays, numpy_type)
        return TensorHandle(Block(block.shape, [values]), element)

    def create_masked_store(self, ptrs, value, mask, cache_policy):
        block, element = _block(ptrs), ptrs.get_element_ty()
        self._count("stored", block, _block(mask), element)
        if _block(value).terms is None or (element.primitive_bitwidth < 32 and element.is_floating()):
            return
        ndim = len(block.shape)
        arrays = [block.dense(), _aligned(_block(value).dense(), ndim), _aligned(_block(mask).dense(), ndim)]
        ptr, val, active = (np.ascontiguousarray(array) for array in np.broadcast_arrays(*arrays))
        # A value of another width than the memory's would write over its neighbours.
        val = val.astype(interpreter._get_np_dtype(element), copy=False)
        before = interpreter._interpreter.load(ptr, active, np.zeros_like(val), val.dtype)
        self.undo.append(lambda: interpreter._interpreter.store(ptr, before, active))
        interpreter._interpreter.store(ptr, val, active)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        if len(self.programs) > 1:
            raise Alone
        block, element = _block(ptr), ptr.get_element_ty()
        for kind in KINDS:
            self._count(kind, block, _block(mask), element)
        if _block(val).terms is None:
            return TensorHandle(Block(block.shape, None), element)
        arrays = np.broadcast_arrays(_in_full(block), _in_full(_block(val)), _in_full(_block(mask)))
        before = interpreter._interpreter.atomic_rmw(
            self.ir_rmw_op_to_interpreter_rmw_op[rmwOp],
            *(np.ascontiguousarray(array) for array in arrays),
            self.ir_sem_to_interpreter_sem[sem],
        )
        return TensorHandle(Block(block.shape, [before]), element)

    def _count(self, kind: str, ptrs: Block, mask: Block, element: Any) -> None:
        if ptrs.memory is None:
            raise NotImplementedError("A pointer that is not an argument plus an offset cannot be counted.")
        num = _per_program(mask, ptrs.shape)
        if kind == "stored":
            self.stored_something |= num > 0
        total = int(np.broadcast_to(num, len(self.programs)).sum())
        getattr(self.launch, kind)[ptrs.memory.name] += total * max(1, element.primitive_bitwidth // 8)
        self._touch(ptrs.memory.sectors[kind], ptrs, mask, ptrs.memory.start)

    def _touch(self, sectors: np.ndarray, ptrs: Block, mask: Block, base: int) -> None:
        """Mark the sectors under the mask."""
        ndim = len(ptrs.shape)
        # In bytes from the start of the tensor; masked pointers may lie anywhere.
        terms = [term.astype(np.int64) for term in ptrs.terms or []]
        terms[0] = terms[0] - base
        masks = [_aligned(term, ndim) for term in mask.terms or []]
        for i, term in enumerate(terms):
            others = terms[:i] + terms[i + 1 :]
            # Where all the others are whole sectors, only this term says which parts of one are touched; and
            # where it is the same for all programs, each sector has to be looked at once.
            if (
                len(term) == 1
                and len(_axes(term)) == 1
                and others
                and not any((o % SECTOR).any() for o in others)
            ):
                (axis,) = _axes(term)
                mine = [m for m in masks if _axes(m) == {axis}]
                rest = [m for m in masks if axis not in _axes(m)]
                if len(mine) + len(rest) < len(masks) or any(len(m) > 1 for m in mine):
                    continue
                active = np.ones(term.shape, bool)
                for m in mine:
                    active = active & m
                parts = np.unique(term[active] // SECTOR).reshape(
                    [-1 if a == axis else 1 for a in range(ndim + 1)]
                )
                terms, masks = [parts * SECTOR, *others], rest
                break
        where = terms[0]
        for term in terms[1:]:
            where = where + term
        active = np.ones((1,) * (ndim + 1), bool)
        for m in masks:
            active = active & m
        where, active = np.broadcast_arrays(where, active)
        sectors[where[active] // SECTOR] = True


def _per_program(mask: Block, shape: tuple[int, ...]) -> np.ndarray:
    """How many elements of a block of `shape` are under the mask: [B], or [1] if the same for all."""
    ndim = len(shape)
    terms = [_aligned(term, ndim) for term in mask.terms or [mask.dense()]]
    if sum(len(_axes(term)) for term in terms) > len(set().union(*map(_axes, terms))):
        terms = [_aligned(mask.dense(), ndim)]
    varying = set().union(*map(_axes, terms))
    # Terms vary along different axes, so that their counts multiply; so do the sizes of all other axes.
    num = np.array([prod(size for axis, size in enumerate(shape, 1) if axis not in varying)])
    for term in terms:
        num = num * term.reshape(len(term), -1).sum(axis=1)
    return num


def _in_full(block: Block) -> np.ndarray:
    values = _aligned(block.dense(), len(block.shape))
    return np.broadcast_to(values, (len(values), *block.shape))


def _tensor(block: Block, dtype: Any, shape: Sequence[int]) -> Any:
    kind = tl.block_type(dtype, list(shape)) if shape else dtype
    return tl.tensor(TensorHandle(block, dtype.scalar), kind)


COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
REDUCTIONS = {
    tl.standard._sum_combine: np.sum,
    tl.standard._elementwise_max: np.max,
    tl.standard._elementwise_min: np.min,
}
EVERYTHING = TensorHandle(np.ones(1, dtype=bool), tl.int1)


def _agreed(x: Any) -> Any:
    """The value of a scalar on which all programs of the batch agree."""
    values = _block(x.handle).dense().reshape(-1)
    distinct = np.unique(values)
    if len(distinct) > 1:
        raise Diverged([np.flatnonzero(values == value) for value in distinct])
    return distinct[0].item()


def _patch_tensor(tensor: Any, scope: Any) -> None:
    scope.set_attr(tensor, "__index__", lambda self: int(_agreed(self)))
    # As in the interpreter, a block is true: Triton asks whether an optional argument was given.
    scope.set_attr(tensor, "__bool__", lambda self: bool(self.type.is_block()) or bool(_agreed(self)))
    scope.set_attr(tensor, "T", property(lambda self: tl.trans(self)))


def _patch_reductions(scope: Any) -> None:
    builder = interpreter.interpreter_builder

    def reduce(input, axis, combine_fn, keep_dims=False, **_):
        return builder.reduce(input, axis, combine_fn, keep_dims)

    def scan(input, axis, combine_fn, reverse=False, **_):
        return builder.scan(input, axis, combine_fn, reverse)

    for module in (tl, tl.core):
        scope.set_attr(module, "reduce", reduce)
        scope.set_attr(module, "associative_scan", scan)


def _run(self: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of `InterpretedFunction.run`: launch, and count."""
    builder: Any = interpreter.interpreter_builder
    names = inspect.signature(self.fn).parameters
    options = {name: value for name, value in kwargs.items() if name in names}
    given = inspect.getcallargs(self.fn, *args, **options)
    constexprs = {name for name, parameter in names.items() if "constexpr" in str(parameter.annotation)}
    memories: dict[int, Memory] = {}
    arguments = {}
    for name, value in given.items():
        arguments[name] = value if name in constexprs else interpreter._implicit_cvt(value)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            memory = memories.setdefault(storage.data_ptr(), Memory(name, storage))
            arguments[name].handle.data = Block((), [arguments[name].handle.data], memory)
    sizes = grid(given) if callable(grid) else grid
    sizes = (*sizes, 1, 1)[:3]
    builder.set_grid_dim(*sizes)
    launch = Launch(self.fn.__name__)
    builder.launches.append(launch)
    everyone = np.stack(np.unravel_index(np.arange(prod(sizes)), sizes), axis=1).astype(np.int32)
    batches = [everyone[first : first + BATCH] for first in range(0, len(everyone), BATCH)][::-1]
    body = self.rewrite()
    while batches:
        programs = batches.pop()
        builder.programs, builder.undo = programs, []
        builder.launch = Launch(self.fn.__name__, programs=len(programs))
        builder.stored_something = np.zeros(len(programs), bool)
        scope = interpreter._patch_lang(self.fn)
        try:
            body(**arguments)
        except (Diverged, Alone, interpreter.InterpreterError) as error:
            cause = _cause(error)
            if not isinstance(cause, Diverged | Alone):
                raise
            for take_back in reversed(builder.undo):
                take_back()
            if isinstance(cause, Diverged):
                batches += [programs[group] for group in cause.groups[::-1]]
            else:
                batches += [program[None] for program in programs[::-1]]
            continue
        finally:
            scope.restore()
        builder.launch.working = int(builder.stored_something.sum())
        launch.add(builder.launch)
    for memory in memories.values():
        for kind, touched in memory.sectors.items():
            if touched.any():
                getattr(launch, f"distinct_{kind}")[memory.name] = SECTOR * int(touched.sum())


def _cause(error: BaseException) -> BaseException:
    """What a function of Triton's that a kernel called has raised."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Count what is launched inside, in order. Outputs of 16 bits are not set, for lack of being computed."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton compiles kernels here, and what is compiled is not counted; set TRITON_INTERPRET=1."
        )
    launches: list[Launch] = []
    replaced: list[tuple[Any, str, Any]] = [
        (InterpretedFunction, "run", _run),
        (interpreter, "_patch_lang_tensor", _patch_tensor),
        (interpreter, "_patch_reduce_scan", _patch_reductions),
        (InterpreterBuilder, "launches", launches),
        *(
            (InterpreterBuilder, *item)
            for item in vars(CountingBuilder).items()
            if not item[0].startswith("__")
        ),
    ]
    missing = object()
    before = [(owner, name, getattr(owner, name, missing)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield launches
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is missing else setattr(owner, name, value)
