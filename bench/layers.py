"""MoE layers of published models as calls of the op, and the least that any implementation has to do."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modes_fx.kernels.masked_moe import Call

RESULTS = Path(__file__).parent / "results"


class Layer(NamedTuple):
    """Routed experts of one layer; sizes as in the model's config.json."""

    model: str
    hidden: int
    intermediate: int
    experts: int
    slots: int


LAYERS = (
    # InternVL-3.5-30B-A3B has the same language model.
    Layer("Qwen3-VL-30B-A3B, InternVL-3.5-30B-A3B", 2048, 768, 128, 8),
    Layer("Kimi-VL-A3B", 2048, 1408, 64, 6),
)
TOKENS = (1, 4, 8, 16, 256, 1024, 4096)  # up to 16 is decode
SKIPS = (0.0, 0.50, 0.67, 0.83, 0.88)


class Case(NamedTuple):
    layer: Layer
    tokens: int
    skip: float


CASES = [Case(*item) for item in ((layer, t, s) for layer in LAYERS for t in TOKENS for s in SKIPS)]


def make_call(case: Case, device: str = "cpu") -> Call:
    """A call in bfloat16 with uniform routing that keeps `1 - skip` of the pairs, rounded, and at least one.

    Scores are a random order of all pairs, so the dropped ones lie anywhere. Hidden states and weights of
    experts are uninitialised.
    """
    layer, tokens, skip = case
    g = torch.Generator().manual_seed(0)

    def wide(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device)

    experts = torch.rand(tokens, layer.experts, generator=g).topk(layer.slots).indices
    num_pairs = tokens * layer.slots
    scores = (torch.randperm(num_pairs, generator=g) + 1).view(tokens, layer.slots) / num_pairs
    kept = max(1, round((1 - skip) * num_pairs))
    tau = (num_pairs - kept + 0.5) / num_pairs
    return Call(
        wide(tokens, layer.hidden),
        scores.to(device),
        scores.to(device, copy=True),
        experts.to(device),
        torch.zeros(tokens, dtype=torch.uint8, device=device),
        wide(layer.experts, 2 * layer.intermediate, layer.hidden),
        wide(layer.experts, layer.hidden, layer.intermediate),
        alpha_text=1.0,
        alpha_vision=1.0,
        tau_text=tau,
        tau_vision=tau,
    )


@dataclass(frozen=True)
class Needed:
    """What no implementation can do without: the products of the kept pairs, and each byte once.

    Bytes are those of the weights of experts with a kept pair, of the hidden states of tokens with one, of
    scores, weights, ids and modality, and of the result.
    """

    pairs: int
    experts: int
    flops: int
    bytes: int


def needed(call: Call) -> Needed:
    keep = call.keep()
    pairs = int(keep.sum())
    experts = int(call.experts[keep].unique().numel())
    rows = 3 if call.formula.is_gated else 2
    per_expert = rows * call.hidden.shape[1] * call.intermediate_size
    tokens = int(keep.any(dim=1).sum())
    width = call.hidden.element_size()
    moved = experts * per_expert * width + tokens * call.hidden.shape[1] * width
    moved += call.hidden.shape[0] * call.output_size * width
    for x in (call.scores, call.weights, call.experts, call.modality):
        moved += 0 if x is None else x.numel() * x.element_size()
    return Needed(pairs, experts, 2 * per_expert * pairs, moved)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}


def record(name: str, text: str, data: Any) -> None:
    """Write `results/NAME.md` and `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {RESULTS / name}.md and .json")
