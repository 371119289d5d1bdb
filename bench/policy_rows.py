"""Tune policies on some samples and measure them on others: the rows that bench/policies*.py record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from demo_internvl import for_internvl
from demo_internvl import load as load_internvl
from kept_experts import leave_out_dropped
from policy_tables import MARGINAL, SEARCH, Row

from modes_fx import demo
from modes_fx.batches import Batch
from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter, bootstrap
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.policies.equal_cost import GroupWeights, tune_marginal
from modes_fx.policies.policy import Bench, PairRecorder, Policy, tune
from modes_fx.profile import Profile
from modes_fx.skipping import Tokens, block_alphas, keep_all, thresholds
from modes_fx.threshold_search.search import ThresholdSearch, choose_exponent

# Rows that DiEP compares experts on.
_REMEMBERED = 256
_TOLERANCE = 0.005  # of the skip rate, for all


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
    Attributes:
        bench: What the policies are tuned on.
        hidden: Per block, rows that its experts were given, `[n, H]`.
    """

    def __init__(self, subject: Subject, samples: Sequence[Batch], few: Sequence[Batch], passes: int) -> None:
        self._subject, self._samples, self._few, self.passes = subject, samples, few, passes
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

    def row(self, policy: Policy, rate: float, test: Meter) -> Row:
        """`policy` tuned to skip `rate` of the pairs of text and vision, and what it measures on `test`."""
        row: Row = {"policy": policy.name, "source": policy.source, "rate": rate}
        try:
            target = rate * self.bench.most
            found = tune(policy, self.bench, target, passes=self.passes, tolerance=_TOLERANCE)
        except SearchError as error:
            return row | {"unreached": str(error)}
        row |= {"shape": found.shape, "passes": round(found.passes, 1)}
        tested = test.measure(found.rule, renormalise=found.renormalise)
        return row | figures(found.measured, self.bench.meter, "calibration_") | tested_row(tested, test)

    def searched(self, rate: float, test: Meter) -> Row:
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
        rule = thresholds(self.alphas(best.profile), point.tau_text, point.tau_vision)
        found, tested = self.bench.meter.measure(rule), test.measure(rule)
        return row | figures(found, self.bench.meter, "calibration_") | tested_row(tested, test)

    @cached_property
    def _search(self) -> ThresholdSearch:
        return ThresholdSearch(self._subject.model, self._samples, self.profile)

    def marginal(self, rate: float, test: Meter) -> Row:
        """The same for `modes_fx.policies.marginal`."""
        # Half for the start, a third for the steps (three passes over a batch), the rest to meet the rate.
        steps = round(self.passes / 3 * self.bench.meter.survey.num_batches / 3)
        found = tune_marginal(
            self.bench,
            self._weights,
            self.alphas(self.profile),
            rate * self.bench.most,
            steps=steps,
            start_passes=round(self.passes / 2),
            tolerance=_TOLERANCE,
        )
        row: Row = {"policy": MARGINAL, "source": "this package", "rate": rate, "mix": found.mix}
        row |= {"passes": round(found.passes, 1), "marginal_costs": found.costs.tolist()}
        row |= {"thresholds": [[str(x) for x in pair] for pair in found.thresholds.tolist()]}
        tested = test.measure(found.rule)
        return row | figures(found.measured, self.bench.meter, "calibration_") | tested_row(tested, test)


def figures(measured: Measured, meter: Meter, prefix: str = "") -> Row:
    """Skip rate (of text and vision, and of all pairs) and KL."""
    low, high = measured.kl_interval()
    row = {"skip": measured.skip / most(meter), "skip_of_all": measured.skip}
    row |= {"kl": measured.kl, "kl_low": low, "kl_high": high}
    return {prefix + name: value for name, value in row.items()}


def most(meter: Meter) -> float:
    """Share of the pairs that are of text and vision: special tokens are never skipped."""
    return 1 - int(meter.counts.pairs[:, OTHER].sum()) / int(meter.counts.pairs.sum())


def tested_row(measured: Measured, meter: Meter) -> Row:
    """Everything that is recorded of a policy on the test samples."""
    right = [float(verdict) for verdict in measured.right]
    tasks: dict[str, list[float]] = {}
    for task, verdict in zip(measured.tasks, right, strict=True):
        tasks.setdefault(task, []).append(verdict)
    return {
        **figures(measured, meter),
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
