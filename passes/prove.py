"""Prove one rewrite before it is made: run the matched nodes and the new node on the same random tokens, with
the layer's own weights.

    exact   the specification of the op in a higher precision, on the experts that the tokens chose
    low     the specification in the model's own dtype
    want    the matched nodes                    got   the new node, with thresholds that drop nothing
    cut     the new node as it will stand in the graph, against `exact` without the pairs that the profile
            drops for this router

A rewrite holds where want, got and cut are no further from `exact` than twice what `low` is, plus a rounding
band: the dtype's own error is measured, not guessed. A layout, an activation, a weight order or a layer's
constants that were matched wrongly are off by the size of the output itself.

A few tokens are enough, and few experts among them, so that a proof costs little beside a compilation; the
literal sizes of the matched nodes are replaced. Where that cannot be done they run on as many tokens as the
call has.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node, map_arg

from modes_fx.kernels.masked_moe import masked_moe, reference
from modes_fx.passes.dataflow import VIEWS, aten, between, dtype_of, hint, is_call, is_symbolic, shape_of
from modes_fx.passes.find_blocks import Experts

TOKENS = 16
EXPERTS = 8


@dataclass(frozen=True)
class Proof:
    """The largest difference seen, and what the dtype explains; relative to the largest output."""

    error: float
    allowed: float
    what: str = "output"

    @property
    def holds(self) -> bool:
        # A NaN compares false, so it refuses.
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"relative error of the {self.what} {self.error:.2g}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Constants:
    """What decides the dropped pairs: alpha as it multiplies the routing weights, and the thresholds."""

    alpha_text: float
    alpha_vision: float
    tau_text: float
    tau_vision: float

    def threshold(self) -> float:
        """A routing weight around which the rule decides, to draw random ones from."""
        pairs = ((self.tau_text, self.alpha_text), (self.tau_vision, self.alpha_vision))
        thetas = [tau / alpha for tau, alpha in pairs if alpha > 0 and 0 < tau / alpha < math.inf]
        return max(thetas, default=0.5)


def prove(
    block: Experts, rewritten: Node, modality: Node, real: Mapping[Node, Tensor], constants: Constants
) -> Proof:
    """Run both sides of a rewrite.

    Args:
        block: The match.
        rewritten: The node that is to stand for `block.output`; it hangs on the block's inputs.
        modality: The node of the tokens' modality, `[T]`.
        real: The real tensor of each of the block's parameters.
        constants: What the profile says of the layer whose router this block has.
    Returns:
        The worst of the comparisons; it holds where the rewrite may replace the block.
    """
    with torch.no_grad(), unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        real = {parameter: tensor.detach() for parameter, tensor in real.items()}
        tokens = hint(shape_of(block.hidden)[0])
        try:
            return _prove(block, rewritten, modality, real, constants, min(TOKENS, tokens))
        except RuntimeError:
            # A literal size that was not understood.
            if tokens <= TOKENS:
                raise
            return _prove(block, rewritten, modality, real, constants, tokens)


def _prove(
    block: Experts,
    rewritten: Node,
    modality: Node,
    real: Mapping[Node, Tensor],
    constants: Constants,
    tokens: int,
) -> Proof:
    given = _Given(block, real, constants, tokens)
    values = {**real, **given.inputs, modality: given.modality}
    want = _run(block, block.output, values, tokens)
    got = _run(block, rewritten, values, tokens, **_EVERYTHING)
    cut = _run(block, rewritten, values, tokens)
    exact, low = given.specification(torch.float64, _EVERYTHING), given.specification(None, _EVERYTHING)
    dropped = given.specification(torch.float64, {})
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    # The band is for where the low-precision specification is exact by luck; products add up in float32 in
    # whatever order, and there rounding errors grow like the root of the length.
    length = max(real[block.gate_up].shape[1:])
    band = 4 * torch.finfo(given.dtype).eps + 8 * torch.finfo(torch.float32).eps * math.sqrt(length)
    allowed = 2 * ((low - exact).abs().max() / scale).item() + band
    proofs = [
        Proof(((result.double() - truth).abs().max() / scale).item(), allowed, what)
        for result, truth, what in (
            (want, exact, "matched nodes"),
            (got, exact, "rewritten block"),
            (cut, dropped, "rewritten block with its thresholds"),
        )
    ]
    # A NaN compares with nothing, and is the worst of all.
    return max(proofs, key=lambda proof: math.inf if math.isnan(proof.error) else proof.error)


_EVERYTHING = {"tau_text": -math.inf, "tau_vision": -math.inf}


class _Given:
    """Random inputs of a block, and what the specification makes of them."""

    def __init__(
        self, block: Experts, real: Mapping[Node, Tensor], constants: Constants, tokens: int
    ) -> None:
        self.block, self.real, self.constants = block, real, constants
        gate_up = real[block.gate_up]
        self.dtype = gate_up.dtype
        device = gate_up.device
        self.chosen = torch.randperm(block.num_experts)[: max(EXPERTS, block.top_k)].to(device)
        width = shape_of(block.hidden)[1]
        # First products of size about one, where activations differ most.
        size = gate_up[self.chosen].double().pow(2).mean().sqrt().clamp(min=1e-30)
        hidden = torch.randn(tokens, width, device=device) / (size.float() * math.sqrt(width))
        self.hidden = hidden.to(dtype_of(block.hidden))
        picks = torch.rand(tokens, len(self.chosen), device=device).topk(block.top_k).indices
        self.local, self.experts = picks, self.chosen[picks]
        weights = torch.rand(tokens, block.top_k, device=device) * 2 * constants.threshold()
        self.weights = weights.to(dtype_of(block.weights))
        self.modality = (torch.arange(tokens, device=device) % 3).to(torch.uint8)
        given = self.weights
        if block.kind == "dense":
            given = given.new_zeros(tokens, block.num_experts).scatter(1, self.experts, given)
        self.inputs = {block.hidden: self.hidden, block.experts: self.experts, block.weights: given}

    def specification(self, dtype: torch.dtype | None, thresholds: dict[str, float]) -> Tensor:
        """`reference` in `dtype` (None: the model's own), `[T, H]`, float64."""
        block = self.block
        parameters = [
            None if parameter is None else self.real[parameter][self.chosen].to(dtype or self.dtype)
            for parameter in (block.gate_up, block.down, block.gate_up_bias, block.down_bias)
        ]
        weights = self.weights if dtype is None else self.weights.to(dtype)
        return reference(
            self.hidden.to(dtype or self.dtype),
            self.weights,
            weights,
            self.local,
            self.modality,
            *parameters,  # type: ignore[arg-type]
            **{**vars(self.constants), **thresholds},
            activation=block.activation,
            interleaved=block.interleaved,
            is_transposed=block.is_transposed,
            weights_on_input=block.weights_on_input,
        ).double()


def _run(block: Experts, output: Node, values: Mapping[Node, Any], tokens: int, **constants: float) -> Tensor:
    """Run the nodes between `values` and `output`, and only those, on real tensors of `tokens` tokens.

    Args:
        constants: Replace those of the op.
    """
    whole = hint(shape_of(block.hidden)[0])
    # Sizes that count tokens, pairs, or (token, expert), and what they are with fewer tokens.
    sizes = {whole * n: tokens * n for n in (block.num_experts, block.top_k, 1)}
    values = dict(values)

    def value(node: Node) -> Any:
        if is_symbolic(node):
            size = hint(node.meta["val"])
            return sizes.get(size, size)
        return values[node]

    for node in between([output], set(values)):
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        if is_call(node, masked_moe):
            kwargs = {**kwargs, **constants}
        values[node] = node.target(*_resized(node, args, sizes), **kwargs)  # type: ignore[operator]
    return values[output]


def _resized(node: Node, args: tuple[Any, ...], sizes: dict[int, int]) -> tuple[Any, ...]:
    """Arguments with literal numbers of tokens replaced; they always come first in a shape."""
    if is_call(node, *VIEWS, aten.expand.default) and len(args) > 1 and isinstance(args[1], list | tuple):
        first, *rest = args[1]
        # In a view -1 is what is left over, in an expand it keeps the size.
        counts = hint(shape_of(node)[0]) in sizes and -1 not in args[1]
        return (args[0], [-1 if counts else first, *rest], *args[2:])
    if is_call(node, aten.arange.default):
        return (sizes.get(args[0], args[0]), *args[1:])
    if is_call(node, aten.arange.start, aten.arange.start_step):
        return (args[0], sizes.get(args[1], args[1]), *args[2:])
    if is_call(node, aten.zeros.default, aten.full.default):
        first, *rest = args[0]
        return ([sizes.get(first, first), *rest], *args[1:])
    if is_call(node, aten.new_zeros.default):
        first, *rest = args[1]
        return (args[0], [sizes.get(first, first), *rest], *args[2:])
    return args
