"""What a record says of the machine, of the software, and of how quick the machine is."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_tile")
_CPU = Path("/sys/devices/system/cpu/cpu0/cache")


def machine() -> dict[str, Any]:
    """Model, flags that matter here, cores, caches and memory."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in lines}
    flags = fields.get("flags", "").split()
    caches = {}
    for index in sorted(_CPU.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    return {
        "cpu": fields.get("model name", platform.processor()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "threads_used": 1,
        "caches": caches,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def versions(kt_folder: str | None) -> dict[str, str]:
    """Of everything timed; "" where it is absent. A commit ends in + where files differ from it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    path = sys.path if kt_folder is None else [kt_folder]
    kt = importlib.metadata.distributions(name="kt-kernel", path=path)
    found["kt-kernel"] = next((each.version for each in kt), "")
    found["modes_fx"] = _commit()
    return found


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short=12", "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changed else "")


def rates() -> dict[str, Any]:
    """What torch's dense product and a plain read reach on one thread of this process."""
    import torch
    from memory import Regions

    torch.set_num_threads(1)
    size = 768
    found: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability()}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        seconds = _best(functools.partial(torch.mm, a, b.t()))
        found[f"{str(dtype)[6:]}_gflops"] = round(2e-9 * size**3 / seconds, 1)
    region = Regions([torch.ones(256 << 20, dtype=torch.uint8)])
    found["read_gb_per_s"] = round(1e-9 * region.bytes / _best(region.read, region.evict), 1)
    return found


def _best(call: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    times = []
    for _ in range(5):
        prepare()
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)
