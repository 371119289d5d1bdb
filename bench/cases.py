"""What is timed, as data."""

from dataclasses import dataclass, replace
from typing import Literal

OURS = "modes_fx"
# A product with the FLOPs of the kept pairs (where bfloat16 is emulated, in float32, which is quicker); a
# read of the kept experts' weights; a model whose experts cost nothing.
GEMM, GEMM_FLOAT32, READ, NO_EXPERTS = "dense GEMM", "dense GEMM, float32", "pure read", "no experts"
LIMITS = (GEMM, GEMM_FLOAT32, READ, NO_EXPERTS)
SKIPS = (0.0, 0.50, 0.67, 0.83, 0.88)
# "avx2": a process of its own, in which torch, oneDNN, MKL, Inductor and kt-kernel see no more than AVX2, as
# on a CPU without bfloat16 units; "native": all there is.
Cpu = Literal["native", "avx2"]
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "KT_KERNEL_CPU_VARIANT": "avx2",
}


@dataclass(frozen=True)
class Case:
    """One row of a table: all peers, at one skip rate.

    Attributes:
        family: The table it is in.
        kind: What is run: one MoE block, or a whole model.
        tokens: Of the call; for a whole model in decode, 1, after a prompt of `prompt`.
        skip: Wanted share of dropped pairs.
        vision: Share of vision tokens.
        only: Names of the peers to time; empty for all.
        budget_s: Passes are repeated until this much time is gone, and
        least: at least so often.
    """

    family: str
    kind: Literal["block", "model"]
    dtype: Literal["float32", "bfloat16"]
    cpu: Cpu
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tokens: int
    skip: float
    vision: float
    only: tuple[str, ...] = ()
    budget_s: float = 3.0
    least: int = 4
    layers: int = 1
    prompt: int = 0

    @property
    def decode(self) -> bool:
        return self.tokens <= 16

    @property
    def group(self) -> str:
        """Cases of a group run in one process and share weights."""
        return f"{self.family} {self.dtype} {self.cpu} H{self.hidden}"

    @property
    def id(self) -> str:
        return f"{self.group} T{self.tokens} skip {100 * self.skip:g}%"


_WIDTHS = ((512, 192), (1024, 768))
_BLOCK = Case("", "block", "float32", "native", 512, 192, 128, 8, 1024, 0.0, 0.75)
# Where a call takes seconds, the strongest peers, and those that targets name.
_FEW = ("grouped_mm", "eager, dropped", "kt-kernel", GEMM, GEMM_FLOAT32, READ)
_SOME = (*_FEW, "eager", "grouped_mm, compiled", "grouped_mm, dropped", "grouped_mm, zeroed")


def _prefill() -> list[Case]:
    cases = []
    for hidden, inner in _WIDTHS:
        wide = replace(_BLOCK, family="block-prefill", hidden=hidden, intermediate=inner)
        for tokens in (1024, 4096):
            long = replace(wide, tokens=tokens)
            if tokens == 4096:
                long = replace(long, only=_SOME, least=3 if hidden == 1024 else 4)
            for dtype in ("float32", "bfloat16"):
                cases += [replace(long, dtype=dtype, skip=skip) for skip in SKIPS]
        # torch emulates products of bfloat16 here.
        emulated = replace(wide, dtype="bfloat16", cpu="avx2")
        if hidden == 512:
            ends = {0.0, 0.88}
            cases += [replace(emulated, skip=skip, only=() if skip in ends else _SOME) for skip in SKIPS]
        else:
            cases += [replace(emulated, skip=skip, only=_FEW, least=3) for skip in (0.0, 0.88)]
    return cases


def _decode() -> list[Case]:
    cases = []
    for hidden, inner in _WIDTHS:
        for dtype in ("float32", "bfloat16"):
            at = replace(
                _BLOCK, family="block-decode", dtype=dtype, hidden=hidden, intermediate=inner, vision=0.0
            )
            # One token keeps a whole number of its 8 pairs: 8 of 8 to 1 of 8.
            cases += [replace(at, tokens=1, skip=dropped / 8, budget_s=1.0) for dropped in range(8)]
            for tokens in (2, 4, 8, 16):
                cases += [replace(at, tokens=tokens, skip=skip, budget_s=1.5) for skip in SKIPS]
    return cases


def _model() -> list[Case]:
    at = Case("model-prefill", "model", "float32", "native", 512, 256, 64, 8, 512, 0.0, 0.75, layers=8)
    prefill = [replace(at, skip=skip, budget_s=8.0) for skip in SKIPS]
    step = replace(at, family="model-decode", tokens=1, prompt=512)
    return prefill + [replace(step, skip=skip, budget_s=8.0) for skip in SKIPS]


def _overhead() -> list[Case]:
    tiny = Case("op-overhead", "block", "float32", "native", 16, 16, 2, 1, 1, 0.0, 0.0, only=(READ,))
    return [replace(tiny, budget_s=1.0)]


FAMILIES: dict[str, list[Case]] = {
    "block-prefill": _prefill(),
    "block-decode": _decode(),
    "model": _model(),
    "op-overhead": _overhead(),
}


def quick(case: Case) -> Case | None:
    """A smaller version, to see that everything runs; None where another case shows as much."""
    if case.skip not in (0.0, 0.88, 7 / 8) or case.tokens not in (1, 4, 512, 1024):
        return None
    if case.kind == "block" and case.hidden == 1024 and case.cpu == "avx2":
        return None
    return replace(case, budget_s=0.5)
