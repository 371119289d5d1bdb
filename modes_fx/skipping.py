"""Simulate a skipping rule on the unedited eager model: dropped pairs get weight zero, the work stays.

A pre-hook on the whole model notes the modality of the call's tokens; a pre-hook on each experts module (or a
hook on the router, where experts are called without weights) asks the rule which pairs to drop, zeroes their
weights and counts them. This is what calibration, search and the comparison policies measure with; the
compiled model must give the same numbers and do less.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.blocks import Block, find_blocks, unwrap
from modes_fx.call_rows import (
    Enclosing,
    argument,
    enclosing_modules,
    find_rows,
    values_of_rows,
    with_argument,
)
from modes_fx.errors import ModesError, ProfileError
from modes_fx.modality import OTHER, VISION, token_modality
from modes_fx.profile import Profile, fingerprint

# How generation would come by a token: with the prompt, one at a time, or not at all (the last token of an
# answer is generated, and nothing is computed from it).
PREFILL, DECODE, NO_PHASE = 0, 1, 2


@dataclass(frozen=True)
class Tokens:
    """The tokens of one call, flattened row by row.

    Attributes:
        modality: `[T]` uint8.
        real: `[T]` bool, False at padding.
        phase: `[T]` uint8, PREFILL, DECODE or NO_PHASE, where whoever runs the model has told `skip`.
        experts: `[T, K]` int64, the expert of each pair; inside `skip`.
        hidden: `[T, H]`, the rows that the experts are given; inside `skip`.
        left: `[T]` int64, real tokens of the sequence from this one on, itself included; None where a block
            is not given all tokens of the call.
    """

    modality: Tensor
    real: Tensor
    phase: Tensor | None = None
    experts: Tensor | None = None
    hidden: Tensor | None = None
    left: Tensor | None = None

    def to(self, device: torch.device) -> "Tokens":
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return Tokens(**moved)


# (index of the block, routing weights [T, K] in float32, tokens) -> dropped [T, K] bool, or a factor on each
# weight, [T, K] floating point, zero where the pair is dropped
Rule = Callable[[int, Tensor, Tokens], Tensor]


@dataclass(frozen=True)
class Counts:
    """Pairs seen and dropped, `[blocks, 3]` int64 each (text, vision, other); padding is not counted."""

    pairs: Tensor
    dropped: Tensor

    @classmethod
    def zero(cls, num_blocks: int, device: torch.device | str = "cpu") -> "Counts":
        return cls(*(torch.zeros(num_blocks, 3, dtype=torch.int64, device=device) for _ in range(2)))

    def add(self, block: int, dropped: Tensor, tokens: Tokens) -> None:
        """Count the pairs of one block and call, `dropped [T, K]`: what a `Rule` answers."""
        if dropped.is_floating_point():
            dropped = dropped == 0
        modality, real = tokens.modality.long(), tokens.real.long()
        device = self.pairs.device
        self.pairs[block].index_add_(0, modality.to(device), (real * dropped.shape[1]).to(device))
        self.dropped[block].index_add_(0, modality.to(device), (real * dropped.sum(-1)).to(device))

    def cpu(self) -> "Counts":
        return Counts(self.pairs.cpu(), self.dropped.cpu())

    def skip(self, modality: int | None = None) -> float:
        """Dropped / all pairs, of one modality or of all three; 0.0 where there are no pairs."""
        columns = slice(None) if modality is None else modality
        pairs = int(self.pairs[:, columns].sum())
        return int(self.dropped[:, columns].sum()) / pairs if pairs else 0.0

    def skip_per_block(self, modality: int | None = None) -> list[float]:
        """`skip` of each block alone."""
        rows = zip(self.pairs.split(1), self.dropped.split(1), strict=True)
        return [Counts(pairs, dropped).skip(modality) for pairs, dropped in rows]


def keep_all(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
    """The rule that drops nothing."""
    return torch.zeros_like(weights, dtype=torch.bool)


def drop_block(block: int, modality: int | None) -> Rule:
    """Drop every pair of one block, for tokens of one modality or (None) of text and vision both."""

    def rule(index: int, weights: Tensor, tokens: Tokens) -> Tensor:
        chosen = tokens.modality <= VISION if modality is None else tokens.modality == modality
        return (chosen & (index == block))[:, None].expand_as(weights)

    return rule


def block_alphas(profile: Profile, blocks: Sequence[Block]) -> list[tuple[float, float]]:
    """(alpha_text, alpha_vision) of each block, found by its router weight, for its weights as they enter the
    experts: a factor that the model has folded into them is taken out.

    Raises:
        ProfileError: A block is not in the profile.
    """
    layers = [profile.layer_for(fingerprint(block.router_weight)) for block in blocks]
    for block, layer in zip(blocks, layers, strict=True):
        if layer is None:
            raise ProfileError(
                f"The profile was made for another model: {block.name} is not in it. "
                "Calibrate this model, or pass the profile made for it."
            )
    return [(layer.weight_alpha_text, layer.weight_alpha_vision) for layer in layers if layer is not None]


def thresholds(alphas: Sequence[tuple[float, float]], tau_text: float, tau_vision: float) -> Rule:
    """The paper's rule (Eq. 3 and 5): drop where `alpha[modality] * weight < tau[modality]`, in float32.

    Args:
        alphas: (alpha_text, alpha_vision) of each block, in layer order.
        tau_text, tau_vision: The two thresholds; `inf` drops every pair of the modality.
    """
    # Tokens of modality "other" meet a threshold that nothing is below.
    tau = torch.tensor([tau_text, tau_vision, -torch.inf], dtype=torch.float32)
    alpha = torch.tensor([[text, vision, 1.0] for text, vision in alphas], dtype=torch.float32)

    def rule(index: int, weights: Tensor, tokens: Tokens) -> Tensor:
        modality = tokens.modality.long()
        scores = alpha[index].to(weights.device)[modality][:, None] * weights
        return scores < tau.to(weights.device)[modality][:, None]

    return rule


@contextmanager
def skip(
    model: nn.Module,
    blocks: Sequence[Block],
    rule: Rule,
    visual_token_ids: Sequence[int],
    special_token_ids: Sequence[int],
    *,
    renormalise: bool = False,
    phase: Callable[[], Tensor] | None = None,
) -> Iterator[Counts]:
    """While open, every call of `model` runs with the pairs that `rule` names at weight zero.

    Args:
        model: The eager model, outermost module; its calls must carry `input_ids`.
        blocks: `find_blocks(model)`.
        rule: Asked once per block and call, see `Rule`.
        visual_token_ids, special_token_ids: See `token_modality`.
        renormalise: Rescale the kept weights of a token to the sum that all had. The paper does not.
        phase: Asked at each call for its tokens' phases, `[B, S]` uint8; without it rules are told none.
    Yields:
        Counts, filled as calls happen.
    """
    model = unwrap(model)
    counts = Counts.zero(len(blocks), blocks[0].router_weight.device)
    names = {module: name for name, module in model.named_modules()}
    signature = inspect.signature(model.forward)
    current: list[Tokens] = []
    enclosing = Enclosing()

    def note_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind_partial(*args, **kwargs).arguments
        call = {**call, **call.get("kwargs", {})}
        tokens = call_tokens(call, visual_token_ids, special_token_ids)
        current[:] = [tokens if phase is None else replace(tokens, phase=phase().flatten())]

    def without_dropped(index: int, weights: Tensor, rows: Tensor, experts: Tensor) -> Tensor:
        """Routing weights of the block that is given `rows`, `[T, K]`, with dropped pairs at zero."""
        block = blocks[index]
        if weights.shape[1] != block.top_k:
            raise ModesError(
                f"{block.name} was to route every token to {block.top_k} experts and routes them to "
                f"{weights.shape[1]}; this family is not supported yet."
            )
        tokens = current[0]
        tokens = tokens.to(weights.device)
        if len(tokens.modality) != len(weights):
            tokens = _tokens_of_rows(rows, tokens, enclosing, names[block.experts])
        answer = rule(index, weights.float(), replace(tokens, experts=experts, hidden=rows))
        counts.add(index, answer, tokens)
        if answer.is_floating_point():
            kept = (weights * answer).to(weights.dtype)
        else:
            kept = weights.masked_fill(answer, 0)
        if renormalise:
            mass = kept.sum(-1, keepdim=True)
            # Not where(mass > 0, a / mass, b): the gradient of the branch not taken would be NaN.
            kept = kept * (weights.sum(-1, keepdim=True) / torch.where(mass > 0, mass, 1))
        return kept

    def experts_hook(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            (place, experts), rows = _weights_of(args, kwargs), find_rows(args, kwargs)
            assert rows is not None
            weights = argument(place, args, kwargs)
            kept = without_dropped(index, weights, argument(rows, args, kwargs), experts)
            return with_argument(place, kept, args, kwargs)

        return hook

    def router_hook(index: int) -> Callable[..., Any]:
        """For experts that run on every token, with a score of zero where they were not chosen."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
            scores: Tensor = output[0]
            weights, chosen = scores.topk(blocks[index].top_k)
            kept = without_dropped(index, weights, args[0].reshape(-1, args[0].shape[-1]), chosen)
            return scores.scatter(1, chosen, kept), *output[1:]

        return hook

    def enclosing_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = find_rows(args, kwargs)
            if place is not None:
                enclosing.enter(name, argument(place, args, kwargs))

        return hook

    handles = [model.register_forward_pre_hook(note_tokens, with_kwargs=True)]
    for name, module in enclosing_modules(model, [names[block.experts] for block in blocks]).items():
        handles.append(module.register_forward_pre_hook(enclosing_hook(name), with_kwargs=True))
    for i, block in enumerate(blocks):
        if block.dispatch == "dense":
            handles.append(block.router.register_forward_hook(router_hook(i)))
        else:
            handles.append(block.experts.register_forward_pre_hook(experts_hook(i), with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def simulate(model: nn.Module, profile: Profile) -> Iterator[Counts]:
    """While open, `model` (eager) answers as the compiled model does with this profile; yields the counts."""
    blocks = find_blocks(model)
    rule = thresholds(block_alphas(profile, blocks), profile.tau_text, profile.tau_vision)
    with skip(model, blocks, rule, profile.visual_token_ids, profile.special_token_ids) as counts:
        yield counts


def call_tokens(
    call: Mapping[str, Any], visual_token_ids: Sequence[int], special_token_ids: Sequence[int]
) -> Tokens:
    """The tokens of a call of the model, from its `input_ids [B, S]` and `attention_mask [B, >=S]`."""
    input_ids = call.get("input_ids")
    if input_ids is None:
        raise ModesError(
            "The modality of the tokens cannot be known without input_ids; pass input_ids, not inputs_embeds."
        )
    real = torch.ones_like(input_ids, dtype=torch.bool)
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        # With a cache the mask covers the past too; the call's own tokens come last.
        real = mask[:, -input_ids.shape[1] :].bool().to(input_ids.device)
    modality = token_modality(input_ids, visual_token_ids, special_token_ids)
    left = real.long().flip(-1).cumsum(-1).flip(-1)
    return Tokens(modality.flatten(), real.flatten(), left=left.flatten())


def _weights_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
    """Where the routing weights are among an experts module's arguments, and the indices of the experts: the
    floating tensor that has the shape of the integer one. Families name and order them differently."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    tensors = {place: value for place, value in places if isinstance(value, Tensor)}
    for indices in tensors.values():
        if not indices.is_floating_point():
            for place, weights in tensors.items():
                if weights.is_floating_point() and weights.shape == indices.shape:
                    return place, indices
    raise ModesError("An experts module was called without top-k indices and weights; it is not supported.")


def _tokens_of_rows(rows: Tensor, tokens: Tokens, enclosing: Enclosing, name: str) -> Tokens:
    """The tokens that an experts module is given, where these are not all tokens of the call, in order."""
    keys = enclosing.keys(name, len(tokens.modality), rows.shape[-1])
    if keys is not None:
        modality = values_of_rows(tokens.modality, keys, rows, ambiguous=OTHER)
        real = values_of_rows(tokens.real, keys, rows, ambiguous=True)
        phase = None
        if tokens.phase is not None:
            phase = values_of_rows(tokens.phase, keys, rows, ambiguous=NO_PHASE)
        if modality is not None and real is not None:
            return Tokens(modality, real, phase)
    raise ModesError(
        f"{name} is given {len(rows)} rows in a call of {len(tokens.modality)} tokens, and no module around "
        "it has the rows of all, so it cannot be told which tokens they are; this family is not supported."
    )
