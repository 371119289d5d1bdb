"""A threshold per block and modality, set so that the next pair to go costs the same everywhere.

MoDES weighs a block by the KL of losing *all* of its experts. What a threshold decides about is the pair
next to it, and that may cost little in a block that cannot be missed. At the best thresholds nothing is
gained by keeping one pair more in one (block, modality) and one less in another: the KL per pair at the
threshold, its marginal cost, is the same in all. One backward pass gives that cost for all of them at once,
as the gradient of the KL with respect to a factor on each routing weight, averaged over the pairs next to the
threshold. So thresholds are moved against their costs, batch by batch, at a constant skip rate. Few samples
mislead: a part of them moves nothing, and decides how far to follow.

The result is a profile like any other, for `alpha * weight < tau` is `weight < tau / alpha`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modes_fx.batches import IGNORED, Batch, checked_labels
from modes_fx.blocks import find_blocks
from modes_fx.measure import Measured, Meter, answer_logits, bootstrap, evaluating, frozen
from modes_fx.modality import TEXT, VISION
from modes_fx.policies.policy import Bench, PairRecorder, tune
from modes_fx.policies.two_thresholds import power, tempered
from modes_fx.profile import Profile
from modes_fx.progress import progress_bar
from modes_fx.skipping import Rule, Tokens, block_alphas, keep_all, skip

Groups = NDArray[np.float64]  # a number per block and modality, [blocks, 2]
Flags = NDArray[np.bool_]  # one per sample

# Share of a group's pairs, on each side of the threshold, that its marginal cost is the mean of.
_WINDOW = 0.08
# Costs of a batch are noisy; how much of the running mean stays.
_MEMORY = 0.8
# How far the logarithm of a group's kept odds moves in the first and in the last step.
_FIRST, _LAST = 0.35, 0.06
_ODDS = 6.0  # greatest logarithm of the kept odds
# Of so many samples one moves no threshold, but chooses among them.
_HELD_OUT = 3
# How far to go from the start to where the costs led.
_MIXES = (0.5, 1.0)
# Part of the tolerance within which those must meet the skip rate: at 88 %, KL grows by a quarter per point.
_CLOSE = 0.2


def marginal(
    model: nn.Module,
    batches: Iterable[Batch],
    profile: Profile,
    target_skip: float,
    *,
    steps: int = 36,
    start_passes: int = 14,
    tolerance: float = 0.005,
    progress: bool = True,
) -> Profile:
    """A profile that skips `target_skip` with a threshold of its own for each block and modality.

    Args:
        model, batches: As for `search`; a backward pass through the decoder must fit beside the model.
        profile: Calibrated; its alphas are where the search starts.
        target_skip: Dropped pairs / all pairs over non-padding tokens, 0..1.
        steps: Batches whose marginal costs move the thresholds, in turn; a step takes as long as three
            passes over one batch. A third of the samples, the same at every call, is left out of them.
        start_passes: Over all batches, to find the two thresholds and the power of alpha to start from.
        tolerance: How far the measured skip rate may lie from the target.
    Returns:
        The profile with other alphas and thresholds, method "marginal": those that the costs led to or those
        half way, if they surely measure less KL on the samples left out than those at the start do.
    Raises:
        SearchError: The target cannot be reached.
    """
    with progress_bar("marginal", None, enabled=progress) as bar:
        alphas = block_alphas(profile, find_blocks(model))
        recorder, weights = PairRecorder(), GroupWeights(len(alphas))

        def observe(block: int, each: Tensor, tokens: Tokens) -> Tensor:
            recorder(block, each, tokens)
            return weights(block, each, tokens)

        ids = (profile.visual_token_ids, profile.special_token_ids)
        bench = Bench(Meter(model, batches, *ids, observe=observe, bar=bar), recorder, bar)
        found = tune_marginal(
            bench, weights, alphas, target_skip, steps=steps, start_passes=start_passes, tolerance=tolerance
        )
    return as_profile(profile, found, target_skip)


@dataclass(frozen=True)
class Found:
    """Thresholds on the routing weight per block and modality, `[blocks, 2]`, and what they measure.

    `costs` are the marginal costs, nats per pair, that the last steps saw; zeros if none were taken. `mix` is
    how far the thresholds followed them, from 0 (the start) to 1.
    """

    thresholds: Tensor
    measured: Measured
    costs: Groups
    passes: float
    mix: float = 0.0

    @property
    def rule(self) -> Rule:
        return group_rule(self.thresholds)


def tune_marginal(
    bench: Bench,
    weights: "GroupWeights",
    alphas: Sequence[tuple[float, float]],
    target_skip: float,
    *,
    steps: int = 36,
    start_passes: int = 14,
    tolerance: float = 0.005,
) -> Found:
    """See `marginal`; for a bench that other policies share."""
    begun = bench.passes
    start = tune(tempered(alphas), bench, target_skip, passes=start_passes, tolerance=tolerance)
    tempo = [[power(alpha, start.shape[1]) for alpha in pair] for pair in alphas]
    taus = (math.exp(start.strength + start.shape[0]), math.exp(start.strength))
    at_start = torch.tensor(
        [
            [tau / alpha if alpha else math.inf for alpha, tau in zip(pair, taus, strict=True)]
            for pair in tempo
        ]
    )
    best = Found(at_start, start.measured, np.zeros_like(weights.sizes), bench.passes - begun)
    if not steps:
        return best
    held = held_out(bench.meter.survey.answer_tokens)
    descent = _Descent(bench, weights, weights.dropped(at_start), target_skip, held)
    descent.run(steps)
    # At the same skip rate as the others, as nearly.
    best = _meet(bench, descent, 0.0, target_skip, tolerance) or best
    tries = [_meet(bench, descent, mix, target_skip, tolerance) for mix in _MIXES]
    surely = [t for t in tries if t is not None and is_surely_less(t.measured, best.measured, held)]
    best = min(surely, key=lambda found: found.measured.kl, default=best)
    return dataclasses.replace(best, costs=descent.costs, passes=bench.passes - begun)


def held_out(answer_tokens: Sequence[int]) -> Flags:
    """Which samples choose, `[samples]` bool: a third of those that have answers, drawn the same way each
    time; none where there are fewer than three."""
    answering = np.flatnonzero(answer_tokens)
    held = np.zeros(len(answer_tokens), dtype=np.bool_)
    drawn = np.random.default_rng(0).permutation(answering)
    held[drawn[: len(answering) // _HELD_OUT]] = True
    return held


def is_surely_less(one: Measured, other: Measured, held: Flags) -> bool:
    """Whether the KL of `one` is less on the samples held out (on all, where none are), by the 95 % interval
    of the difference, paired by samples."""
    chosen = held if held.any() else ~held
    differences = (np.array(one.kl_sums) - np.array(other.kl_sums))[chosen]
    tokens = np.array(one.answer_tokens)[chosen]
    return bootstrap(differences.tolist(), tokens.tolist(), studentised=True)[1] < 0


def _meet(
    bench: Bench, descent: "_Descent", mix: float, target_skip: float, tolerance: float
) -> Found | None:
    """Thresholds that follow the costs so far, moved together until the measured skip meets the target."""
    kept = descent.start + mix * (descent.mean - descent.start)
    drift = descent.drift
    for _ in range(4):
        limits = descent.limits(descent.level(kept, target_skip - drift))
        measured = bench.measure(group_rule(limits), False)
        miss = measured.skip - target_skip
        if abs(miss) <= _CLOSE * tolerance:
            break
        drift += miss
    return Found(limits, measured, descent.costs, 0, mix) if abs(miss) <= tolerance else None


class GroupWeights:
    """A rule for `Meter(observe=...)` that keeps the routing weights of each block and modality, ascending.

    Attributes:
        sizes: Pairs of each group, `[blocks, 2]`.
    """

    def __init__(self, num_blocks: int) -> None:
        self._parts: list[list[list[Tensor]]] = [[[], []] for _ in range(num_blocks)]
        self._sorted: list[list[Tensor]] | None = None

    def __call__(self, block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        for modality in (TEXT, VISION):
            chosen = (tokens.modality == modality) & tokens.real
            self._parts[block][modality].append(weights[chosen].flatten().cpu())
        return keep_all(block, weights, tokens)

    @property
    def groups(self) -> list[list[Tensor]]:
        if self._sorted is None:
            self._sorted = [[torch.cat(part).sort().values for part in parts] for parts in self._parts]
        return self._sorted

    @property
    def sizes(self) -> Groups:
        return np.array([[len(group) for group in pair] for pair in self.groups], dtype=np.float64)

    def dropped(self, limits: Tensor) -> Groups:
        """Share of each group that lies below its threshold."""
        shares = np.zeros(limits.shape)
        for block, pair in enumerate(self.groups):
            for modality, group in enumerate(pair):
                below = torch.searchsorted(group, limits[block, modality].float())
                shares[block, modality] = int(below) / max(1, len(group))
        return shares

    def limits(self, shares: Groups) -> Tensor:
        """The thresholds below which these shares of the groups lie; infinite for all of one."""
        limits = torch.zeros(shares.shape)
        for block, pair in enumerate(self.groups):
            for modality, group in enumerate(pair):
                rank = round(shares[block, modality] * len(group))
                if rank >= len(group):
                    limits[block, modality] = math.inf
                elif rank > 0:
                    limits[block, modality] = (group[rank - 1] + group[rank]) / 2
        return limits


class _Descent:
    """Moves the kept odds of every group against its marginal cost, at one skip rate.

    Attributes:
        start: Logarithms of the kept odds at the start, `[blocks, 2]`.
        mean: The same, mean of the last third of the steps.
        drift: Measured minus predicted skip rate.
        costs: Running mean of the marginal costs, nats per pair.
    """

    def __init__(
        self, bench: Bench, weights: GroupWeights, dropped: Groups, target_skip: float, held: Flags
    ) -> None:
        self._bench, self._weights, self._target = bench, weights, target_skip
        # Per batch, which of its rows teach.
        ends = np.cumsum([len(batch["labels"]) for batch in bench.meter.batches])
        self._rows = np.split(~held, ends[:-1])
        # Groups that nothing is kept of cost nothing, or are not worth it: they stay away.
        self._gone = dropped >= 1
        kept = np.clip(1 - dropped, 1e-3, 1 - 1e-3)
        self.start: Groups = np.log(kept / (1 - kept))
        self.mean: Groups = self.start
        self.drift = 0.0
        self.costs: Groups = np.zeros_like(self.start)

    def run(self, steps: int) -> None:
        meter = self._bench.meter
        order = np.random.default_rng(0)
        queue: list[int] = []
        odds, seen, late = self.start, 0.0, []
        for step in range(steps):
            if not queue:
                teaching = [index for index, rows in enumerate(self._rows) if rows.any()]
                queue = order.permutation(teaching).tolist()
            odds = self.level(odds, self._target - self.drift)
            limits = self.limits(odds)
            index = queue.pop()
            costs, measured, answers = marginal_costs(meter, limits, index, self._rows[index])
            self._bench.passes += 3 * answers / meter.num_tokens  # a backward pass is worth two forward
            predicted = self._predicted(odds)
            self.drift += (measured - predicted - self.drift) * (0.3 if step else 1.0)
            self.costs = _MEMORY * self.costs + (1 - _MEMORY) * costs
            seen = _MEMORY * seen + 1 - _MEMORY
            size = _FIRST * (_LAST / _FIRST) ** (step / max(1, steps - 1))
            odds = np.clip(odds + size * self._direction(self.costs / seen, odds), -_ODDS, _ODDS)
            if step >= 2 * steps // 3:
                late.append(self.level(odds, self._target - self.drift))
        if late:
            self.mean = np.mean(late, axis=0)
            self.costs = self.costs / seen

    def level(self, odds: Groups, skip: float) -> Groups:
        """The odds moved together until the predicted skip rate is `skip`."""
        low, high = -4 * _ODDS, 4 * _ODDS
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._predicted(odds + middle) > skip else (low, middle)
        return odds + (low + high) / 2

    def limits(self, odds: Groups) -> Tensor:
        return self._weights.limits(self._shares(odds))

    def _shares(self, odds: Groups) -> Groups:
        return np.where(self._gone, 1.0, 1 / (1 + np.exp(odds)))

    def _predicted(self, odds: Groups) -> float:
        dropped = (self._shares(odds) * self._weights.sizes).sum()
        return float(dropped) / int(self._bench.meter.counts.pairs.sum())

    def _direction(self, costs: Groups, odds: Groups) -> Groups:
        """log(cost / usual cost) within -1 and 1: keep more where the next pair is dear."""
        shares = self._shares(odds)
        movable = self._weights.sizes * shares * (1 - shares)
        dear = ~self._gone & (costs > 0) & (movable > 0)
        if not dear.any():
            return np.zeros_like(costs)
        usual = math.exp(float(np.average(np.log(costs[dear]), weights=movable[dear])))
        return np.clip(np.log(np.maximum(costs, 0.1 * usual) / usual), -1, 1)


def marginal_costs(
    meter: Meter, limits: Tensor, index: int, rows: Flags | None = None
) -> tuple[Groups, float, int]:
    """KL that one more dropped pair costs, of each block and modality, on one batch with these thresholds.

    First order: the derivative of the KL with respect to a factor on each routing weight, over the pairs
    whose weight lies next to the threshold on both sides.

    Args:
        rows: Which rows of the batch count, `[B]`; all unless told.
    Returns:
        (nats per pair `[blocks, 2]`, the batch's measured skip rate, its answer tokens); the KL is summed
        over answer tokens.
    """
    rule = group_rule(limits)
    asked: dict[int, tuple[Tensor, Tokens, Tensor]] = {}

    def factors(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        factor = (~rule(block, weights, tokens)).float().requires_grad_()
        asked[block] = (weights.detach(), tokens, factor)
        return factor

    batch = _batch(meter, index)
    labels = checked_labels(batch)
    counted = torch.ones(len(labels), dtype=torch.bool) if rows is None else torch.from_numpy(rows)
    of_tokens = counted[(labels[:, 1:] != IGNORED).nonzero()[:, 0]]
    hooks = skip(meter.model, meter.blocks, factors, *meter.ids)
    with evaluating(meter.model), frozen(meter.model), hooks as counts, torch.enable_grad():
        with meter.encoder.for_batch(index):
            logits = answer_logits(meter.model, batch)
        original = meter.original[index].to(logits.device).float().log_softmax(-1)
        kl = (original.exp() * (original - logits.float().log_softmax(-1))).sum(-1)
        kl[of_tokens.to(kl.device)].sum().backward()  # type: ignore[no-untyped-call]
    costs = np.zeros((len(meter.blocks), 2))
    for block, (weights, tokens, factor) in asked.items():
        assert factor.grad is not None
        for modality in (TEXT, VISION):
            chosen = (tokens.modality == modality) & tokens.real
            values, order = weights[chosen].flatten().sort()
            if len(values):
                rank = int(torch.searchsorted(values, limits[block, modality].to(values)))
                width = max(1, round(_WINDOW * len(values)))
                beside = order[max(0, rank - width) : rank + width]
                costs[block, modality] = -float(factor.grad[chosen].flatten()[beside].mean())
    # The pairs of rows that do not count have cost nothing.
    return costs / float(counted.float().mean()), counts.skip(), len(original)


def _batch(meter: Meter, index: int) -> Batch:
    return next(itertools.islice(iter(meter.batches), index, None))


def group_rule(limits: Tensor) -> Rule:
    """Drop what lies below the threshold of its block and modality, `[blocks, 2]`, on the routing weight."""
    never = torch.full((len(limits), 1), -math.inf)
    table = torch.cat([limits.float(), never], 1)

    def rule(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        return weights < table[block].to(weights.device)[tokens.modality.long()][:, None]

    return rule


def as_profile(profile: Profile, found: Found, target_skip: float) -> Profile:
    """The thresholds as alphas and two taus: alpha is weight_scale * tau / threshold, summing to one."""
    alphas, taus = [], []
    for modality in (TEXT, VISION):
        limits = found.thresholds[:, modality].double()
        # Nothing is below a threshold of zero; a millionth of the least of the others does as well.
        others = limits[(limits > 0) & limits.isfinite()]
        least = 1e-6 * (float(others.min()) if len(others) else 1.0)
        raw = [
            layer.weight_scale / max(float(limit), least)
            for layer, limit in zip(profile.layers, limits, strict=True)
        ]
        total = math.fsum(raw)
        # All go: every alpha zero, and any tau above it.
        alphas.append([each / total if total else 0.0 for each in raw])
        taus.append(1 / total if total and bool((limits > 0).any()) else (0.0 if total else 1.0))
    layers = tuple(
        dataclasses.replace(layer, alpha_text=text, alpha_vision=vision)
        for layer, text, vision in zip(profile.layers, *alphas, strict=True)
    )
    low, high = found.measured.kl_interval()
    return dataclasses.replace(
        profile,
        layers=layers,
        tau_text=taus[0],
        tau_vision=taus[1],
        target_skip=target_skip,
        measured_skip=found.measured.skip,
        measured_skip_text=found.measured.skip_text,
        measured_skip_vision=found.measured.skip_vision,
        kl=found.measured.kl,
        kl_low=low,
        kl_high=high,
        method="marginal",
    )
