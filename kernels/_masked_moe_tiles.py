"""How the kernels of `_masked_moe_triton` divide their work, by class of calls and architecture, as data.

None of it has been timed: no GPU was at hand. The tiles were chosen by counting, and are compiled ahead of
time (tests/numerics/test_masked_moe_aot.py), which shows that nothing spills and that `per_sm` programs fit
on a multiprocessor. `bench/tune.py` times other tiles where there is a GPU; what wins goes in here, with the
shape and the GPU it won on.
"""

from typing import NamedTuple

import torch

from modes_fx.kernels._masked_moe_triton_decode import MAX_PAIRS, MAX_TOKENS


class Tile(NamedTuple):
    """How one program of an expert kernel works."""

    widths: tuple[int, ...]  # pairs it may take, the columns of its product; few tokens have no choice
    block_w: int  # rows of expert weights, the rows of its product
    block_r: int  # length of one step of the reduction
    num_warps: int
    num_stages: int  # steps that are loaded ahead
    per_sm: int  # programs that fit on a multiprocessor at the same time


class Tiles(NamedTuple):
    """The tiles of a class of calls."""

    gate_up: Tile
    down: Tile


# Multiples of 8 where experts have that few pairs; the rest is rare enough to be rounded up.
FINE = (8, 16, 24, 32, 40, 48, 64, 128)
COARSE = (16, 32, 64, 128)

TABLE: dict[tuple[str, int], Tiles] = {
    # Up to 512 pairs for each expert before skipping: prompts up to 4096 tokens of Qwen3-VL-30B-A3B (128
    # experts, top-8, so 31 pairs an expert at 88 %) and Kimi-VL-A3B (64, top-6; 46). Weights are what moves:
    # 64 rows leave room for two programs and their loads in flight, and still allow 128 columns where
    # nothing is skipped. The 128 columns of gate and up fill the registers of a program (255 on sm_80 and
    # sm_90), shared memory holds two programs (3 stages of 24 and 32 KiB).
    ("some", 80): Tiles(Tile(FINE, 64, 64, 4, 3, per_sm=2), Tile(FINE, 64, 64, 4, 4, per_sm=2)),
    # Down has one product and so room for twice the rows, which halves how often `inner` is read.
    ("some", 90): Tiles(Tile(FINE, 64, 64, 4, 3, per_sm=2), Tile(FINE, 128, 64, 8, 3, per_sm=2)),
    # Not 128 rows: tcgen05 multiplies 128 rows by 16, 32, ... columns, and Triton 3.9 emits 8 all the same.
    ("some", 100): Tiles(Tile(FINE, 64, 64, 4, 3, per_sm=2), Tile(FINE, 64, 64, 4, 3, per_sm=3)),
    # More: prompts of 16384 tokens of Qwen3-VL-30B-A3B (1024 pairs an expert, 123 at 88 %). Tensor cores are
    # the limit, so products of 128 x 128, by 8 warps: two of them fill the registers of a multiprocessor.
    # On sm_80, where gate and up leave no register, longer steps would spill two (Kimi-VL-A3B).
    ("many", 80): Tiles(Tile(COARSE, 128, 32, 8, 4, per_sm=1), Tile(COARSE, 128, 64, 8, 3, per_sm=1)),
    ("many", 90): Tiles(Tile(COARSE, 128, 64, 8, 3, per_sm=1), Tile(COARSE, 128, 64, 8, 3, per_sm=2)),
    ("many", 100): Tiles(Tile(COARSE, 128, 64, 8, 3, per_sm=1), Tile(COARSE, 128, 64, 8, 3, per_sm=1)),
    # Up to 16 tokens: bytes alone. 16 rows a program, the least that fills a product, make 48 programs of an
    # expert of Qwen3-VL-30B-A3B, so that one kept expert spreads over a third of the multiprocessors; steps
    # of 256 keep 16 KiB of weights in flight a stage. The stages of down count for the list of experts too,
    # which is read before the weights: 10 make 4 buffers of weights (64 KiB).
    ("decode", 80): Tiles(Tile((), 16, 256, 4, 3, per_sm=3), Tile((), 16, 256, 4, 10, per_sm=2)),
    ("decode", 90): Tiles(Tile((), 16, 256, 4, 3, per_sm=3), Tile((), 16, 256, 4, 10, per_sm=3)),
    ("decode", 100): Tiles(Tile((), 16, 256, 4, 3, per_sm=3), Tile((), 16, 256, 4, 10, per_sm=3)),
}
# Exact float32 products do not run on tensor cores, and hold operands in registers: the same everywhere.
_FLOAT32 = Tile((8, 16, 32, 64), 64, 16, 8, 3, per_sm=2)
_FLOAT32_DECODE = Tiles(Tile((), 16, 64, 4, 3, per_sm=4), Tile((), 16, 64, 4, 10, per_sm=4))
# Odd sizes, which no published model has, cannot be copied 16 bytes at a time; their loads go through
# registers, and larger tiles would spill.
_ODD = Tile((8, 16), 64, 32, 4, 2, per_sm=3)
for _arch in (80, 90, 100):
    TABLE["float32", _arch] = Tiles(_FLOAT32, _FLOAT32)
    TABLE["float32 decode", _arch] = _FLOAT32_DECODE
    TABLE["odd", _arch] = Tiles(_ODD, _ODD)


def is_decode(num_tokens: int, num_slots: int) -> bool:
    """Whether a call takes the two kernels for few tokens."""
    return num_tokens <= MAX_TOKENS and num_tokens * num_slots <= MAX_PAIRS


def tiles_for_few_tokens(arch: int, dtype: torch.dtype) -> Tiles:
    """The tiles for a call of few tokens."""
    return TABLE["float32 decode" if dtype == torch.float32 else "decode", arch]


def choose_tiles(arch: int, dtype: torch.dtype, num_pairs: int, num_experts: int, *sizes: int) -> Tiles:
    """The tiles for any other call, from what the host knows without asking the device.

    `sizes`: H, I and H_out.
    """
    if dtype == torch.float32:
        kind = "float32"
    elif any(size % 16 for size in sizes):
        kind = "odd"
    else:
        kind = "many" if num_pairs > 512 * num_experts else "some"
    return TABLE[kind, arch]


def max_tiles(num_pairs: int, num_experts: int, width: int) -> int:
    """The most tiles that any routing needs: each expert with a pair may leave one tile partly empty."""
    # Not `min`, which would fix a symbolic number of pairs to one side.
    partly_empty: int = torch.sym_min(num_experts, num_pairs)
    most: int = torch.sym_min(num_pairs, (num_pairs + partly_empty * (width - 1)) // width)
    return most


def architecture(device: torch.device) -> int:
    """The architecture of `TABLE` whose tiles a device takes: 80, 90 or 100."""
    # The interpreter and meta tensors have none.
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    # Others, consumer GPUs that are newer too, have what the tiles of 80 need, if not always twice.
    return {9: 90, 10: 100}.get(major, 80)
