"""What a GPU's data sheet allows a layer, and the table that modelled and measured times are shown in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from layers import Case, Needed, markdown


@dataclass(frozen=True)
class Gpu:
    """Figures of the data sheet; but those of L2 are estimates.

    Attributes:
        arch: Compute capability, times ten.
        flops: bfloat16 on tensor cores, dense, per second.
        dram: Bytes per second.
        l2: Bytes per second between L2 and all multiprocessors. About 70 % of what the widths of A100's and
            H100's caches and their clocks would give, which is what large products reach; for B200 a guess.
    """

    name: str
    arch: int
    multiprocessors: int
    flops: float
    dram: float
    l2: float

    def limit_us(self, needed: Needed) -> float:
        """No implementation is faster: the needed products at peak, or the needed bytes at full bandwidth."""
        return 1e6 * max(needed.flops / self.flops, needed.bytes / self.dram)


H100 = Gpu("H100 SXM", 90, 132, 989e12, 3.35e12, 6.5e12)
A100_PCIE = Gpu("A100 PCIe 40 GB", 80, 108, 312e12, 1.555e12, 5e12)
A100 = Gpu("A100 SXM 80 GB", 80, 108, 312e12, 2.039e12, 5e12)
H200 = Gpu("H200", 90, 132, 989e12, 4.8e12, 6.5e12)
B200 = Gpu("B200", 100, 148, 2250e12, 8.0e12, 10e12)
GPUS = (H100, H200, A100, A100_PCIE, B200)


def find_gpu(device_name: str, memory_bytes: int) -> Gpu | None:
    """The data sheet for what `torch.cuda.get_device_name` says, such as "NVIDIA H100 80GB HBM3".

    None for others, and for variants of these whose figures differ.
    """
    if any(variant in device_name for variant in ("PCIe", "PCIE", "NVL")):
        return A100_PCIE if "A100" in device_name and memory_bytes < 60e9 else None
    for gpu in (H100, H200, B200):
        if gpu.name.split()[0] in device_name:
            return gpu
    return A100 if "A100" in device_name and memory_bytes > 60e9 else None


@dataclass(frozen=True)
class Timing:
    """Time of one case.

    Attributes:
        us: Median of what was measured, or what a model says.
        spread: 20th and 80th percentile, us; None for a model.
        bound: What takes most of the time, where that is known.
        others: Medians of other implementations of the same case, us.
    """

    case: Case
    needed: Needed
    us: float
    launches: int
    spread: tuple[float, float] | None = None
    bound: str = ""
    others: Mapping[str, float] = field(default_factory=dict)


def timing_table(timings: Sequence[Timing], gpu: Gpu | None, time: str) -> str:
    """Markdown, a table for each model. `time` names the column of times; gains are over 0 % skip."""
    others = list(dict.fromkeys(name for timing in timings for name in timing.others))
    # Columns that hold nothing anywhere are left out.
    bound = ["bound by"] if any(timing.bound for timing in timings) else []
    limits = ["limit us", "of limit", "gain of limit"] if gpu else []
    header = ["tokens", "skip", "pairs", "experts", *limits, time, "gain", *bound, "launches", *others]
    unskipped = {t.case[:2]: t for t in timings if t.case.skip == 0}
    parts = []
    for layer in dict.fromkeys(timing.case.layer for timing in timings):
        rows = []
        for t in (timing for timing in timings if timing.case.layer == layer):
            base = unskipped.get(t.case[:2])
            cells = [
                str(t.case.tokens),
                f"{100 * t.case.skip:.0f} %",
                str(t.needed.pairs),
                str(t.needed.experts),
            ]
            if gpu:
                limit = gpu.limit_us(t.needed)
                cells += [f"{limit:.1f}", f"{100 * limit / t.us:.0f} %"]
                cells += [f"{gpu.limit_us(base.needed) / limit:.2f}" if base else "-"]
            spread = f" ({t.spread[0]:.1f} - {t.spread[1]:.1f})" if t.spread else ""
            cells += [f"{t.us:.1f}{spread}", f"{base.us / t.us:.2f}" if base else "-"]
            cells += [t.bound] if bound else []
            cells += [
                str(t.launches),
                *(f"{t.others[name]:.1f}" if name in t.others else "-" for name in others),
            ]
            rows.append(cells)
        parts += [f"### {layer.model}\n", markdown(header, rows)]
    return "\n".join(parts)
