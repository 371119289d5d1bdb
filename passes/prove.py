"""Prove one rewrite before it is made: run the matched nodes and the new node on the same random tokens, with
the layer's own weights.

    exact   the specification of the op in a higher precision, on the experts that the tokens chose
    low     the specification in the model's own dtype
    want    the matched nodes                    got   the new node, with thresholds that drop nothing
    cut     the new node as it will stand in the graph, on routing weights right below and above the
            thresholds, against the specification with the constants that the profile has for this router

A rewrite holds where want, got and cut are no further from the specification than twice what `low` is, plus a
rounding band: the dtype's own error is measured, not guessed. A layout, an activation, a weight order or a
layer's constants that were matched wrongly are off by the size of the output itself. A rewrite that does not
run does not hold.

A few tokens are enough, and few experts among them, so that a proof costs little beside a compilation; the
literal sizes of the matched nodes are replaced. Where that cannot be done they run on as many tokens as the
call has. A call of very few tokens, as in decode, is run more than once, so that each modality comes up.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node, map_arg

from modes_fx.kernels.masked_moe import masked_moe, reference
from modes_fx.passes.dataflow import (
    VIEWS,
    Mismatch,
    aten,
    between,
    dtype_of,
    hint,
    is_call,
    is_symbolic,
    shape_of,
)
from modes_fx.passes.find_blocks import Experts

TOKENS = 16
# As many experts as are chosen from, fewer where they are large: their weights are copied to float64.
EXPERTS, COPIED = 8, 1 << 26
# Of the first product: activations differ most around one, and their limits show beyond ten.
SIZES = (1.0, 12.0)


@dataclass(frozen=True)
class Proof:
    """The largest difference seen, and what the dtype explains; relative to the largest output.

    `failure` is why one of the sides did not run, else empty.
    """

    error: float
    allowed: float
    what: str = "output"
    failure: str = ""

    @property
    def holds(self) -> bool:
        # A NaN compares false, so it refuses.
        return self.error <= self.allowed

    def __str__(self) -> str:
        if self.failure:
            return f"it does not run: {self.failure}"
        return f"relative error of the {self.what} {self.error:.2g}, allowed {self.allowed:.2g}"


@dataclass(frozen=True)
class Constants:
    """What decides the dropped pairs: alpha as it multiplies the routing weights, and the thresholds."""

    alpha_text: float
    alpha_vision: float
    tau_text: float
    tau_vision: float

    def thresholds(self) -> list[float]:
        """Routing weights that tell: where text and vision are cut, and one of other tokens that both cut."""
        pairs = ((self.alpha_text, self.tau_text), (self.alpha_vision, self.tau_vision))
        cuts = [tau / alpha if alpha > 0 else math.inf for alpha, tau in pairs]
        return [*cuts, min((cut for cut in cuts if cut > 0), default=math.inf) / 2]


def prove(
    block: Experts,
    rewritten: Node,
    modality: Node,
    real: Mapping[Node, Tensor],
    constants: Constants,
    thresholds: Node | None = None,
) -> Proof:
    """Run both sides of a rewrite.

    Args:
        block: The match.
        rewritten: The node that is to stand for `block.output`; it hangs on the block's inputs.
        modality: The node of the tokens' modality, `[T]`.
        real: The real tensor of each of the block's parameters.
        constants: What the profile says of the layer whose router this block has.
        thresholds: The node of the thresholds, `[2]`, where the rewrite reads them as an input: it is given
            those of `constants`.
    Returns:
        The worst of the comparisons; it holds where the rewrite may replace the block.
    """
    size = shape_of(block.hidden)[0]
    if isinstance(size, int) and size == 0:
        # Nothing goes in and nothing comes out.
        return Proof(0.0, 0.0)
    try:
        tokens = hint(size)
    except Mismatch as reason:
        return Proof(math.inf, 0.0, failure=str(reason))
    with torch.no_grad(), unset_fake_temporarily():
        real = {parameter: tensor.detach() for parameter, tensor in real.items()}
        try:
            return _prove(block, rewritten, modality, real, constants, thresholds, min(TOKENS, tokens))
        except Exception as first:
            failure = first
        # A literal size that was not understood, or indeed a rewrite that cannot run.
        if tokens > TOKENS and isinstance(failure, RuntimeError):
            try:
                return _prove(block, rewritten, modality, real, constants, thresholds, tokens)
            except Exception as second:
                failure = second
        return Proof(math.inf, 0.0, failure=f"{type(failure).__name__}: {failure}")


def _prove(
    block: Experts,
    rewritten: Node,
    modality: Node,
    real: Mapping[Node, Tensor],
    constants: Constants,
    thresholds: Node | None,
    tokens: int,
) -> Proof:
    # Each modality below and above its threshold; with two slots both sides are in one token.
    rounds = math.ceil((3 if block.top_k > 1 else 6) / tokens)
    some = _Some(block, real)
    proofs = [
        proof
        for first in range(0, rounds * tokens, tokens)
        for proof in _compare(_given(block, some, constants, tokens, first), rewritten, modality, thresholds)
    ]
    # A NaN compares with nothing, and is the worst of all.
    return max(proofs, key=lambda proof: math.inf if math.isnan(proof.error) else proof.error - proof.allowed)


def _given(block: Experts, some: "_Some", constants: Constants, tokens: int, first: int) -> "_Given":
    """Inputs as large as the dtype bears."""
    for shrink in (0, 4, 8, 12):
        given = _Given(block, some, constants, tokens, first, 2.0**-shrink)
        if given.low.isfinite().all():
            break
    return given


def _compare(given: "_Given", rewritten: Node, modality: Node, thresholds: Node | None) -> Iterator[Proof]:
    block, tokens = given.block, len(given.hidden)
    values = {**given.some.real, **given.inputs(given.weights), modality: given.modality}
    if thresholds is not None:
        taus = (given.constants.tau_text, given.constants.tau_vision)
        values[thresholds] = torch.tensor(taus, dtype=torch.float32, device=given.some.device)
    near = {**values, **given.inputs(given.near)}
    want = _run(block, block.output, values, tokens)
    got = _run(block, rewritten, values, tokens, **_EVERYTHING)
    cut = _run(block, rewritten, near, tokens)
    exact = given.specification(torch.float64, given.weights, _EVERYTHING)
    kept = given.specification(torch.float64, given.near, {})
    # The band is for where the low-precision specification is exact by luck; products add up in float32 in
    # whatever order, and there rounding errors grow like the root of the length.
    length = max(given.some.real[block.gate_up].shape[1:])
    band = 4 * torch.finfo(given.some.dtype).eps + 16 * torch.finfo(torch.float32).eps * math.sqrt(length)
    for size in given.sizes.unique():
        rows = given.sizes == size
        allowed = 2 * _error(given.low[rows], exact[rows]) + band
        yield Proof(_error(want[rows], exact[rows]), allowed, "matched nodes")
        yield Proof(_error(got[rows], exact[rows]), allowed, "rewritten block")
        yield Proof(_error(cut[rows], kept[rows]), allowed, "rewritten block with its thresholds")


def _error(result: Tensor, truth: Tensor) -> float:
    scale = truth.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((result.double() - truth).abs().max() / scale).item()


_EVERYTHING = {"tau_text": -math.inf, "tau_vision": -math.inf}


class _Some:
    """Some of a block's experts, in the model's own dtype and in float64, copied once for all rounds."""

    def __init__(self, block: Experts, real: Mapping[Node, Tensor]) -> None:
        self.real = real
        gate_up = real[block.gate_up]
        self.dtype, self.device = gate_up.dtype, gate_up.device
        number = max(block.top_k, min(EXPERTS, COPIED // gate_up[0].numel(), block.num_experts))
        order = torch.randperm(block.num_experts, generator=torch.Generator().manual_seed(0))
        self.ids = order[:number].to(self.device)
        parameters = (block.gate_up, block.down, block.gate_up_bias, block.down_bias)
        own = [None if parameter is None else real[parameter][self.ids] for parameter in parameters]
        self.weights = {None: own, torch.float64: [None if w is None else w.double() for w in own]}
        # Root mean square of the first product's weights.
        self.size = self.weights[torch.float64][0].pow(2).mean().sqrt().clamp(min=1e-30).float()  # type: ignore[union-attr]


class _Given:
    """Random inputs of a block, and what the specification makes of them.

    Args:
        first: Number of the first token; modality, size and side of the threshold go by it.
        shrink: Factor on the sizes.
    """

    def __init__(
        self,
        block: Experts,
        some: _Some,
        constants: Constants,
        tokens: int,
        first: int,
        shrink: float,
    ) -> None:
        self.block, self.some, self.constants = block, some, constants
        device = some.device
        # A generator of its own, on the CPU: nobody's random numbers change, on no device.
        generator = torch.Generator().manual_seed(first)
        number = torch.arange(first, first + tokens, device=device)
        self.modality = (number % 3).to(torch.uint8)
        self.sizes = number.new_tensor(SIZES, dtype=torch.float32)[number % 2] * shrink
        width = shape_of(block.hidden)[1]
        hidden = torch.randn(tokens, width, generator=generator).to(device)
        hidden *= (self.sizes / (some.size * math.sqrt(width)))[:, None]
        self.hidden = hidden.to(dtype_of(block.hidden))
        order = torch.rand(tokens, len(some.ids), generator=generator).to(device)
        self.local = order.topk(block.top_k).indices
        self.experts = some.ids[self.local]
        dtype = dtype_of(block.weights)
        random = torch.rand(tokens, block.top_k, generator=generator).to(device) * 0.9 + 0.1
        self.weights = random.to(dtype)
        # Where a threshold is no weight that a router gives, any weight will do.
        theta = torch.tensor(constants.thresholds(), device=device)[self.modality.int()][:, None]
        sane = (theta > 64 * torch.finfo(dtype).smallest_normal) & (theta < 256)
        above = (number[:, None] // 3 + torch.arange(block.top_k, device=device)) % 2 * 2 - 1
        self.near = torch.where(sane, theta * (1 + 4 * torch.finfo(dtype).eps * above), random).to(dtype)
        self.low = self.specification(None, self.weights, _EVERYTHING)

    def inputs(self, weights: Tensor) -> dict[Node, Tensor]:
        """By node."""
        block = self.block
        if block.kind == "dense":
            weights = weights.new_zeros(len(weights), block.num_experts).scatter(1, self.experts, weights)
        return {block.hidden: self.hidden, block.experts: self.experts, block.weights: weights}

    def specification(
        self, dtype: torch.dtype | None, weights: Tensor, thresholds: dict[str, float]
    ) -> Tensor:
        """`reference` in `dtype` (None: the model's own), `[T, H]`, float64."""
        block = self.block
        return reference(
            self.hidden.to(dtype or self.some.dtype),
            weights,
            weights if dtype is None else weights.to(dtype),
            self.local,
            self.modality,
            *self.some.weights[dtype],  # type: ignore[arg-type]
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
        if node.op != "call_function":
            raise Mismatch(f"it reads {node.name}, which is no input of the block")
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        if is_call(node, masked_moe):
            kwargs = {**kwargs, **constants}
        values[node] = node.target(*_resized(node, args, sizes), **kwargs)  # type: ignore[operator]
    return values[output]


def _resized(node: Node, args: tuple[Any, ...], sizes: dict[int, int]) -> tuple[Any, ...]:
    """Arguments with literal numbers of tokens replaced; they always come first in a shape."""

    def resized(shape: Any) -> list[Any]:
        return [*(sizes.get(size, size) for size in shape[:1]), *shape[1:]]

    if is_call(node, *VIEWS, aten.expand.default) and len(args) > 1 and isinstance(args[1], list | tuple):
        shape = list(args[1])
        # In a view -1 is what is left over, in an expand it keeps the size.
        if shape and hint(shape_of(node)[0]) in sizes and -1 not in shape:
            shape[0] = -1
        return (args[0], shape, *args[2:])
    if is_call(node, aten.arange.default):
        return (sizes.get(args[0], args[0]), *args[1:])
    if is_call(node, aten.arange.start, aten.arange.start_step):
        return (args[0], sizes.get(args[1], args[1]), *args[2:])
    if is_call(node, aten.zeros.default, aten.full.default):
        return (resized(args[0]), *args[1:])
    if is_call(node, aten.new_zeros.default):
        return (args[0], resized(args[1]), *args[2:])
    return args
