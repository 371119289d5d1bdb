"""A profile for any tiny model, without calibrating it."""

from typing import Any

from modes_fx.blocks import embedding_shape, find_blocks
from modes_fx.calibration.calibrate import token_ids
from modes_fx.profile import Layer, Profile, fingerprint
from modes_fx.testing.tokens import SPECIAL


def tiny_profile(
    model: Any, *, tau_text: float = 0.06, tau_vision: float = 0.065, weight_scale: float = 1.0
) -> Profile:
    """A profile for a tiny model, not calibrated: alphas differ much between layers and modalities.

    So much that a layer which ran with another one's constants gives another answer.

    Args:
        model: Of this package, or any other whose special ids are those of `modes_fx.testing`.
        tau_text, tau_vision: The thresholds; the default ones drop part of the pairs of every layer.
        weight_scale: Of every layer.
    """
    blocks = find_blocks(model)
    prints = [fingerprint(block.router_weight) for block in blocks]
    # Blocks that share their weights share their alphas.
    places = [prints.index(digest) for digest in prints]
    layers = tuple(
        Layer(
            name=block.name,
            alpha_text=0.15 + 0.35 * (place % 3) / 2,
            alpha_vision=0.45 - 0.3 * (place % 4) / 3,
            num_experts=block.num_experts,
            top_k=block.top_k,
            fingerprint=digest,
            weight_scale=weight_scale,
        )
        for block, digest, place in zip(blocks, prints, places, strict=True)
    )
    visual, special = token_ids(model, special_token_ids=SPECIAL)
    vocabulary, hidden = embedding_shape(model)
    return Profile(
        layers=layers,
        tau_text=tau_text,
        tau_vision=tau_vision,
        visual_token_ids=visual,
        special_token_ids=special,
        vocab_size=vocabulary,
        hidden_size=hidden,
    )
