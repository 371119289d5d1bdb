"""alpha estimated by one forward and one backward pass over each batch, for all blocks at once.

For a small change d of the routed output y of a block, KL(original || changed) at an answer token is
1/2 (J d)' F (J d) to second order: J is how the logits follow y, and F = diag(p) - p p' the Fisher matrix of
the answer's distribution. With a random u whose covariance is F, drawn anew for each answer token, a backward
pass of u gives G = J' u, and E[(G . d)^2] = (J d)' F (J d). The estimates differ in what they take for d:

    taylor        any direction of the length of y, for each token by itself: (sum |G| |y|)^2, summed over
                  the tokens of all batches before it is squared, so that no few of them decide
    taylor-gate   -y, all tokens of a row at once: 1/2 (sum G . y)^2, which is what a gate on y would feel
    taylor-loss   the same gate felt by the answer's own loss, to first order: |sum G . y|, G its gradient

Dropping a whole block is no small change. Where it leads has little to do with where the first step leads,
but much with how far; so the first of them follows the exact alpha best (bench/alpha.py measures it). Its
squares token by token are swayed by few tokens, and follow it less well.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modes_fx.batches import IGNORED, Batch, checked_labels
from modes_fx.calibration.alpha_exact import Task, shared
from modes_fx.calibration.distributed import Share
from modes_fx.calibration.prefix import Prefix, replaced_forwards
from modes_fx.calibration.state import Journal
from modes_fx.calibration.weight_scale import measure_scales
from modes_fx.measure import answer_logits, check_finite, frozen
from modes_fx.modality import VISION
from modes_fx.progress import Bar
from modes_fx.skipping import Tokens, skip

Estimate = Literal["taylor", "taylor-gate", "taylor-loss"]
ESTIMATES: tuple[str, ...] = get_args(Estimate)


def measure_taylor(
    task: Task, batches: Iterable[Batch], journal: Journal, bar: Bar, estimate: Estimate
) -> None:
    """Add this process's share of the batches to the journal's state, as `measure_exact` does.

    Layers are run a second time during the backward pass instead of holding all that they compute.

    Raises:
        ModesError: Logits that are not finite, or batches that are not what they were.
    """
    layers = Prefix(task.model, task.blocks).layers
    for share, batch in shared(task, batches, len(journal.state.batches)):
        scales = list(journal.state.weight_scales)
        sums, num_tokens = _measure_batch(task, share, batch, scales, layers, estimate)
        bar.step(len(share.blocks) * len(task.variant.dropped))
        journal.keep(
            journal.state.with_batch(
                task.digests[share.batch],
                sums,
                scales,
                len(batch["labels"]) if share.counts else 0,
                num_tokens if share.counts else 0,
            )
        )


def finished(sums: list[list[float]], estimate: Estimate) -> list[list[float]]:
    """The estimates that the sums over all batches stand for."""
    return [[value**2 for value in row] for row in sums] if estimate == "taylor" else sums


def rank_correlation(estimated: Sequence[float], exact: Sequence[float]) -> float:
    """Spearman's: 1 where both put the blocks in the same order, -1 where in the opposite one.

    Equal values share their ranks; 0 where all values of either list are equal.
    """
    ranks = [_ranks(torch.tensor(values, dtype=torch.float64)) for values in (estimated, exact)]
    a, b = (rank - rank.mean() for rank in ranks)
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    below = (values[None] < values[:, None]).sum(1)
    return below + (values[None] == values[:, None]).sum(1) / 2


def _measure_batch(
    task: Task,
    share: Share,
    batch: Batch,
    scales: list[list[float] | None],
    layers: Sequence[nn.Module],
    estimate: Estimate,
) -> tuple[list[list[float]], int]:
    """(estimates of the blocks in `share`, summed over answer tokens; answer tokens)."""
    watched = [_Watched(estimate, *batch["input_ids"].shape) for _ in task.blocks]
    measure = measure_scales(scales, share.batch)

    def rule(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        watched[block].tokens = tokens
        return measure(block, weights.detach(), tokens)

    hooks = skip(task.model, task.blocks, rule, *task.ids)
    sums = [[0.0] * len(task.variant.dropped) for _ in task.blocks]
    with frozen(task.model), torch.enable_grad(), hooks, _recomputed(layers):
        handles = [
            block.experts.register_forward_hook(watch.forward_hook)
            for block, watch in zip(task.blocks, watched, strict=True)
        ]
        try:
            logits = answer_logits(task.model, batch)
            check_finite(logits, f"the original model, batch {share.batch}")
            if not len(logits):
                return sums, 0
            logits.backward(_cotangent(logits.detach(), batch, estimate, seed=share.batch))
        finally:
            for handle in handles:
                handle.remove()
    for block in share.blocks:
        sums[block] = [watched[block].sum(modality) for modality in task.variant.dropped]
    return sums, len(logits)


class _Watched:
    """A block's routed output in one pass, and its gradient: what of the two each token contributes."""

    def __init__(self, estimate: Estimate, num_rows: int, length: int) -> None:
        self._estimate = estimate
        self._shape = (num_rows, length)
        self.tokens: Tokens | None = None
        self._modality: Tensor | None = None
        self._gate: Tensor | None = None
        self._products: Tensor | None = None

    def forward_hook(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self.tokens is not None
        if self._gate is None:
            self._gate = output.new_ones((*output.shape[:-1], 1), dtype=torch.float32, requires_grad=True)
            # Experts that see every token have a row for each of them and each expert.
            rows = output.shape[:-1].numel()
            modality = self.tokens.modality
            self._modality = modality.repeat(rows // max(1, len(modality))).to(output.device)
            lengths = output.detach().float().norm(dim=-1)
            gated = output * self._gate.to(output.dtype)
            gated.register_hook(lambda grad: self._note(lengths, grad))
            return gated
        # When its layer runs again during the backward pass.
        return output * self._gate.to(output.dtype)

    def _note(self, lengths: Tensor, grad: Tensor) -> None:
        self._products = (lengths * grad.float().norm(dim=-1)).flatten()

    def sum(self, modality: int | None) -> float:
        """What the tokens of a modality, or (None) of text and vision both, add to the estimate."""
        if self._modality is None or self._gate is None or self._products is None:
            return 0.0  # no token came here, or nothing of it reaches an answer
        chosen = self._modality <= VISION if modality is None else self._modality == modality
        if self._estimate == "taylor":
            return float(self._products.double()[chosen].sum())
        assert self._gate.grad is not None
        felt = self._gate.grad.flatten().double() * chosen
        # A row answers by itself. A block that is given some tokens only is taken as one row.
        rows = felt.view(self._shape).sum(1) if len(felt) == self._shape[0] * self._shape[1] else felt.sum()
        return float(rows.abs().sum() if self._estimate == "taylor-loss" else rows.square().sum() / 2)


def _cotangent(logits: Tensor, batch: Batch, estimate: Estimate, seed: int) -> Tensor:
    """What to go back from, `[answer tokens, vocabulary]`."""
    p = logits.float().softmax(-1)
    if estimate == "taylor-loss":
        labels = checked_labels(batch)[:, 1:]
        chosen = labels[labels != IGNORED].to(logits.device)
        p[torch.arange(len(p), device=p.device), chosen] -= 1
        return p.to(logits.dtype)
    # On the CPU, so that a seed gives the same numbers everywhere.
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.device)
    scaled = p.sqrt() * noise
    return (scaled - p * scaled.sum(-1, keepdim=True)).to(logits.dtype)


@contextmanager
def _recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers that keep only their inputs for the backward pass."""

    def recomputing(forward: Any) -> Any:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    with replaced_forwards({layer: recomputing(layer.forward) for layer in layers}):
        yield
