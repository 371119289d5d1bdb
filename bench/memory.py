"""Bytes out of the caches, so that a benchmark reads weights from memory, and a pure read of them.

Both are a few lines of C, built on first use with the compiler that torch.compile needs on a CPU anyway.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_SOURCE = r"""
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Returns whether it can. */
int evict(size_t count, const char** starts, const size_t* sizes) {
#if defined(__x86_64__)
    for (size_t i = 0; i < count; i++)
        for (size_t at = 0; at < sizes[i]; at += 64)
#if defined(__CLFLUSHOPT__)
            _mm_clflushopt((void*)(starts[i] + at));
#else
            _mm_clflush(starts[i] + at);
#endif
    _mm_mfence();
    return 1;
#else
    return 0;
#endif
}

/* Large regions are read in eight places at once, which keeps more of the memory busy. */
uint64_t read_bytes(size_t count, const char** starts, const size_t* sizes) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        const uint64_t* words = (const uint64_t*)starts[i];
        size_t size = sizes[i] / 8, part = sizes[i] < (1 << 20) ? 0 : size / 64 * 8;
        for (size_t at = 0; at < part; at += 8)
            for (size_t place = 0; place < 8; place++)
                for (size_t word = 0; word < 8; word++) sum += words[place * part + at + word];
        for (size_t at = 8 * part; at < size; at++) sum += words[at];
    }
    return sum;
}
"""


class Regions:
    """Some tensors' bytes, each contiguous."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        assert all(each.is_contiguous() for each in self.tensors)
        count = len(self.tensors)
        sizes = [each.numel() * each.element_size() for each in self.tensors]
        self.bytes = sum(sizes)
        self._arguments = (
            ctypes.c_size_t(count),
            (ctypes.c_void_p * count)(*(each.data_ptr() for each in self.tensors)),
            (ctypes.c_size_t * count)(*sizes),
        )

    def evict(self) -> None:
        """Take them out of every cache.

        Raises:
            RuntimeError: Not on this kind of processor.
        """
        if not _library().evict(*self._arguments):
            raise RuntimeError("bench/memory.py can empty caches on x86-64 only.")

    def read(self) -> int:
        """Read each byte once, on the calling thread; returns their sum as 64-bit words."""
        total: int = _library().read_bytes(*self._arguments)
        return total


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "memory.c", Path(folder) / "memory.so"
        source.write_text(_SOURCE)
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(binary)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(binary))
    library.read_bytes.restype = ctypes.c_uint64
    return library
