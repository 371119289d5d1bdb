"""`modes_fx::masked_moe`: the routed experts of one block, without the pairs that the profile drops.

    keep[t, j] = alpha[m] * scores[t, j] >= tau[m]        m = modality[t]: text, vision; other always keeps
    out[t]     = sum over kept j of weights[t, j] * expert[experts[t, j]](hidden[t])
    expert(x)  = (act(gate) * up) @ down,   gate, up = x @ gate_up

This is the contract between `passes` (which write this one node per block) and the lowerings (CPU in
`_masked_moe_cpu.py`, Triton in `_masked_moe_triton.py`). `reference` below is the specification. The rule is
eq. 3 and 5 of the MoDES paper (arXiv 2511.15690); kept weights are not re-normalised unless `renormalise` is
set, and nothing protects the first choice: a token that loses all its pairs gets zero.

Imports torch alone, so that a compiler process which only traces never loads Triton.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TEXT, VISION, OTHER = 0, 1, 2  # the values of `modality`; repeated in modes_fx.modality, equality is tested

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}

SCHEMA = (
    "masked_moe(Tensor hidden, Tensor scores, Tensor weights, Tensor experts, Tensor? modality, "
    "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, *, "
    "float alpha_text, float alpha_vision, float tau_text, float tau_vision, "
    "str activation='silu', bool interleaved=False, bool is_transposed=False, bool renormalise=False, "
    "str layer='') -> Tensor"
)

_library = torch.library.Library("modes_fx", "FRAGMENT")
_library.define(SCHEMA, tags=[torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides])


def keep_mask(
    scores: Tensor,
    modality: Tensor | None,
    alpha_text: float,
    alpha_vision: float,
    tau_text: float,
    tau_vision: float,
) -> Tensor:
    """Which pairs are kept.

    Args:
        scores: Local routing signal of each slot, `[T, K]`, floating point.
        modality: `[T]`, uint8: 0 text, 1 vision, 2 other. None when every token is text.
        alpha_text, alpha_vision: The layer's importance per modality, dimensionless.
        tau_text, tau_vision: Thresholds, dimensionless; infinity drops everything.
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


def expert_forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    is_transposed: bool,
) -> Tensor:
    """One expert on its rows: `[N, H] -> [N, H]`. Weights are that expert's slice, in the model's layout."""
    if not is_transposed:
        gate_up, down = gate_up.t(), down.t()
    y = torch.mm(x, gate_up) if gate_up_bias is None else torch.addmm(gate_up_bias, x, gate_up)
    gate, up = (y[:, ::2], y[:, 1::2]) if interleaved else y.chunk(2, dim=-1)
    y = ACTIVATIONS[activation](gate) * up
    return torch.mm(y, down) if down_bias is None else torch.addmm(down_bias, y, down)


def reference(
    hidden: Tensor,
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    modality: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    alpha_text: float,
    alpha_vision: float,
    tau_text: float,
    tau_vision: float,
    activation: str = "silu",
    interleaved: bool = False,
    is_transposed: bool = False,
    renormalise: bool = False,
    layer: str = "",
) -> Tensor:
    """The specification, for any dtype: every expert on every token, dropped pairs weighted by zero.

    Args:
        hidden: Input of the experts, `[T, H]`, floating point.
        scores: What is compared with the thresholds, `[T, K]`, floating point.
        weights: What multiplies the expert outputs, `[T, K]`, floating point.
        experts: Chosen experts, `[T, K]`, int64, in `[0, E)`.
        modality: `[T]`, uint8 (0 text, 1 vision, 2 other), or None when every token is text.
        gate_up: `[E, 2I, H]`, or `[E, H, 2I]` with `is_transposed`; the dtype of `hidden`.
        down: `[E, H, I]`, or `[E, I, H]` with `is_transposed`.
        gate_up_bias: `[E, 2I]`, or None.
        down_bias: `[E, H]`, or None.
        alpha_text, alpha_vision, tau_text, tau_vision: See `keep_mask`.
        activation: A key of `ACTIVATIONS`.
        interleaved: Gate and up alternate along `2I` instead of lying one after the other.
        is_transposed: See `gate_up`.
        renormalise: See `kept_weights`.
        layer: The layer's name, for people who read the graph; not used.
    Returns:
        `[T, H]`, the dtype of `hidden`.
    """
    keep = keep_mask(scores, modality, alpha_text, alpha_vision, tau_text, tau_vision)
    kept = kept_weights(weights, keep, renormalise)
    out = torch.zeros_like(hidden)
    for e in range(gate_up.shape[0]):
        y = expert_forward(
            hidden,
            gate_up[e],
            down[e],
            None if gate_up_bias is None else gate_up_bias[e],
            None if down_bias is None else down_bias[e],
            activation,
            interleaved,
            is_transposed,
        )
        share = torch.where(experts == e, kept, 0).sum(dim=-1, keepdim=True)
        # A token outside the expert must not turn the expert's overflow into NaN (inf * 0).
        out += torch.where(share != 0, y * share, 0).to(hidden.dtype)
    return out


def _fake(hidden: Tensor, *_args: Any, **_constants: Any) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _check(hidden: Tensor, scores: Tensor, experts: Tensor, modality: Tensor | None, activation: str) -> None:
    if modality is not None and modality.numel() != hidden.shape[0]:
        raise ValueError(
            f"modality must have one value per token, {hidden.shape[0]}, got {tuple(modality.shape)}; "
            "the mask of another call was passed."
        )
    if scores.shape != experts.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and experts {tuple(experts.shape)} must be [T, K].")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")


def _cpu(
    hidden: Tensor,
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    modality: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    alpha_text: float,
    alpha_vision: float,
    tau_text: float,
    tau_vision: float,
    activation: str = "silu",
    interleaved: bool = False,
    is_transposed: bool = False,
    renormalise: bool = False,
    layer: str = "",
) -> Tensor:
    from modes_fx.kernels._masked_moe_cpu import masked_moe_cpu

    _check(hidden, scores, experts, modality, activation)
    keep = keep_mask(scores, modality, alpha_text, alpha_vision, tau_text, tau_vision)
    return masked_moe_cpu(
        hidden,
        kept_weights(weights, keep, renormalise),
        experts,
        keep,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation,
        interleaved,
        is_transposed,
    )


def _cuda(
    hidden: Tensor,
    scores: Tensor,
    weights: Tensor,
    experts: Tensor,
    modality: Tensor | None,
    *expert_weights: Any,
    layer: str = "",
    **constants: Any,
) -> Tensor:
    from modes_fx.kernels._masked_moe_triton import masked_moe_triton

    _check(hidden, scores, experts, modality, constants.get("activation", "silu"))
    return masked_moe_triton(hidden, scores, weights, experts, modality, *expert_weights, **constants)


torch.library.register_fake("modes_fx::masked_moe", _fake, lib=_library)
_library.impl("masked_moe", _cpu, "CPU")
_library.impl("masked_moe", _cuda, "CUDA")

masked_moe = torch.ops.modes_fx.masked_moe.default
