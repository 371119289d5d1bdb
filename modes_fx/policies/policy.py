"""What all policies have in common: a rule with a strength and perhaps a shape, tuned the same way for all.

The strength is one number that the skip rate rises with; it is moved until the measured rate meets the
target. The shape is whatever else a policy has, a threshold per block for instance; it is moved until the KL
of the answers is least. So every policy gets the same objective, samples and number of passes
(method notes 3.5: rivals of the paper were tuned with other objectives).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter
from modes_fx.modality import OTHER
from modes_fx.progress import Bar
from modes_fx.skipping import Rule, Tokens, keep_all

# Tokens of each block that predict the skip rate; 0.5 points of it need about 10,000 pairs.
_REMEMBERED = 4096
# What is not passes over the batches is cheap: halvings of the strength against the recorded pairs.
_HALVINGS = 40


@dataclass(frozen=True)
class Policy:
    """A way to skip, up to its strength and shape.

    Attributes:
        name: For tables.
        source: Where it is defined: paper, section or equation.
        rule: (shape, strength) -> rule. The skip rate must not fall as the strength rises.
        strengths: Least and greatest strength.
        shape: Where the search for the shape starts; empty if the strength is all there is.
        step: How far the first tries move a number of the shape.
        renormalise: See `skipping.skip`.
    """

    name: str
    source: str
    rule: Callable[[Sequence[float], float], Rule]
    strengths: tuple[float, float]
    shape: tuple[float, ...] = ()
    step: float = 0.5
    renormalise: bool = False

    def renormalised(self) -> "Policy":
        """The same policy with the kept weights rescaled to the sum that all had."""
        return replace(self, name=f"{self.name}, renormalised", renormalise=True)


@dataclass(frozen=True)
class Tuned:
    """A policy at one target.

    Attributes:
        rule, renormalise: What to measure elsewhere.
        shape, strength: Where the rule comes from.
        measured: What it measures on the batches that it was tuned on.
        passes: Over the batches, that the tuning took.
    """

    rule: Rule
    renormalise: bool
    shape: tuple[float, ...]
    strength: float
    measured: Measured
    passes: float


class PairRecorder:
    """A rule for `Meter(observe=...)` that remembers what rules decide by, of some tokens of each block.

    Args:
        hidden: Whether to remember what the experts are given too; only some rules ask for it, and it is big.
    """

    def __init__(self, *, hidden: bool = False) -> None:
        self._hidden = hidden
        self._parts: dict[int, list[tuple[Tensor, Tokens]]] = {}
        self._seen: dict[int, int] = {}

    def __call__(self, block: int, weights: Tensor, tokens: Tokens) -> Tensor:
        if self._seen.get(block, 0) < _REMEMBERED:
            known = tokens if self._hidden else replace(tokens, hidden=None)
            self._parts.setdefault(block, []).append((weights.detach(), known))
            self._seen[block] = self._seen.get(block, 0) + int(tokens.real.sum())
        return keep_all(block, weights, tokens)

    def skip(self, rule: Rule) -> float:
        """The skip rate of `rule` on the remembered pairs: what it would be if skipping moved no routing."""
        dropped = pairs = 0
        for block, parts in self._parts.items():
            for weights, tokens in parts:
                answer = rule(block, weights, tokens)
                gone = answer == 0 if answer.is_floating_point() else answer
                dropped += int(gone[tokens.real].sum())
                pairs += int(tokens.real.sum()) * weights.shape[1]
        return dropped / pairs


@dataclass
class Bench:
    """A meter and what its first pass remembered; all policies of a table share one.

    Attributes:
        passes: Over the batches so far, all policies together.
    """

    meter: Meter
    pairs: PairRecorder
    bar: Bar = field(default_factory=Bar)
    passes: float = 0

    @property
    def most(self) -> float:
        """The skip rate when all pairs of text and vision are dropped; special tokens are never skipped."""
        counts = self.meter.counts.pairs
        return 1 - int(counts[:, OTHER].sum()) / int(counts.sum())

    def measure(self, rule: Rule, renormalise: bool) -> Measured:
        self.passes += 1
        measured = self.meter.measure(rule, renormalise=renormalise, bar=self.bar)
        self.bar.note(f"skip {measured.skip:.3f} KL {measured.kl:.5f}")
        return measured


def tune(
    policy: Policy, bench: Bench, target_skip: float, *, passes: int = 30, tolerance: float = 0.005
) -> Tuned:
    """The strength that measures `target_skip`, at the shape of least KL that the passes find.

    Args:
        bench: Holds the model and the batches.
        target_skip: Dropped pairs / all pairs over non-padding tokens, 0..1.
        passes: Over the batches; a few more where the target is hard to meet.
        tolerance: How far the measured skip rate may lie from the target.
    Raises:
        SearchError: The policy does not reach the target; the message has the nearest that it measured.
    """
    begun = bench.passes
    drift = 0.0  # measured - predicted skip: skipping moves later routing
    tried: dict[tuple[float, ...], Tuned] = {}
    nearest = 0.0

    def reach(shape: tuple[float, ...], tries: int) -> Tuned | None:
        nonlocal drift, nearest
        low, high = policy.strengths
        best: Tuned | None = None
        for _ in range(tries):
            strength = _predicted(policy, shape, bench.pairs, target_skip - drift, low, high)
            if best is not None and strength == best.strength:
                break  # whole slots come no nearer
            rule = policy.rule(shape, strength)
            measured = bench.measure(rule, policy.renormalise)
            drift = measured.skip - bench.pairs.skip(rule)
            if abs(measured.skip - target_skip) < abs(nearest - target_skip):
                nearest = measured.skip
            if best is None or abs(measured.skip - target_skip) < abs(best.measured.skip - target_skip):
                best = Tuned(rule, policy.renormalise, shape, strength, measured, 0)
            if abs(measured.skip - target_skip) <= tolerance / 2:
                break
        assert best is not None
        within = abs(best.measured.skip - target_skip) <= tolerance
        if within:
            tried[shape] = best
        return best if within else None

    best = reach(policy.shape, 6)
    if best is None:
        raise SearchError(
            f"{policy.name} does not reach a skip rate of {target_skip:.3f}; "
            f"the nearest it measured is {nearest:.3f}."
        )
    step, place, failed = policy.step, 0, 0
    while policy.shape and bench.passes - begun < passes and step > policy.step / 16:
        coordinate, sign = place // 2 % len(policy.shape), 1 - 2 * (place % 2)
        shape = tuple(value + sign * step * (i == coordinate) for i, value in enumerate(best.shape))
        found = tried.get(shape) or reach(shape, 2)
        if found is not None and found.measured.kl < best.measured.kl:
            best, failed = found, 0  # and go on the same way
            continue
        failed += 1
        place += 1
        if failed == 2 * len(policy.shape):
            step, failed = step / 2, 0
    return replace(best, passes=bench.passes - begun)


def _predicted(
    policy: Policy, shape: Sequence[float], pairs: PairRecorder, skip: float, low: float, high: float
) -> float:
    """The strength whose predicted skip rate is nearest to `skip`."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if pairs.skip(policy.rule(shape, middle)) < skip:
            low = middle
        else:
            high = middle
        if high - low < 1e-4:
            break
    ends = [(abs(pairs.skip(policy.rule(shape, strength)) - skip), strength) for strength in (low, high)]
    return min(ends)[1]


def skippable(tokens: Tokens) -> Tensor:
    """`[T, 1]` bool: tokens that may be skipped. Special ones are left alone, as in the paper's code
    (method notes 1.4, row 7)."""
    return (tokens.modality != OTHER)[:, None]


def ranks(weights: Tensor) -> Tensor:
    """The rank of each pair among its token's, `[T, K]`, 0 for the largest weight; equal ones keep the order
    of their slots. Not every router gives its weights in descending order."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(weights.shape[-1], device=weights.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)
