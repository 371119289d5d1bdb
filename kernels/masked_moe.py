"""`modes_fx::masked_moe`: the routed experts of one block, without the pairs that the profile drops.

    keep[t, j] = alpha[m] * scores[t, j] >= tau[m]        m = modality[t]: text, vision; other always keeps
    out[t]     = sum over kept j of weights[t, j] * expert[experts[t, j]](hidden[t])
    expert(x)  = formula(x @ gate_up) @ down      as silu(gate) * up, see `gate_formula`

This is the contract between `passes` (which write this one node per block) and the lowerings (on a CPU
`native/` and `_masked_moe_torch.py`, on a GPU `_masked_moe_triton.py`). `reference` below specifies it. The
rule is eq. 3 and 5 of the MoDES paper (arXiv 2511.15690); kept weights are not re-normalised unless
`renormalise` is set, and nothing protects the first choice: a token that loses all its pairs gets zero.

Imports torch alone, so that a compiler process which only traces never loads Triton.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from modes_fx.kernels.gate_formula import SILU, Formula, parse

TEXT, VISION, OTHER = 0, 1, 2  # the values of `modality`; repeated in modes_fx.modality, equality is tested

SCHEMA = (
    "masked_moe(Tensor hidden, Tensor scores, Tensor weights, Tensor experts, Tensor? modality, "
    "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, *, "
    "float alpha_text, float alpha_vision, float tau_text, float tau_vision, "
    f"str activation='{SILU}', bool interleaved=False, bool is_transposed=False, "
    "bool weights_on_input=False, bool renormalise=False, str layer='') -> Tensor"
)

_library = torch.library.Library("modes_fx", "FRAGMENT")
_library.define(SCHEMA.replace("masked_moe", "masked_moe_fallback"))
_library.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides])


def keep_mask(
    scores: Tensor,
    modality: Tensor | None,
    alpha_text: float,
    alpha_vision: float,
    tau_text: float | Tensor,
    tau_vision: float | Tensor,
) -> Tensor:
    """Which pairs are kept.

    Args:
        scores: Local routing signal of each slot, `[T, K]`, floating point.
        modality: `[T]`, uint8: 0 text, 1 vision, 2 other. None when every token is text.
        alpha_text, alpha_vision: The layer's importance per modality, dimensionless.
        tau_text, tau_vision: Thresholds, dimensionless; infinity drops everything. A tensor is float32, `[]`.
    Returns:
        `[T, K]`, bool. Compared in float32, whatever the dtype of `scores`.
    """
    scores = scores.float()
    keep_text = ~(scores * alpha_text < tau_text)
    if modality is None:
        return keep_text
    keep_vision = ~(scores * alpha_vision < tau_vision)
    modality = modality.reshape(-1, 1)
    return torch.where(modality == TEXT, keep_text, torch.where(modality == VISION, keep_vision, True))


def kept_weights(weights: Tensor, keep: Tensor, renormalise: bool) -> Tensor:
    """Weights of the kept pairs, zero elsewhere; `[T, K]`, the dtype of `weights`.

    With `renormalise`, the kept weights of a token are rescaled to the mass of its full top-k.
    """
    kept = torch.where(keep, weights, 0)
    if renormalise:
        mass = kept.sum(dim=-1, keepdim=True)
        kept = torch.where(mass > 0, kept * (weights.sum(dim=-1, keepdim=True) / mass), kept)
    return kept


@dataclass(frozen=True)
class Call:
    """One call of the op: its arguments, in the order of the schema.

    Args:
        hidden: Input of the experts, `[T, H]`, floating point.
        scores: What is compared with the thresholds, `[T, K]`, floating point.
        weights: What multiplies the expert outputs, `[T, K]`, floating point.
        experts: Chosen experts, `[T, K]`, int64, in `[0, E)`.
        modality: `[T]`, uint8 (0 text, 1 vision, 2 other), or None when every token is text.
        gate_up: `[E, 2I, H]`, or `[E, I, H]` where the formula has no gate; the dtype of `hidden`. With
            `is_transposed` the last two change places, here and in `down`.
        down: `[E, H_out, I]`; in all known families `H_out` is `H`.
        gate_up_bias: `[E, 2I]` or `[E, I]`, or None.
        down_bias: `[E, H_out]`, or None.
        alpha_text, alpha_vision, tau_text, tau_vision: See `keep_mask`.
        activation: What is computed between the two products, a formula; see `gate_formula`.
        interleaved: Gate and up alternate along `2I` instead of lying one after the other.
        is_transposed: See `gate_up`.
        weights_on_input: The weights multiply the input of the experts in place of their output.
        renormalise: See `kept_weights`.
        layer: The layer's name, for people who read the graph; not used.
    """

    hidden: Tensor
    scores: Tensor
    weights: Tensor
    experts: Tensor
    modality: Tensor | None
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    _: KW_ONLY
    alpha_text: float
    alpha_vision: float
    tau_text: float
    tau_vision: float
    activation: str = SILU
    interleaved: bool = False
    is_transposed: bool = False
    weights_on_input: bool = False
    renormalise: bool = False
    layer: str = ""

    @property
    def formula(self) -> Formula:
        return parse(self.activation)

    @property
    def output_size(self) -> int:
        """`H_out`, the width of the result."""
        return self.down.shape[2 if self.is_transposed else 1]

    @property
    def intermediate_size(self) -> int:
        """`I`, the width between the formula and the second product."""
        return self.down.shape[1 if self.is_transposed else 2]

    def keep(self) -> Tensor:
        """Which pairs are kept, `[T, K]`, bool."""
        alphas_and_taus = self.alpha_text, self.alpha_vision, self.tau_text, self.tau_vision
        return keep_mask(self.scores, self.modality, *alphas_and_taus)

    def check(self) -> None:
        """Raise ValueError where arguments do not fit one another; says which and what would fit."""
        tokens, width = self.hidden.shape
        if self.modality is not None and self.modality.numel() != tokens:
            raise ValueError(
                f"modality must have one value per token, {tokens}, got {tuple(self.modality.shape)}; "
                "the mask of another call was passed."
            )
        if not self.scores.shape == self.weights.shape == self.experts.shape:
            shapes = {name: tuple(getattr(self, name).shape) for name in ("scores", "weights", "experts")}
            raise ValueError(f"scores, weights and experts must be [T, K], all the same, got {shapes}.")
        formula, inner, out = self.formula, self.intermediate_size, self.output_size
        rows = 2 * inner if formula.is_gated else inner
        num_experts = self.down.shape[0]
        fitting = (num_experts, width, rows) if self.is_transposed else (num_experts, rows, width)
        if self.gate_up.shape != fitting:
            kind = "with a gate, so two rows" if formula.is_gated else "without a gate, so one row"
            raise ValueError(
                f"gate_up must be {fitting}, got {tuple(self.gate_up.shape)}: hidden is {width} wide, down "
                f"is {tuple(self.down.shape)}{', transposed' if self.is_transposed else ''}, and the formula "
                f"{str(formula)!r} is one {kind} of gate_up for each of the {inner} inputs of down."
            )
        for name, bias, size in (("gate_up", self.gate_up_bias, rows), ("down", self.down_bias, out)):
            if bias is not None and bias.shape != (num_experts, size):
                raise ValueError(f"{name}_bias must be {(num_experts, size)}, got {tuple(bias.shape)}.")


def reference(*args: Any, **kwargs: Any) -> Tensor:
    """The specification, for any dtype: expert by expert, in plain torch.

    Arguments as in `Call`.

    Returns:
        `[T, H_out]`, the dtype of `hidden`.
    """
    call = Call(*args, **kwargs)
    hidden, keep = call.hidden, call.keep()
    weights = kept_weights(call.weights, keep, call.renormalise)
    out = hidden.new_zeros(hidden.shape[0], call.output_size)
    for e in range(call.gate_up.shape[0]):
        tokens, slots = (keep & (call.experts == e)).nonzero(as_tuple=True)
        x, weight = hidden[tokens], weights[tokens, slots].unsqueeze(-1)
        if call.weights_on_input:
            x = (x * weight).to(hidden.dtype)
        y = _expert(call, e, x)
        if not call.weights_on_input:
            y = y * weight
        out.index_add_(0, tokens, y.to(hidden.dtype))
    return out


def _expert(call: Call, e: int, x: Tensor) -> Tensor:
    """One expert on its rows: `[N, H] -> [N, H_out]`."""
    gate_up, down = call.gate_up[e], call.down[e]
    if not call.is_transposed:
        gate_up, down = gate_up.t(), down.t()
    y = x @ gate_up if call.gate_up_bias is None else torch.addmm(call.gate_up_bias[e], x, gate_up)
    y = call.formula.evaluate(y, call.interleaved)
    return y @ down if call.down_bias is None else torch.addmm(call.down_bias[e], y, down)


def _fake(*args: Any, **kwargs: Any) -> Tensor:
    call = Call(*args, **kwargs)
    return call.hidden.new_empty(call.hidden.shape[0], call.output_size)


def _first(*args: Any, **kwargs: Any) -> Tensor:
    """What runs until the native operator takes over for CPU tensors, and where it cannot be built."""
    from modes_fx.kernels._masked_moe_native import take_over

    return masked_moe(*args, **kwargs) if take_over() else _fallback(*args, **kwargs)


def _fallback(*args: Any, **kwargs: Any) -> Tensor:
    """What no native kernel takes: build one where that helps, or use torch operators."""
    from modes_fx.kernels._masked_moe_native import add_kernel
    from modes_fx.kernels._masked_moe_torch import masked_moe_torch

    call = Call(*args, **kwargs)
    call.check()
    if add_kernel(call.activation, call.hidden.dtype):
        return masked_moe(*args, **kwargs)
    return masked_moe_torch(call)


def _cuda(*args: Any, **kwargs: Any) -> Tensor:
    from modes_fx.kernels._masked_moe_triton import masked_moe_triton

    call = Call(*args, **kwargs)
    call.check()
    return masked_moe_triton(call)


torch.library.register_fake("modes_fx::masked_moe", _fake, lib=_library)
_library.impl("masked_moe", _first, "CompositeExplicitAutograd")
_library.impl("masked_moe_fallback", _fallback, "CompositeExplicitAutograd")
_library.impl("masked_moe", _cuda, "CUDA")

masked_moe = torch.ops.modes_fx.masked_moe.default
