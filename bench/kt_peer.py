"""kt-kernel, the CPU library that really skips: a pair whose expert id is -1 costs nothing.

It pins an older torch, so it is installed beside this one, without its dependencies, and found by
`--kt-kernel DIR`:

    pip install --no-deps --target DIR kt-kernel==0.7.2 gguf pyyaml

Its wheel holds other top-level packages too, so DIR is on `sys.path` only while it is imported. Its work is
done by a thread of its own, whose CPU time is what counts here; threads that wait are not counted. But its
threads spin while they hand work over, so of three calls the quickest counts.
"""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KT_BEST_OF = 3  # see `interleave.Run`


class Absent(Exception):
    """A peer cannot run; the message says why."""


class Pool:
    """kt-kernel with one worker thread, and that thread's clock."""

    def __init__(self, folder: str | None) -> None:
        before = set(os.listdir("/proc/self/task"))
        with _importable(folder), _silent():
            try:
                kt_kernel: Any = importlib.import_module("kt_kernel")
            except ImportError as error:
                raise Absent(f"not installed ({error})") from None
            self.extension = kt_kernel.kt_kernel_ext
            self.variant: str = kt_kernel.__cpu_variant__
            config = self.extension.WorkerPoolConfig()
            config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [1]
            self.cpu = self.extension.CPUInfer(config)
        made = set(os.listdir("/proc/self/task")) - before
        names = {int(task): Path(f"/proc/self/task/{task}/comm").read_text() for task in made}
        workers = [task for task, name in names.items() if name.startswith("numa_")]
        if not workers:
            raise Absent(f"its worker threads were not found among {sorted(names.values())}")
        # Linux: the clock of a thread, by its id.
        self._clocks = [(~task << 3) | 6 for task in workers]

    def worker_time(self) -> float:
        """CPU seconds of the worker; it spins for a while after work, so read it right before and after."""
        return sum(time.clock_gettime(clock) for clock in self._clocks)

    def clock(self) -> float:
        return time.thread_time() + self.worker_time()

    def wait(self, task: Any) -> None:
        self.cpu.submit(task)
        self.cpu.sync()


class KtExperts:
    """The experts of one block in kt-kernel, which copies and repacks their weights.

    Args:
        gate_up, down: `[E, 2I, H]`, `[E, H, I]`; bfloat16 (its AMX or AVX2 backend) or float32 (llamafile's).
    """

    def __init__(self, pool: Pool, gate_up: Tensor, down: Tensor, top_k: int, max_tokens: int) -> None:
        num_experts, hidden, inner = down.shape
        moe = pool.extension.moe
        self._pool, self._top_k, self._dtype = pool, top_k, gate_up.dtype
        self._on_gpu = torch.zeros(num_experts, dtype=torch.bool)
        config = moe.MOEConfig(num_experts, top_k, hidden, inner, self._on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, pool.cpu.backend_, max_tokens
        gate, up = (gate_up[:, half].contiguous() for half in (slice(inner), slice(inner, None)))
        if gate_up.dtype == torch.bfloat16:
            config.gate_projs, config.up_projs, config.down_projs = (
                [[each.data_ptr() for each in weights]] for weights in (gate, up, down)
            )
            config.gate_scales = config.up_scales = config.down_scales = [[0] * num_experts]
            fast = pool.variant != "avx2" and hasattr(moe, "AMXBF16_MOE")
            made = moe.AMXBF16_MOE if fast else moe.AVX2BF16_MOE
            self.backend = "AMX/AVX-512" if fast else "AVX2"
        else:
            if inner % 256:
                raise Absent(f"its float32 backend needs a multiple of 256 as intermediate size, not {inner}")
            config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in (gate, up, down))
            config.gate_type = config.up_type = config.down_type = config.hidden_type = 0
            config.m_block, config.group_min_len, config.group_max_len = 32, 10, max_tokens
            made = moe.MOE
            self._read_in_place = gate, up, down
            self.backend = "llamafile"
        with _silent():
            self._moe = made(config)
            self._identity = torch.arange(num_experts)
            pool.wait(self._moe.load_weights_task(self._identity.data_ptr()))

    def __call__(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """`[T, H], [T, K] int64 with -1 at dropped pairs, [T, K] float32 -> [T, H]`, all contiguous."""
        out = torch.empty_like(hidden)
        size = torch.tensor([len(hidden)], dtype=torch.int32)
        pointers = (experts.data_ptr(), weights.data_ptr(), hidden.data_ptr(), out.data_ptr())
        self._pool.wait(self._moe.forward_task(size.data_ptr(), self._top_k, *pointers, False))
        return out


@contextlib.contextmanager
def _importable(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Its C++ prints to stdout."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)
