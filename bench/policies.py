"""Every policy at the same measured skip rate, on held-out questions: `python bench/policies.py`.

Gives the paper's Table 1 (accuracy by task) and Table 4 (what alpha and the two thresholds each bring) for
the shipped model, and with `--model FOLDER` for another one that bench/train_demo.py has trained. All
policies are tuned on the same samples of the calibration split, for the same objective (KL of the answers)
and with the same number of passes (`search` alone takes what it takes by default). They are measured on
samples of the test split (`--test-seed`) that nothing in this package was chosen by, at the strength that
meets the rate there too, and compared sample by sample: what is hard is hard for all of them.

The skip rate is that of the pairs of text and vision tokens: special tokens are skipped by no policy, as in
the paper's code. On the demo they are 12 % of all, so that no policy could skip 88 % of all pairs. What has
been measured is kept in the record; a run that is started again goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from policy_rows import Subject, Tuning, said, test_bench
from policy_tables import MARGINAL, RATES, SEARCH, Row, at, load, save, tables

from modes_fx.plots import plot_layer_skips, plot_marginal, plot_policies
from modes_fx.policies.policy import Bench, Policy
from modes_fx.policies.reduce_k import halving, reduced_k
from modes_fx.policies.relative import ser
from modes_fx.policies.tail import diep, expert_similarity, mc_moe, naee
from modes_fx.policies.two_thresholds import dmt, gmlg, modes, plain, tempered
from modes_fx.profile import write_atomically

RESULTS = Path(__file__).parent / "results"


def prepare(settings: Row, folder: Path | None = None) -> tuple[Subject, Tuning, Bench]:
    """The model, what policies are tuned with, and what they are measured on."""
    subject = Subject(folder)
    samples = subject.batches("calibration", settings["calibration"], 39)
    few = subject.batches("calibration", settings["alpha"], 26)
    tuning = Tuning(subject, samples, few, settings["passes"])
    return subject, tuning, test_bench(subject, tuning, settings["test"], settings["test_seed"])


def rivals(tuning: Tuning) -> Iterator[Policy]:
    blocks = tuning.bench.meter.blocks
    top_k, scales = [block.top_k for block in blocks], [layer.weight_scale for layer in tuning.profile.layers]
    own, paper = tuning.alphas(tuning.profile), tuning.alphas(tuning.paper)
    # What `marginal` is to be better than comes first.
    yield tempered(own)
    yield dmt(scales)
    yield modes(paper)
    yield reduced_k(top_k)
    yield reduced_k(top_k).renormalised()
    yield modes(tuning.alphas(tuning.code), "MoDES, its code's alpha", "MoDES code")
    yield plain(scales)
    yield gmlg(paper)
    yield ser()
    yield naee(len(blocks))
    yield mc_moe(len(blocks))
    with torch.no_grad():
        yield diep(expert_similarity(blocks, [tuning.hidden[i] for i in range(len(blocks))]))
    yield modes(own, "MoDES, alpha per modality", "MoDES code, routed output zero")
    yield halving(top_k)
    yield reduced_k(top_k, per_block=True)


def new_record(settings: Row, subject: Subject, tuning: Tuning, test: Bench) -> Row:
    right = test.meter.unskipped.right
    about = (
        f"{type(subject.model).__name__}, unskipped accuracy {sum(right) / len(right):.1%}; tuned on "
        f"{settings['calibration']} samples of the calibration split (alpha on {settings['alpha']}) with "
        f"about {settings['passes']} passes each, measured on {settings['test']} of the test split, seed "
        f"{settings['test_seed']}. Special tokens are never skipped: {1 - test.most:.1%} of all."
    )
    alphas = {
        name: [[layer.alpha_text, layer.alpha_vision] for layer in profile.layers]
        for name, profile in (("modality", tuning.profile), ("paper", tuning.paper))
    }
    tokens = test.meter.survey.answer_tokens
    return {"settings": settings, "about": about, "alpha": alphas, "answer_tokens": tokens, "rows": []}


def draw(record: Row, path: Path) -> None:
    """The plots beside the record at `path` (without its ending)."""
    rows = record["rows"]

    def beside(what: str) -> Path:
        return path.with_name(f"{path.name}_{what}.png")

    plot_policies(rows, beside("accuracy"), "accuracy")
    plot_policies(rows, beside("kl"), "kl")
    shown = [row for name in (MARGINAL, "MoDES") if (row := at(rows, name, 0.83)) is not None]
    plot_layer_skips(shown, beside("skip"))
    if (ours := at(rows, MARGINAL, 0.83)) is not None:
        plot_marginal(record["alpha"]["modality"], ours["marginal_costs"], beside("marginal"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a model trained with --family internvl")
    parser.add_argument("--calibration", type=int, default=325, help="samples to tune on")
    parser.add_argument("--alpha", type=int, default=130, help="of them, samples to measure alpha on")
    parser.add_argument("--test", type=int, default=1040, help="samples to measure on")
    parser.add_argument("--test-seed", type=int, default=2, help="other samples of the test split")
    parser.add_argument("--passes", type=int, default=26, help="over the calibration samples, per policy")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--record", type=Path, default=RESULTS / "policies", help="path without its ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("calibration", "alpha", "test", "test_seed", "passes")
    settings = {name: getattr(args, name) for name in names}
    subject, tuning, test = prepare(settings, args.model)
    path = args.record.with_suffix(".json")
    record = load(path)
    if record.get("settings") != settings:
        record = new_record(settings, subject, tuning, test)

    def keep(row: Row) -> None:
        record["rows"].append(row)
        print(time.strftime("%H:%M:%S"), row["rate"], row["policy"], said(row), flush=True)
        save(path, record)
        write_atomically(args.record.with_suffix(".md"), tables(record))

    done = {(row["policy"], row["rate"]) for row in record["rows"]}
    for rate in args.rates:
        if (MARGINAL, rate) not in done:
            keep(tuning.marginal(rate, test))
    for policy in rivals(tuning):
        for rate in args.rates:
            if (policy.name, rate) not in done:
                keep(tuning.row(policy, rate, test))
    for rate in args.rates:
        if (SEARCH, rate) not in done:
            keep(tuning.searched(rate, test))
    draw(record, args.record)


if __name__ == "__main__":
    main()
