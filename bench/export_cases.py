"""The shipped model at a wanted skip rate, without a search: what `bench/export_*.py` export."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modes_fx import demo
from modes_fx.blocks import find_blocks
from modes_fx.calibration.calibrate import token_ids
from modes_fx.profile import Layer, Profile, fingerprint
from modes_fx.skipping import Tokens, keep_all, skip

RATES = (0.0, 0.5, 0.83, 1.0)


def profile_at(model: Any, processor: Any, rate: float) -> Profile:
    """A profile of equal alphas that drops the part `rate` of the text and vision pairs of 26 samples.

    At 1 it drops all of them; special tokens keep theirs.
    """
    blocks = find_blocks(model)
    visual, special = token_ids(model, processor)
    layers = tuple(
        Layer(block.name, 1.0, 1.0, block.num_experts, block.top_k, fingerprint(block.router_weight))
        for block in blocks
    )
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    tau = float("inf") if rate == 1 else _quantile(model, blocks, visual, special, rate)
    return Profile(layers, tau, tau, visual, special, vocabulary, hidden, target_skip=rate)


def _quantile(
    model: Any, blocks: Sequence[Any], visual: Sequence[int], special: Sequence[int], rate: float
) -> float:
    """The routing weight below which the part `rate` of the pairs of tokens that may be skipped lies."""
    if rate == 0:
        return 0.0
    seen: list[Tensor] = []

    def note(index: int, weights: Tensor, tokens: Tokens) -> Tensor:
        seen.append(weights[(tokens.modality < 2) & tokens.real].flatten())
        return keep_all(index, weights, tokens)

    with torch.no_grad(), skip(model, blocks, note, visual, special):
        for batch in demo.batches("calibration", 26):
            model(**batch.inputs)
    return float(torch.quantile(torch.cat(seen), rate))


def examples(rows: int = 2) -> list[dict[str, Tensor]]:
    """Inputs to trace with, of so many rows: pictures of both sizes that the suite has."""
    batches = demo.batches("calibration", 26, batch_size=rows)
    return [dict(batches[0].inputs), dict(batches[-1].inputs)]
