"""Builds C++ of this package with the compiler that torch.compile needs on a CPU too, and keeps the result.

A library is kept under a hash of its source, the compiler and the flags, beside Inductor's own cache. Nothing
is built or loaded before the first call that needs it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
_COMMON = ["-O3", "-shared", "-fPIC", "-Wno-psabi"]
# NaN and infinity keep their meaning; only errno and traps are given up.
_KERNEL = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": _AVX512,
    "AMX": [*_AVX512, "-mamx-tile", "-mamx-bf16"],
}


class BuildError(RuntimeError):
    """A library cannot be built here; the message says why."""


def build_kernel(source: str) -> ctypes.CDLL:
    """Compile C++ for this processor, or take what was compiled before, and load it.

    Args:
        source: May include the files of `kernels/native`.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    # A compiler may come without OpenMP (Apple's does); then one thread does all.
    flags = [*_KERNEL, *instructions()]
    return ctypes.CDLL(str(_build(source, [*flags, "-fopenmp"], flags)))


def build_operator() -> ctypes.CDLL:
    """Compile and load `native/op.cpp`, by which torch takes its operator for CPU tensors from there.

    Raises:
        BuildError: There is no compiler, or it fails.
    """
    root = Path(torch.__file__).parent
    flags = [
        "-std=c++20",
        f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}",
        f"-L{root / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    library = _build((SOURCES / "op.cpp").read_text(), flags)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


def _build(source: str, *flags: list[str]) -> Path:
    """The library of a source, by the first flags that work."""
    command = [*compiler(), *_COMMON, f"-I{SOURCES}"]
    digest = hashlib.sha256("\0".join([source, *command, *flags[0], version(), torch.__version__]).encode())
    for header in sorted(SOURCES.glob("*.h")):
        digest.update(header.read_bytes())
    library = cache_folder() / f"{digest.hexdigest()[:32]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that renaming is atomic: another process sees all of it or nothing.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        main, built = Path(folder, "main.cpp"), Path(folder, "built.so")
        main.write_text(source)
        for choice in flags:
            whole = [*command, str(main), "-o", str(built), *choice]
            done = subprocess.run(whole, capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(built, library)
                return library
    raise BuildError(f"{shlex.join(whole)} failed: {done.stderr.strip()[:2000]}")


@functools.cache
def compiler() -> list[str]:
    """The command that compiles C++: $CXX, or the first of g++, clang++ and c++ that is installed."""
    if sys.platform == "win32":
        raise BuildError("the native kernel is not built on Windows.")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler was found (looked for {', '.join(names)}).")


@functools.cache
def version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout


def instructions() -> list[str]:
    """Flags for the instruction set that torch itself uses here; ATEN_CPU_CAPABILITY lowers both."""
    return INSTRUCTIONS.get(instruction_set(), [])


def instruction_set() -> str:
    """The widest set of `INSTRUCTIONS` that is there, or torch's name of another."""
    capability = torch.backends.cpu.get_cpu_capability()
    # A process has to ask the operating system for the matrix unit.
    if capability == "AVX512" and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        return "AMX"
    return capability


def cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir(), "modes_fx")
