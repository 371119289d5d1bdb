"""Every policy at the same measured skip rate, on held-out questions: `python bench/policies.py`.

Gives the paper's Table 1 (accuracy by task) and Table 4 (what alpha and the two thresholds each bring) for
the shipped model, and with `--model FOLDER` for another one that bench/train_demo.py has trained. All
policies are tuned on the same samples of the calibration split, for the same objective (KL of the answers)
and with the same number of passes, and measured on the test split.

The skip rate is that of the pairs of text and vision tokens: special tokens are skipped by no policy, as in
the paper's code. On the demo they are 12 % of all, so that no policy could skip 88 % of all pairs. What has
been measured is kept in the record; a run that is started again goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from demo_internvl import for_internvl
from demo_internvl import load as load_internvl

from modes_fx import demo
from modes_fx.calibration.calibrate import calibrate
from modes_fx.errors import SearchError
from modes_fx.measure import Measured, Meter, bootstrap
from modes_fx.modality import TEXT, VISION
from modes_fx.plots import plot_layer_skips, plot_marginal, plot_policies
from modes_fx.policies.equal_cost import GroupWeights, tune_marginal
from modes_fx.policies.policy import Bench, PairRecorder, Policy, tune
from modes_fx.policies.reduce_k import halving, reduced_k
from modes_fx.policies.relative import ser
from modes_fx.policies.tail import diep, expert_similarity, mc_moe, naee
from modes_fx.policies.two_thresholds import dmt, gmlg, modes, plain, tempered
from modes_fx.profile import write_atomically
from modes_fx.skipping import Tokens, block_alphas, keep_all

RESULTS = Path(__file__).parent / "results"
RATES = (0.5, 0.67, 0.83, 0.88)
MARGINAL = "marginal"
ABLATION = ("one threshold", "GMLG", "DMT", "MoDES", MARGINAL)  # Table 4, and ours


class Comparison:
    """The model, both splits and everything the policies are made of."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: Any
        self.model, processor = demo.load()
        convert: Any = list
        if args.model is not None:
            self.model = load_internvl(args.model)

            def convert(batches: Any) -> Any:
                return [for_internvl(batch) for batch in batches]

        samples = convert(demo.batches("calibration", args.calibration, batch_size=39))
        options: dict[str, Any] = {"processor": processor, "progress": False}
        few = convert(demo.batches("calibration", min(args.alpha, args.calibration), batch_size=26))
        self.profile = calibrate(self.model, few, **options)
        self.paper = calibrate(self.model, few, variant="paper", **options)
        if not args.few:
            self.code = calibrate(self.model, few, variant="modes-code", **options)
        ids = (self.profile.visual_token_ids, self.profile.special_token_ids)
        pairs, self.weights = PairRecorder(hidden=True), GroupWeights(len(self.profile.layers))
        hidden: dict[int, torch.Tensor] = {}

        def observe(block: int, weights: torch.Tensor, tokens: Tokens) -> torch.Tensor:
            assert tokens.hidden is not None
            hidden.setdefault(block, tokens.hidden[tokens.real][:256].clone())
            pairs(block, weights, tokens)
            self.weights(block, weights, tokens)
            return keep_all(block, weights, tokens)

        self.bench = Bench(Meter(self.model, samples, *ids, observe=observe), pairs)
        self.test = Meter(self.model, convert(demo.batches("test", args.test, batch_size=65)), *ids)
        self.hidden = [hidden[block] for block in range(len(self.profile.layers))]

    def policies(self) -> Iterator[Policy]:
        blocks = self.bench.meter.blocks
        top_k, scales = [b.top_k for b in blocks], [layer.weight_scale for layer in self.profile.layers]
        own = block_alphas(self.profile, blocks)
        # What the marginal policy is to be better than comes first.
        yield dmt(scales)
        yield modes(block_alphas(self.paper, blocks))
        yield reduced_k(top_k)
        yield reduced_k(top_k).renormalised()
        yield tempered(own)
        if self.args.few:
            return
        yield modes(block_alphas(self.code, blocks), "MoDES, its code's alpha", "MoDES code")
        yield modes(own, "MoDES, alpha per modality", "MoDES code, routed output zero")
        yield plain(scales)
        yield gmlg(block_alphas(self.paper, blocks))
        yield naee(len(blocks))
        yield ser()
        yield halving(top_k)
        yield reduced_k(top_k, per_block=True)
        yield reduced_k(top_k, per_block=True).renormalised()
        with torch.no_grad():
            yield diep(expert_similarity(blocks, self.hidden))
        yield mc_moe(len(blocks))
        yield dmt(scales).renormalised()

    def rows(self, rate: float, done: set[tuple[str, float]]) -> Iterator[dict[str, Any]]:
        if (MARGINAL, rate) not in done:
            yield self._marginal(rate)
        for policy in self.policies():
            if (policy.name, rate) not in done:
                yield self._tuned(policy, rate)

    def _tuned(self, policy: Policy, rate: float) -> dict[str, Any]:
        row: dict[str, Any] = {"policy": policy.name, "source": policy.source, "rate": rate}
        try:
            found = tune(policy, self.bench, rate * self.bench.most, passes=self.args.passes)
        except SearchError as error:
            return row | {"unreached": str(error)}
        row |= {"shape": found.shape, "passes": round(found.passes, 1)}
        tested = self.test.measure(found.rule, renormalise=found.renormalise)
        return row | self._figures("calibration_", found.measured) | self._tested(tested)

    def _marginal(self, rate: float) -> dict[str, Any]:
        alphas = block_alphas(self.profile, self.bench.meter.blocks)
        budget = {"start_passes": self.args.passes // 2, "steps": self.args.steps}
        found = tune_marginal(self.bench, self.weights, alphas, rate * self.bench.most, **budget)
        row: dict[str, Any] = {"policy": MARGINAL, "source": "this package", "rate": rate}
        row |= {"passes": round(found.passes, 1), "marginal_costs": found.costs.tolist()}
        row |= {"thresholds": [[str(x) for x in pair] for pair in found.thresholds.tolist()]}
        tested = self.test.measure(found.rule)
        return row | self._figures("calibration_", found.measured) | self._tested(tested)

    def _figures(self, prefix: str, measured: Measured) -> dict[str, Any]:
        low, high = measured.kl_interval()
        figures = {"skip": measured.skip / self.bench.most, "skip_of_all": measured.skip}
        figures |= {"kl": measured.kl, "kl_low": low, "kl_high": high}
        return {prefix + name: value for name, value in figures.items()}

    def _tested(self, measured: Measured) -> dict[str, Any]:
        right = [float(verdict) for verdict in measured.right]
        tasks = {
            task: [r for r, t in zip(right, measured.tasks, strict=True) if t == task] for task in demo.TASKS
        }
        return {
            **self._figures("", measured),
            "skip": measured.skip / self._test_most,
            "flips": measured.flip_rate,
            "accuracy": sum(right) / len(right),
            "accuracy_interval": bootstrap(right, [1.0] * len(right)),
            "tasks": {
                task: [sum(each) / len(each), *bootstrap(each, [1.0] * len(each))]
                for task, each in tasks.items()
                if each
            },
            "skip_text": measured.counts.skip_per_block(TEXT),
            "skip_vision": measured.counts.skip_per_block(VISION),
        }

    @property
    def _test_most(self) -> float:
        counts = self.test.counts.pairs
        return 1 - int(counts[:, 2].sum()) / int(counts.sum())


def _said(row: dict[str, Any]) -> str:
    if "unreached" in row:
        return str(row["unreached"])
    tested = f"skip {row['skip']:.4f} KL {row['kl']:.5f} accuracy {row['accuracy']:.3f}"
    return f"{tested} (calibration KL {row['calibration_kl']:.5f}, {row['passes']} passes)"


def tables(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    rows = record["rows"]
    lines = ["# Policies at one measured skip rate", "", record["about"], ""]
    for rate in sorted({row["rate"] for row in rows}):
        reached = [row for row in rows if row["rate"] == rate and "kl" in row]
        lines += [f"## {rate:.0%} of the pairs of text and vision tokens", ""]
        lines += ["| policy | skip | KL (nats) | 95 % | flips | accuracy | 95 % | passes |", "|" + "---|" * 8]
        for row in sorted(reached, key=lambda row: row["kl"]):
            low, high = row["accuracy_interval"]
            lines.append(
                f"| {row['policy']} | {row['skip']:.1%} | {row['kl']:.5f} | {row['kl_low']:.5f} to "
                f"{row['kl_high']:.5f} | {row['flips']:.2%} | {row['accuracy']:.1%} | "
                f"{low:.1%} to {high:.1%} | {row['passes']:.0f} |"
            )
        lines += [
            f"| {row['policy']} | not reached | {row['unreached']} | | | | | |"
            for row in rows
            if row["rate"] == rate and "unreached" in row
        ]
        lines += ["", "Accuracy by task (%), as the paper's Table 1:", ""]
        lines += ["| policy | " + " | ".join(demo.TASKS) + " |", "|" + "---|" * (len(demo.TASKS) + 1)]
        for row in reached:
            cells = " | ".join(f"{100 * row['tasks'][task][0]:.0f}" for task in demo.TASKS)
            lines.append(f"| {row['policy']} | {cells} |")
        lines.append("")
    lines += ["## What alpha and the two thresholds bring (the paper's Table 4)", ""]
    lines += ["| policy | " + " | ".join(f"{rate:.0%}" for rate in RATES) + " |", "|" + "---|" * 5]
    for name in ABLATION:
        found = []
        for rate in RATES:
            row = next((r for r in rows if r["policy"] == name and r["rate"] == rate and "kl" in r), None)
            found.append(f"{row['kl']:.4f}, {row['accuracy']:.1%}" if row else "-")
        lines.append(f"| {name} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a model trained with --family internvl")
    parser.add_argument("--calibration", type=int, default=390, help="samples to tune on")
    parser.add_argument("--alpha", type=int, default=130, help="of them, samples to measure alpha on")
    parser.add_argument("--test", type=int, default=1300, help="samples to measure on")
    parser.add_argument("--passes", type=int, default=24, help="over the calibration samples, per policy")
    parser.add_argument("--steps", type=int, default=36, help="of the marginal policy, a batch each")
    parser.add_argument("--few", action="store_true", help="only the policies that matter most")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--record", type=Path, default=RESULTS / "policies", help="path without its ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comparison = Comparison(args)
    settings = {
        "calibration": args.calibration,
        "test": args.test,
        "passes": args.passes,
        "steps": args.steps,
    }
    path = args.record.with_suffix(".json")
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if record.get("settings") != settings:
        right = comparison.test.unskipped.right
        about = (
            f"{type(comparison.model).__name__}, unskipped accuracy {sum(right) / len(right):.1%}; tuned on "
            f"{args.calibration} samples of the calibration split with about {args.passes} passes each, "
            f"measured on {args.test} of the test split. Special tokens are never skipped: "
            f"{1 - comparison.bench.most:.1%} of all."
        )
        alphas = {
            name: [[layer.alpha_text, layer.alpha_vision] for layer in profile.layers]
            for name, profile in (("modality", comparison.profile), ("paper", comparison.paper))
        }
        record = {"settings": settings, "about": about, "alpha": alphas, "rows": []}
    for rate in args.rates:
        done = {(row["policy"], row["rate"]) for row in record["rows"]}
        for row in comparison.rows(rate, done):
            record["rows"].append(row)
            print(time.strftime("%H:%M:%S"), rate, row["policy"], _said(row), flush=True)
            write_atomically(path, json.dumps(record, indent=1) + "\n")
            write_atomically(args.record.with_suffix(".md"), tables(record))
    plot_policies(record["rows"], args.record.with_name(args.record.name + "_accuracy.png"), "accuracy")
    plot_policies(record["rows"], args.record.with_name(args.record.name + "_kl.png"), "kl")
    shown = [row for row in record["rows"] if row["policy"] in (MARGINAL, "MoDES") and row["rate"] == 0.83]
    plot_layer_skips(
        [row for row in shown if "kl" in row], args.record.with_name(args.record.name + "_skip.png")
    )
    costs = next((row for row in record["rows"] if row["policy"] == MARGINAL and row["rate"] == 0.83), None)
    if costs is not None:
        plot_marginal(
            record["alpha"]["modality"],
            costs["marginal_costs"],
            args.record.with_name(args.record.name + "_marginal.png"),
        )


if __name__ == "__main__":
    main()
