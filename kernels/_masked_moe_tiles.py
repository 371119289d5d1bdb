"""How the kernels of `_masked_moe_triton` divide their work, for each architecture, as data.

None has been timed: no GPU was at hand. Each was chosen by counting what it holds, and is compiled ahead of
time for its architecture in tests/numerics/test_masked_moe_aot.py, which checks that it spills nothing, and
that `per_sm` programs fit on a multiprocessor at a time. Whoever has a GPU: `bench/gpu.py`.
"""

from typing import NamedTuple

import torch

from modes_fx.kernels._masked_moe_triton_decode import MAX_PAIRS, MAX_TOKENS


class Tile(NamedTuple):
    """How one program of an expert kernel works."""

    widths: tuple[int, ...]  # pairs it may take, the columns of its product; empty in decode
    block_w: int  # rows of expert weights, the rows of its product
    block_r: int  # length of one step of the reduction
    num_warps: int
    num_stages: int  # loads in flight, in steps
    per_sm: int  # programs that fit on a multiprocessor at a time


class Tiles(NamedTuple):
    """The tiles of one class of calls, and why."""

    why: str
    gate_up: Tile
    down: Tile


FINE = (8, 16, 24, 32, 40, 48, 64, 128)
COARSE = (16, 32, 64, 128)

TABLE: dict[tuple[int, str], Tiles] = {}
for arch in (80, 90, 100):
    TABLE[arch, "some"] = Tiles("", Tile(FINE, 64, 64, 4, 3, 2), Tile(FINE, 64, 64, 4, 3, 2))
    TABLE[arch, "many"] = Tiles("", Tile(COARSE, 128, 64, 8, 3, 1), Tile(COARSE, 128, 64, 8, 3, 1))
    TABLE[arch, "odd"] = Tiles("", Tile((8, 16), 64, 32, 4, 2, 1), Tile((8, 16), 64, 32, 4, 2, 1))
    TABLE[arch, "float32"] = Tiles("", Tile((8, 16, 32), 32, 16, 4, 2, 1), Tile((8, 16, 32), 32, 16, 4, 2, 1))
    TABLE[arch, "decode"] = Tiles("", Tile((), 16, 256, 4, 3, 2), Tile((), 16, 256, 4, 10, 2))
    TABLE[arch, "decode float32"] = Tiles("", Tile((), 16, 64, 4, 3, 2), Tile((), 16, 64, 4, 10, 2))


def is_decode(num_tokens: int, num_slots: int) -> bool:
    """Whether a call takes the two kernels for few tokens."""
    return num_tokens <= MAX_TOKENS and num_tokens * num_slots <= MAX_PAIRS


def choose_class(dtype: torch.dtype, num_pairs: int, num_experts: int, *sizes: int) -> str:
    """The class of a call that is no decode, from what the host knows without asking the device.

    `sizes`: H, I and H_out.
    """
    if dtype == torch.float32:
        return "float32"
    # Odd sizes, which no published model has, cannot be copied 16 bytes at a time; their loads go through
    # registers, and the larger tiles would spill.
    if any(size % 16 for size in sizes):
        return "odd"
    return "many" if num_pairs > 256 * num_experts else "some"


def max_tiles(num_pairs: int, num_experts: int, width: int) -> int:
    """The most tiles that any routing needs: each expert with a pair may leave one tile partly empty."""
    return min(num_pairs, (num_pairs + min(num_experts, num_pairs) * (width - 1)) // width)


def architecture(device: torch.device) -> int:
    """The architecture of `TABLE` for a device; what is no GPU (the interpreter, meta tensors) is taken as 90."""
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    # Every other GPU, newer ones too, has at least what the tiles of 80 need.
    return {9: 90, 10: 100}.get(major, 80)
