"""Prove one rewrite: run the matched nodes and the op on the same random tokens with the layer's own weights.

With thresholds of minus infinity the op keeps every pair, so both must agree up to the order of additions. A
layout, an activation or a weight order that was matched wrongly gives an error of the size of the output
itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node, map_arg

from modes_fx.kernels.masked_moe import masked_moe
from modes_fx.passes.find_blocks import Experts


@dataclass(frozen=True)
class Proof:
    """The largest difference, and the largest that the dtype explains; relative to the largest output."""

    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"relative error {self.error:.2g}, allowed {self.allowed:.2g}"


def prove(block: Experts, gate_up: Tensor, down: Tensor) -> Proof:
    """Run both sides of a rewrite once.

    Args:
        block: The match, not yet rewritten.
        gate_up, down: The real expert weights.
    Returns:
        A `Proof`; it holds where the rewrite may replace the block.
    """
    with torch.no_grad(), unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, weights, experts = _random_inputs(block, gate_up.device)
        values = {
            block.hidden: hidden,
            block.weights: weights,
            block.experts: experts,
            block.gate_up: gate_up.detach(),
            block.down: down.detach(),
        }
        want = _run(block, values).double()
        got = masked_moe(
            hidden,
            weights,
            weights,
            experts,
            None,
            gate_up.detach(),
            down.detach(),
            None,
            None,
            alpha_text=1.0,
            alpha_vision=1.0,
            tau_text=-math.inf,
            tau_vision=-math.inf,
            activation=block.activation,
            interleaved=block.interleaved,
            is_transposed=block.is_transposed,
        ).double()
        scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        error = ((got - want).abs().max() / scale).item()
    # Results are stored in the weights' dtype, some times over; products add up in float32, whatever that is,
    # and there rounding errors grow like the root of the length. In bfloat16 a sound rewrite is off by less
    # than one eps, swapped halves by a hundred.
    length = max(gate_up.shape[1:])
    stored, added = torch.finfo(gate_up.dtype).eps, torch.finfo(torch.float32).eps
    allowed = 4 * stored + 8 * added * math.sqrt(length)
    # A NaN compares false, so it refuses.
    return Proof(error, allowed)


def _random_inputs(block: Experts, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    shape = [_concrete(size) for size in block.hidden.meta["val"].shape]
    hidden = torch.randn(shape, device=device).to(block.hidden.meta["val"].dtype)
    scores = torch.rand(shape[0], block.num_experts, device=device)
    weights, experts = scores.softmax(dim=-1).topk(block.top_k)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return hidden, weights.to(block.weights.meta["val"].dtype), experts


def _concrete(size: Any) -> int:
    """A size as a number: the one of the call that is being compiled, where it is symbolic."""
    return size if isinstance(size, int) else size.node.hint


def _run(block: Experts, values: dict[Node, Any]) -> Tensor:
    """Run the matched nodes, and only those, on real tensors."""

    def value(node: Node) -> Any:
        return values[node] if node in values else _concrete(node.meta["val"])

    for node in block.nodes():
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[block.output]
