"""One calibration over several processes: which of them measures what, and how their figures come together.

    torchrun --nproc-per-node 4 -m modes_fx calibrate MODEL --batches FILE --out PROFILE

`torch.distributed` does the work. Only a few float64 numbers are exchanged, once, over gloo, so the models
may be anywhere. Processes that hold one model together (tensor parallelism) measure the same things.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modes_fx.errors import ModesError


@dataclass(frozen=True)
class Share:
    """What one process measures of one batch.

    Attributes:
        batch: The batch's number.
        blocks: The blocks that it drops, in layer order.
        counts: Whether the batch's rows and tokens are this process's to count.
    """

    batch: int
    blocks: tuple[int, ...]
    counts: bool = True


@dataclass(frozen=True)
class World:
    """The processes that share the work.

    Attributes:
        rank: This process's number among them.
        size: How many there are.
        copies: Processes that hold one model together and do one process's work; `rank` is alike for them.
        first: Whether this process is the one that writes.
    """

    rank: int = 0
    size: int = 1
    copies: int = 1
    first: bool = True
    group: Any = None

    def shares(self, num_batches: int, num_blocks: int) -> list[Share]:
        """What this process measures, in the order of the batches.

        Batches are dealt in turn; where the last ones do not go round, their blocks are dealt too.
        """
        whole = num_batches - num_batches % self.size
        every = tuple(range(num_blocks))
        mine = [Share(batch, every) for batch in range(self.rank, whole, self.size)]
        if left := num_batches - whole:
            batch, place = whole + self.rank % left, self.rank // left
            parts = len(range(self.rank % left, self.size, left))
            # Every so many blocks, for those in the first layers take the longest.
            mine.append(Share(batch, every[place::parts], counts=place == 0))
        return [share for share in mine if share.blocks]

    def gather(self, values: Tensor) -> Tensor:
        """The values of every process, `[size, ...]` float64, the same bits everywhere."""
        values = values.double().cpu()
        if self.group is None:
            return values[None]
        everyone = [torch.empty_like(values) for _ in range(self.size * self.copies)]
        dist.all_gather(everyone, values, group=self.group)
        return torch.stack(everyone[:: self.copies])

    def agree(self, digest: str, what: str) -> None:
        """Refuse to go on unless all processes have the same `digest` (hexadecimal)."""
        # 48 bits are exact in float64.
        seen = self.gather(torch.tensor([int(digest[:12], 16)]))
        if bool((seen != seen[0]).any()):
            raise ModesError(
                f"The {self.size} processes differ in {what}; give all of them the same, for each takes its "
                "own part of it."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one process fails, all do, so that none waits for it."""
        error: BaseException | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.gather(torch.tensor([float(error is not None)]))[:, 0].nonzero().flatten().tolist()
        if error is not None:
            raise error
        if failed:
            raise ModesError(f"Process {failed[0]} of {self.size} failed; its own message says why.")

    def file(self, path: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
        """The file that this process keeps its part in, where one process would keep all in `path`."""
        if path is None or self.size * self.copies == 1:
            return path
        rank = dist.get_rank(self.group)
        return f"{os.fspath(path)}.{rank}-of-{self.size * self.copies}"


@contextmanager
def world_of(model: nn.Module) -> Iterator[World]:
    """The processes that `torch.distributed` or torchrun has started; this one alone if there are none.

    Args:
        model: What it is loaded as decides who works together, see `_copies`.
    """
    launched = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    ours = launched and dist.is_available() and not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield World()
            return
        copies, rank = _copies(model), dist.get_rank()
        everyone = dist.new_group(backend="gloo")
        try:
            yield World(rank // copies, dist.get_world_size() // copies, copies, rank == 0, everyone)
        finally:
            dist.destroy_process_group(everyone)
    finally:
        if ours:
            dist.destroy_process_group()


def _copies(model: nn.Module) -> int:
    """Neighbouring processes that hold one model together, as transformers' parallel loading sets it up."""
    mesh = getattr(model, "_device_mesh", None)
    return 1 if mesh is None else int(mesh.size())


def total(values: Tensor) -> Any:
    """The sum over processes of what `World.gather` gave, as nested lists."""
    # One after the other, so that every process adds in the same order.
    whole = torch.zeros_like(values[0])
    for part in values:
        whole = whole + part
    return whole.tolist()
