"""NAEE's dynamic skipping, and what MC-MoE and DiEP make of it: drop the tail of a token's weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modes_fx.blocks import Block
from modes_fx.errors import ModesError
from modes_fx.policies.policy import Policy, ranks, skippable
from modes_fx.skipping import Rule, Tokens

_STRENGTHS = (math.log(1e-4), 0.0)  # of log(beta); beta = 1 keeps the first choice alone
_PROTECTED = 0.02  # MC-MoE's share of tokens that keep all experts


def tail_mass(weights: Tensor) -> Tensor:
    """Per pair, its own weight and all smaller ones of the token, over the token's sum, `[T, K]`."""
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    tail = ordered.flip(-1).cumsum(-1).flip(-1)
    # A sum in another order may exceed the whole by a rounding; the first choice is the whole exactly.
    tail = tail / tail[:, :1]
    return torch.empty_like(tail).scatter_(-1, order, tail)


def naee(num_blocks: int) -> Policy:
    """Drop ranks i to k where they weigh less than beta of the whole: top-p inside the top-k with p = 1 -
    beta, one beta per block, kept weights rescaled (NAEE, arXiv 2402.14800, appendix A.2; method notes 3.1).
    The first choice is always kept, so at most (k - 1)/k is skipped. The shape is log(beta) per block,
    relative to the strength."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        betas = [math.exp(min(0.0, strength + each)) for each in shape]

        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            return (tail_mass(weights) < betas[block]) & skippable(tokens)

        return dropped

    return Policy("NAEE", "arXiv 2402.14800, A.2", rule, _STRENGTHS, (0.0,) * num_blocks, renormalise=True)


def mc_moe(num_blocks: int) -> Policy:
    """NAEE's rule, but the most important 2 % of the tokens keep all experts (MC-MoE's online dynamic
    pruning, arXiv 2410.06270; method notes 3.2).

    A token's importance is `||t||_1 * mean attention received`. In the released code the attention of a token
    sums to one, so that it is `||t||_1 / (tokens left in the sequence)`; that is what is used here, and it
    needs no attention map. The share is taken over the tokens of a call, of text and vision.
    """
    plain = naee(num_blocks)

    def rule(shape: Sequence[float], strength: float) -> Rule:
        tail = plain.rule(shape, strength)

        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            if tokens.hidden is None or tokens.left is None:
                raise ModesError(
                    "MC-MoE needs every block to be given all tokens of a call; it cannot run here."
                )
            importance = tokens.hidden.float().abs().sum(-1) / tokens.left.clamp(min=1)
            able = skippable(tokens)[:, 0] & tokens.real
            if not able.any():
                return tail(block, weights, tokens)
            least = importance[able].quantile(1 - _PROTECTED) if int(able.sum()) < 1 << 24 else torch.inf
            return tail(block, weights, tokens) & (importance <= least)[:, None]

        return dropped

    return Policy("MC-MoE", "arXiv 2410.06270, ODP", rule, _STRENGTHS, plain.shape, renormalise=True)


def diep(similarity: Sequence[Tensor]) -> Policy:
    """NAEE's rule with beta times how alike the experts are: a pair goes sooner if its expert does what those
    ranked before it do (DiEP, arXiv 2509.16105, Eq. 12; method notes 3.3).

    The paper defines the factor for k = 2: `CKA(e0, e1) / mean CKA of the layer`. For more slots it is the
    mean over the experts ranked before, as the method notes suggest; the paper leaves it open.

    Args:
        similarity: Per block, CKA of the experts' outputs over its mean, `[E, E]`, see `expert_similarity`.
    """

    def rule(shape: Sequence[float], strength: float) -> Rule:
        betas = [math.exp(min(0.0, strength + each)) for each in shape]

        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            assert tokens.experts is not None
            place = ranks(weights)
            order = place.argsort(-1)
            chosen = tokens.experts.gather(-1, order)  # by rank
            alike = similarity[block].to(weights.device)[chosen[:, :, None], chosen[:, None, :]]
            before = torch.ones_like(alike[0]).tril(-1)
            count = before.sum(-1).clamp(min=1)
            factor = ((alike * before).sum(-1) / count).gather(-1, place)
            limit = torch.where(place == 0, 0.0, betas[block] * factor)
            return (tail_mass(weights) < limit) & skippable(tokens)

        return dropped

    # beta may exceed one here, for the factor may lie below.
    shape = (0.0,) * len(similarity)
    return Policy("DiEP", "arXiv 2509.16105, Eq. 12", rule, _STRENGTHS, shape, renormalise=True)


def expert_similarity(blocks: Sequence[Block], hidden: Sequence[Tensor]) -> list[Tensor]:
    """Per block, linear CKA of the outputs of every two experts over its mean, `[E, E]`.

    Args:
        hidden: Per block, rows that it was given, `[n, H]`; a few hundred are enough.
    """
    tables = []
    for block, rows in zip(blocks, hidden, strict=True):
        if block.dispatch != "slots":
            raise ModesError(f"{block.name} runs all experts on every token; DiEP cannot be set up for it.")
        grams = []
        ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
        for expert in range(block.num_experts):
            index = torch.full((len(rows), 1), expert, device=rows.device)
            out = block.experts(rows, index, ones).float()
            out = out - out.mean(0)
            gram = (out @ out.T).flatten()
            grams.append(gram / gram.norm().clamp(min=1e-12))
        table = torch.stack(grams) @ torch.stack(grams).T
        off = table.sum() - table.diagonal().sum()
        tables.append(table / (off / (len(table) * (len(table) - 1))).clamp(min=1e-12))
    return tables
