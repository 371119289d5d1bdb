"""What a calibration has measured so far, and the file that lets a killed one go on."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from modes_fx.errors import ProfileError
from modes_fx.profile import write_atomically

FORMAT = "modes_fx.calibration"
# Longest time between two writes, as long as one forward pass takes less.
SAVE_SECONDS = 20.0


@dataclass(frozen=True)
class State:
    """All that a killed calibration needs to go on to the same bits.

    Attributes:
        key: What must not have changed: the model, the method, the token ids.
        batches: `batch_digest` of every batch that is done, in order.
        num_samples, num_tokens: Rows and answer tokens of those.
        kl_sums: Per block and per thing dropped, the sum over answer tokens, nats.
        weight_scales: Per block, (number of the batch, its `weight_scale`) of the first batch that gave the
            block tokens; None before.
        under_way: `batch_digest` of the batch that was being measured, "" between batches.
        partial: Like `kl_sums`, of that batch alone; None where it is not measured yet.
    """

    key: dict[str, Any]
    batches: list[str]
    num_samples: int
    num_tokens: int
    kl_sums: list[list[float]]
    weight_scales: list[list[float] | None]
    under_way: str = ""
    partial: list[list[float | None]] | None = None

    @classmethod
    def fresh(cls, key: dict[str, Any], num_blocks: int, num_dropped: int) -> "State":
        """Nothing measured yet."""
        return cls(key, [], 0, 0, [[0.0] * num_dropped for _ in range(num_blocks)], [None] * num_blocks)

    def with_partial(self, digest: str, block: int, column: int, kl: float) -> "State":
        """One more figure of the batch under way."""
        rows = self.partial if self.under_way == digest else None
        rows = [list(row) for row in rows] if rows else [[None] * len(row) for row in self.kl_sums]
        rows[block][column] = kl
        return replace(self, under_way=digest, partial=rows)

    def measured(self, digest: str, block: int, column: int) -> float | None:
        """What `with_partial` was given, or None."""
        return self.partial[block][column] if self.partial and self.under_way == digest else None

    def with_batch(
        self,
        digest: str,
        kl_sums: list[list[float]],
        weight_scales: list[list[float] | None],
        num_samples: int,
        num_tokens: int,
    ) -> "State":
        """A whole batch more. Sums are always added batch by batch, so a resumed run has the same bits."""
        sums = [
            [total + more for total, more in zip(row, added, strict=True)]
            for row, added in zip(self.kl_sums, kl_sums, strict=True)
        ]
        return State(
            self.key,
            [*self.batches, digest],
            self.num_samples + num_samples,
            self.num_tokens + num_tokens,
            sums,
            weight_scales,
        )


class Journal:
    """Holds the state and keeps it in a file: now and then, at the end, and when an error ends the run.

    Args:
        path: None keeps it in memory alone.
        fresh: The state to start from, where the file does not exist yet.
    Raises:
        ProfileError: The file is none of ours, or of another calibration.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fresh: State) -> None:
        self._path = path
        self.state = fresh if path is None or not Path(path).exists() else _read(path, fresh.key)
        self._written = self.state
        self._due = time.monotonic() + SAVE_SECONDS

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._write()

    def keep(self, state: State) -> None:
        """The state from now on."""
        self.state = state
        if time.monotonic() >= self._due:
            self._write()

    def _write(self) -> None:
        if self._path is not None and self._written is not self.state:
            write_atomically(self._path, json.dumps({"format": FORMAT, **asdict(self.state)}) + "\n")
            self._written = self.state
        self._due = time.monotonic() + SAVE_SECONDS


def _read(path: str | os.PathLike[str], key: Mapping[str, Any]) -> State:
    try:
        saved = json.loads(Path(path).read_text())
        if saved.pop("format") != FORMAT:
            raise ValueError
        state = State(**saved)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ProfileError(
            f"{os.fspath(path)} is not a file that calibrate(resume=...) wrote; delete it, or name another."
        ) from None
    for name, value in key.items():
        if state.key.get(name) != value:
            raise stale(f"{name} differs from what it was started with")
    return state


def stale(why: str) -> ProfileError:
    return ProfileError(f"The resume file belongs to another calibration: {why}; delete it, or name another.")
