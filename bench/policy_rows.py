"""Tune policies on some samples and measure them on others: the rows that bench/policies*.py record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from demo_internvl import for_internvl
from demo_internvl import load as load_internvl
from kept_experts import leave_out_dropped
from policy_tables import MARGINAL, SEARCH, Row
from torch import Tensor

from modes_fx import demo
from modes_fx.batches import Batch
from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter, bootstrap
from modes_fx.modality import TEXT, VISION
from modes_fx.policies.equal_cost import GroupWeights, group_rule, tune_marginal
from modes_fx.policies.policy import Bench, PairRecorder, Policy, tune
from modes_fx.profile import Profile
from modes_fx.skipping import Rule, Tokens, block_alphas, keep_all, thresholds
from modes_fx.threshold_search.search import ThresholdSearch, choose_exponent

# Rows that DiEP compares experts on.
_REMEMBERED = 256
# Of the skip rate, for all: where policies are tuned, and where they are compared.
_TOLERANCE, _ON_TEST = 0.005, 0.001


class Subject:
    """The model that is measured, and its batches.

    Args:
        folder: Of a model that bench/train_demo.py has trained with --family internvl; the demo unless given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.model: Any
        self.model, self.processor = demo.load()
        self._is_internvl = folder is not None
        if folder is not None:
            self.model = load_internvl(folder)
        leave_out_dropped(self.model)

    def batches(self, split: str, samples: int, batch_size: int, **options: Any) -> list[Batch]:
        return self.converted(demo.batches(split, samples, batch_size=batch_size, **options))

    def converted(self, batches: Sequence[Any]) -> list[Batch]:
        """Batches of the demo as this model takes them."""
        return [for_internvl(batch) if self._is_internvl else batch for batch in batches]


class Tuning:
    """Tunes policies on samples: all for the same objective and with about as many passes.

    Args:
        samples: To tune on.
        few: To measure alpha on.
        passes: Over the samples, per policy.
        as_tuned: Whether rows also have skip rate and KL on the test samples as the policy was tuned, without
            meeting the rate there.
    Attributes:
        bench: What the policies are tuned on.
        hidden: Per block, rows that its experts were given, `[n, H]`.
    """

    def __init__(
        self,
        subject: Subject,
        samples: Sequence[Batch],
        few: Sequence[Batch],
        passes: int,
        *,
        as_tuned: bool = False,
    ) -> None:
        self._subject, self._samples, self._few, self.passes = subject, samples, few, passes
        self._as_tuned = as_tuned
        self.profile = self._calibrated("modality")
        ids = (self.profile.visual_token_ids, self.profile.special_token_ids)
        pairs, self._weights = PairRecorder(hidden=True), GroupWeights(len(self.profile.layers))
        self.hidden: dict[int, torch.Tensor] = {}

        def observe(block: int, weights: torch.Tensor, tokens: Tokens) -> torch.Tensor:
            assert tokens.hidden is not None
            self.hidden.setdefault(block, tokens.hidden[tokens.real][:_REMEMBERED].clone())
            pairs(block, weights, tokens)
            self._weights(block, weights, tokens)
            return keep_all(block, weights, tokens)

        self.bench = Bench(Meter(subject.model, samples, *ids, observe=observe), pairs)

    def _calibrated(self, variant: Any) -> Profile:
        subject = self._subject
        options: dict[str, Any] = {"processor": subject.processor, "progress": False}
        return calibrate(subject.model, self._few, variant=variant, **options)

    @cached_property
    def paper(self) -> Profile:
        """alpha as the paper defines it."""
        return self._calibrated("paper")

    @cached_property
    def code(self) -> Profile:
        """alpha as the paper's code has it."""
        return self._calibrated("modes-code")

    def alphas(self, profile: Profile) -> list[tuple[float, float]]:
        return block_alphas(profile, self.bench.meter.blocks)

    def row(self, policy: Policy, rate: float, test: Bench) -> Row:
        """`policy` tuned to skip `rate` of the pairs of text and vision, and what it measures on `test`."""
        row: Row = {"policy": policy.name, "source": policy.source, "rate": rate}
        try:
            target = rate * self.bench.most
            found = tune(policy, self.bench, target, passes=self.passes, tolerance=_TOLERANCE)
        except SearchError as error:
            return row | {"unreached": str(error)}
        row |= {"shape": found.shape, "passes": round(found.passes, 1)}
        row |= figures(found.measured, self.bench, "calibration_")
        return row | self._tested(replace(policy, shape=found.shape), rate, test, found.rule)

    def searched(self, rate: float, test: Bench) -> Row:
        """The same for what `modes_fx.search` finds with its defaults."""
        target = rate * self.bench.most
        before = len(self._search.frontier.points)
        row: Row = {"policy": SEARCH, "source": "this package", "rate": rate}
        try:
            best = choose_exponent(self._search, target, tolerance=_TOLERANCE)
            point = best.find(target, tolerance=_TOLERANCE)
        except SearchError as error:
            return row | {"unreached": str(error)}
        row |= {"power": best.exponent, "passes": len(self._search.frontier.points) - before}
        taus = (point.tau_text, point.tau_vision)
        found = self.bench.measure(thresholds(self.alphas(best.profile), *taus), False)
        limits = [
            [tau / alpha if alpha else math.inf for alpha, tau in zip(pair, taus, strict=True)]
            for pair in self.alphas(best.profile)
        ]
        policy = as_found(torch.tensor(limits))
        row |= figures(found, self.bench, "calibration_")
        return row | self._tested(policy, rate, test, policy.rule((), 0.0))

    @cached_property
    def _search(self) -> ThresholdSearch:
        return ThresholdSearch(self._subject.model, self._samples, self.profile)

    def marginal(self, rate: float, test: Bench) -> Row:
        """The same for `modes_fx.policies.marginal`."""
        # Most of the passes are for the start; a step takes three over a batch, and the rest meets the rate.
        steps = round(0.18 * self.passes * self.bench.meter.survey.num_batches / 3)
        found = tune_marginal(
            self.bench,
            self._weights,
            self.alphas(self.profile),
            rate * self.bench.most,
            steps=steps,
            start_passes=round(0.7 * self.passes),
            tolerance=_TOLERANCE,
        )
        row: Row = {"policy": MARGINAL, "source": "this package", "rate": rate, "mix": found.mix}
        row |= {"passes": round(found.passes, 1), "marginal_costs": found.costs.tolist()}
        row |= {"thresholds": [[str(x) for x in pair] for pair in found.thresholds.tolist()]}
        row |= figures(found.measured, self.bench, "calibration_")
        return row | self._tested(as_found(found.thresholds), rate, test, found.rule)

    def _tested(self, policy: Policy, rate: float, test: Bench, tuned: Rule) -> Row:
        row = tested_row(measured_at(policy, rate, test, tuned), test)
        if self._as_tuned:
            row |= figures(test.measure(tuned, policy.renormalise), test, "as_tuned_")
        return row


def test_bench(subject: Subject, tuning: Tuning, samples: int, seed: int) -> Bench:
    """What policies are measured on."""
    pairs = PairRecorder(hidden=True)
    batches = subject.batches("test", samples, 65, seed=seed)
    return Bench(Meter(subject.model, batches, *tuning.bench.meter.ids, observe=pairs), pairs)


def as_found(limits: Tensor) -> Policy:
    """Thresholds on the routing weight per block and modality, `[blocks, 2]`, all times a factor."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        return group_rule(limits * math.exp(strength))

    return Policy(MARGINAL, "this package", rule, (-3.0, 3.0))


def measured_at(policy: Policy, rate: float, test: Bench, tuned: Rule) -> Measured:
    """`policy` at its shape, with the strength that meets the rate on the test samples too.

    That takes no answers, and KL grows by up to a quarter per point of skipping, so that rates must be equal
    for it to be compared. What comes in whole slots is measured as it was tuned.
    """
    try:
        return tune(policy, test, rate * test.most, passes=0, tolerance=_ON_TEST).measured
    except SearchError:
        return test.measure(tuned, policy.renormalise)


def figures(measured: Measured, bench: Bench, prefix: str = "") -> Row:
    """Skip rate (of text and vision, and of all pairs) and KL."""
    low, high = measured.kl_interval()
    row = {"skip": measured.skip / bench.most, "skip_of_all": measured.skip}
    row |= {"kl": measured.kl, "kl_low": low, "kl_high": high}
    return {prefix + name: value for name, value in row.items()}


def tested_row(measured: Measured, test: Bench) -> Row:
    """Everything that is recorded of a policy on the test samples."""
    right = [float(verdict) for verdict in measured.right]
    tasks: dict[str, list[float]] = {}
    for task, verdict in zip(measured.tasks, right, strict=True):
        tasks.setdefault(task, []).append(verdict)
    return {
        **figures(measured, test),
        "flips": measured.flip_rate,
        "accuracy": sum(right) / len(right),
        "accuracy_interval": bootstrap(right, [1.0] * len(right)),
        "tasks": {
            task: [sum(each) / len(each), *bootstrap(each, [1.0] * len(each))] for task, each in tasks.items()
        },
        "skip_text": measured.counts.skip_per_block(TEXT),
        "skip_vision": measured.counts.skip_per_block(VISION),
        "kl_sums": " ".join(f"{kl:.4g}" for kl in measured.kl_sums),
    }


def said(row: Row) -> str:
    """A row in a few words."""
    if "unreached" in row:
        return str(row["unreached"])
    tested = f"skip {row['skip']:.4f} KL {row['kl']:.5f} accuracy {row['accuracy']:.3f}"
    return f"{tested} (calibration KL {row['calibration_kl']:.5f}, {row['passes']} passes)"
