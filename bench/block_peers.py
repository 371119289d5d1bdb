"""Everything that computes one block of experts: modes_fx, transformers, kt-kernel, and two limits.

All get the same tokens, choices and weights; those that skip get the same dropped pairs, in the form that
each wants, made beforehand. An evicted expert has to come from memory, as in a model whose layers take turns.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import GEMM, GEMM_FLOAT32, OURS, READ, Case
from interleave import Run
from kt_peer import KT_BEST_OF, Absent, KtExperts, Pool
from memory import Regions
from routing import Routing, prescribe
from torch import Tensor, nn

from modes_fx.kernels.masked_moe import masked_moe, reference

LEFT_OUT = "left out here, for time"
# The largest gather of weights, in bytes, that batched_mm is asked for; beyond it takes seconds.
_GATHER = {"batched_mm": 4 << 28, "batched_mm, compiled": 4 << 29}
_SMALL = 128
_SWEEP = 640 << 20  # more than any cache


@dataclass(frozen=True)
class Peer:
    """One way to compute a block.

    Attributes:
        call: Computes a sample; `[T, H]`, or for a limit nothing of interest.
        drops: Its answer leaves out the dropped pairs.
        clock: CPU seconds of the thread that works.
        prepare: (sample, another one), before each timed call: code warm, as in a model's other layers, and
            the weights of the chosen experts in no cache. None for a call of the other sample, and an
            eviction.
        best_of: See `Run`.
    """

    call: Callable[["Sample"], Any]
    drops: bool = False
    clock: Callable[[], float] = time.thread_time
    prepare: Callable[["Sample", "Sample"], None] | None = None
    best_of: int = 1

    def run(self, samples: Sequence["Sample"]) -> Run:
        def prepare(number: int) -> None:
            sample, other = (samples[at % len(samples)] for at in (number, number + 1))
            if self.prepare is not None:
                self.prepare(sample, other)
            else:
                if sample.is_small:
                    self.call(other)
                sample.chosen.evict()

        def call(number: int) -> None:
            self.call(samples[number % len(samples)])

        return Run(call, prepare, self.clock, self.best_of)


class Weights:
    """The weights of one block, `[E, 2I, H]` and `[E, H, I]`, of a size that keeps outputs near 1."""

    def __init__(self, case: Case, generator: torch.Generator) -> None:
        dtype = getattr(torch, case.dtype)
        shape = case.num_experts, 2 * case.intermediate, case.hidden
        self.gate_up = torch.empty(shape, dtype=dtype)
        self.down = torch.empty(case.num_experts, case.hidden, case.intermediate, dtype=dtype)
        for weights, fan_in in ((self.gate_up, case.hidden), (self.down, case.intermediate)):
            weights.normal_(0, fan_in**-0.5, generator=generator)

    def regions(self, experts: Tensor) -> Regions:
        return Regions(weights[e] for e in experts.tolist() for weights in (self.gate_up, self.down))


class Sample:
    """One call, in the forms that the peers want."""

    def __init__(self, routing: Routing, weights: Weights) -> None:
        self.routing = routing
        self.zeroed = routing.zeroed
        self.sentinel = routing.dropped_to(len(weights.gate_up))
        self.minus = routing.dropped_to(-1)
        # One pair, of an expert that was not chosen.
        self.elsewhere = torch.full_like(routing.experts, -1)
        self.elsewhere[0, 0] = next(
            (e for e in range(len(weights.gate_up)) if e not in routing.experts), routing.experts[0, 0]
        )
        self.wide = routing.weights.float()
        self.chosen = weights.regions(routing.distinct(kept=False))
        self.kept = weights.regions(routing.distinct(kept=True))
        # Where a call takes long, what its code finds in the caches is nothing.
        self.is_small = routing.weights.numel() <= _SMALL


def make_samples(case: Case, weights: Weights, count: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            prescribe(
                tokens=case.tokens,
                num_experts=case.num_experts,
                top_k=case.top_k,
                hidden=case.hidden,
                skip=case.skip,
                dtype=weights.gate_up.dtype,
                vision=case.vision,
                generator=generator,
            ),
            weights,
        )
        for _ in range(count)
    ]


def expected(sample: Sample, weights: Weights, rows: slice, *, drops: bool) -> Tensor:
    """The specification, in float32, of some of the tokens."""
    routing, tau = sample.routing, sample.routing.tau if drops else 0.0
    weight, gate_up, down = routing.weights[rows].float(), weights.gate_up.float(), weights.down.float()
    hidden, experts, modality = routing.hidden[rows].float(), routing.experts[rows], routing.modality[rows]
    taus = {"alpha_text": 1.0, "alpha_vision": 1.0, "tau_text": tau, "tau_vision": tau}
    return reference(hidden, weight, weight, experts, modality, gate_up, down, **taus)


def make_peers(
    case: Case, weights: Weights, pool: Callable[[], Pool]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers for all cases that differ from `case` in the skip rate alone; and why others are absent."""
    peers = {OURS: Peer(functools.partial(_masked_moe, weights), drops=True)}
    absent: dict[str, str] = {}
    torch._dynamo.reset()
    pair_bytes = 3 * case.hidden * case.intermediate * weights.down.element_size()
    for name in ("eager", "grouped_mm", "batched_mm"):
        plain = transformers_experts(case, weights, name)
        ways = {name: plain, f"{name}, compiled": torch.compile(plain)}
        for way, module in ways.items():
            gathered = case.tokens * case.top_k * pair_bytes
            if gathered > _GATHER.get(way, gathered):
                absent[way] = f"gathers {gathered / 2**30:.0f} GiB of weights"
                continue
            peers[way] = Peer(functools.partial(_unmodified, module))
            peers[f"{way}, zeroed"] = Peer(functools.partial(_zeroed, module), drops=True)
            if name == "eager":
                peers[f"{way}, dropped"] = Peer(functools.partial(_dropped, module), drops=True)
    plain = transformers_experts(case, weights, "grouped_mm")
    # How transformers says that ids past the last expert mean "not here".
    plain._is_expert_parallel = True
    for way, module in {"grouped_mm": plain, "grouped_mm, compiled": torch.compile(plain)}.items():
        peers[f"{way}, dropped"] = Peer(functools.partial(_dropped, module), drops=True)
    try:
        if case.only and "kt-kernel" not in case.only:
            raise Absent(LEFT_OUT)
        kt = KtExperts(pool(), weights.gate_up, weights.down, case.top_k, case.tokens)

        def prepare(sample: Sample, other: Sample) -> None:
            # Where it keeps its copies of the weights is not known.
            sweep()
            if sample.is_small:
                kt(sample.routing.hidden, sample.elsewhere, sample.wide)

        peers["kt-kernel"] = Peer(
            lambda sample: kt(sample.routing.hidden, sample.minus, sample.wide),
            drops=True,
            clock=pool().clock,
            prepare=prepare,
            best_of=KT_BEST_OF if case.decode else 2,
        )
    except Absent as reason:
        absent["kt-kernel"] = str(reason)
    emulated = case.cpu == "avx2" and case.dtype == "bfloat16"
    peers[GEMM_FLOAT32 if emulated else GEMM] = Peer(Products(case, emulated), drops=True)
    peers[READ] = Peer(lambda sample: sample.kept.read(), drops=True)
    if case.only:
        absent |= {name: LEFT_OUT for name in peers if name != OURS and name not in case.only}
        peers = {name: peer for name, peer in peers.items() if name not in absent}
    return peers, absent


def transformers_experts(case: Case, weights: Weights, implementation: str) -> Any:
    from transformers import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

    config = Qwen3VLMoeTextConfig(
        num_experts=case.num_experts, hidden_size=case.hidden, moe_intermediate_size=case.intermediate
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3VLMoeTextExperts(config)
    module.gate_up_proj = nn.Parameter(weights.gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(weights.down, requires_grad=False)
    return module.eval()


class Products:
    """Two dense products with the FLOPs of the kept pairs: what a block costs where nothing but them is.

    Args:
        wide: In float32, whatever the case's dtype.
    """

    def __init__(self, case: Case, wide: bool) -> None:
        dtype = torch.float32 if wide else getattr(torch, case.dtype)
        pairs, inputs, outputs = (
            case.tokens * case.top_k,
            (case.hidden, case.intermediate),
            (2 * case.intermediate, case.hidden),
        )
        shapes = zip(outputs, inputs, strict=True)
        self._up, self._down = (torch.randn(shape).to(dtype) for shape in shapes)
        self._x, self._y = (torch.randn(pairs, size).to(dtype) for size in inputs)
        self._outputs = [torch.empty(pairs, size, dtype=dtype) for size in outputs]

    def __call__(self, sample: Sample) -> None:
        kept = int(sample.routing.keep.sum())
        torch.mm(self._x[:kept], self._up.t(), out=self._outputs[0][:kept])
        torch.mm(self._y[:kept], self._down.t(), out=self._outputs[1][:kept])


def sweep() -> None:
    """Push out of the caches what cannot be evicted by address."""
    _sweeping().read()


@functools.cache
def _sweeping() -> Regions:
    return Regions([torch.ones(_SWEEP, dtype=torch.uint8)])


def _masked_moe(weights: Weights, sample: Sample) -> Tensor:
    routing = sample.routing
    return masked_moe(
        routing.hidden,
        routing.weights,
        routing.weights,
        routing.experts,
        routing.modality,
        weights.gate_up,
        weights.down,
        None,
        None,
        alpha_text=1.0,
        alpha_vision=1.0,
        tau_text=routing.tau,
        tau_vision=routing.tau,
    )


def _unmodified(module: Any, sample: Sample) -> Tensor:
    return module(sample.routing.hidden, sample.routing.experts, sample.routing.weights)


def _zeroed(module: Any, sample: Sample) -> Tensor:
    return module(sample.routing.hidden, sample.routing.experts, sample.zeroed)


def _dropped(module: Any, sample: Sample) -> Tensor:
    return module(sample.routing.hidden, sample.sentinel, sample.zeroed)
