"""Changes to the policies that were tried, by the same harness: `python bench/policies_tried.py`.

Goes on from the record of bench/policies.py, with its settings: each change is tuned on the same samples with
the same passes, and compared on the same test samples with the policy that it changes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from policies import RESULTS, prepare
from policy_rows import Tuning, as_found, said
from policy_tables import MARGINAL, Row, at, difference, load, markdown, save, verdict
from torch import Tensor

from modes_fx.blocks import Block
from modes_fx.policies.policy import Policy, ranks
from modes_fx.policies.two_thresholds import Alphas, dmt, modes, power, tempered
from modes_fx.profile import write_atomically
from modes_fx.skipping import DECODE, Rule, Tokens, thresholds


def first_kept(policy: Policy) -> Policy:
    """The largest weight of a token is never dropped."""

    def rule(shape: Sequence[float], strength: float) -> Rule:
        plain = policy.rule(shape, strength)
        return lambda block, weights, tokens: plain(block, weights, tokens) & (ranks(weights) > 0)

    return replace(policy, name=f"{policy.name}, first choice kept", rule=rule)


def by_phase(alphas: Alphas) -> Policy:
    """Two thresholds for text: one for the prompt and one for what is decoded."""
    whole = tempered(alphas)

    def rule(shape: Sequence[float], strength: float) -> Rule:
        prompt, decoded = (whole.rule((ratio, shape[2]), strength) for ratio in shape[:2])

        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            assert tokens.phase is not None
            is_decoded = (tokens.phase == DECODE)[:, None]
            return torch.where(is_decoded, decoded(block, weights, tokens), prompt(block, weights, tokens))

        return dropped

    return replace(whole, name=f"{whole.name}, text by phase", rule=rule, shape=(-1.0, -1.0, 0.25))


def by_expert(alphas: Alphas, lengths: Sequence[Tensor]) -> Policy:
    """Weights times a power of how long the expert's outputs are: alpha of an expert, cheaply."""
    whole = tempered(alphas)

    def rule(shape: Sequence[float], strength: float) -> Rule:
        powers = [(power(text, shape[1]), power(vision, shape[1])) for text, vision in alphas]
        plain = thresholds(powers, math.exp(strength + shape[0]), math.exp(strength))

        def dropped(block: int, weights: Tensor, tokens: Tokens) -> Tensor:
            assert tokens.experts is not None
            return plain(block, weights * lengths[block][tokens.experts] ** shape[2], tokens)

        return dropped

    return replace(whole, name=f"{whole.name}, expert by expert", rule=rule, shape=(-1.0, 0.25, 0.5))


@torch.no_grad()
def output_lengths(blocks: Sequence[Block], hidden: Sequence[Tensor]) -> list[Tensor]:
    """Per block, the mean length of each expert's outputs over their mean, `[E]`."""
    found = []
    for block, rows in zip(blocks, hidden, strict=True):
        ones = torch.ones(len(rows), 1)
        outputs = [block.experts(rows, torch.full((len(rows), 1), e), ones) for e in range(block.num_experts)]
        lengths = torch.stack([output.norm(dim=-1).mean() for output in outputs])
        found.append(lengths / lengths.mean())
    return found


def changes(tuning: Tuning, ours: Row | None) -> Iterator[tuple[str, Policy]]:
    """(name of what is changed, the changed policy)."""
    blocks = tuning.bench.meter.blocks
    own, paper = tuning.alphas(tuning.profile), tuning.alphas(tuning.paper)
    lengths = output_lengths(blocks, [tuning.hidden[i] for i in range(len(blocks))])
    bases = [dmt([layer.weight_scale for layer in tuning.profile.layers]), modes(paper), tempered(own)]
    if ours is not None:
        limits = [[float(limit) for limit in pair] for pair in ours["thresholds"]]
        bases.append(as_found(torch.tensor(limits)))
    for policy in bases:
        yield policy.name, first_kept(policy)
        yield policy.name, policy.renormalised()
    yield tempered(own).name, by_phase(own)
    yield tempered(own).name, by_expert(own, lengths)


def table(record: Row, measured: Row) -> str:
    """The record as Markdown; `measured` is that of bench/policies.py."""
    cells = []
    for row in record["rows"]:
        head = [row["policy"], f"{row['rate']:.0%}"]
        base = at(measured["rows"], row["of"], row["rate"])
        if base is None or "unreached" in row:
            cells.append([*head, "", "", "", "", row.get("unreached", f"{row['of']} does not reach it")])
            continue
        more, low, high = difference(row, base, measured["answer_tokens"])
        cells.append(
            [
                *head,
                f"{row['skip']:.1%}",
                f"{row['calibration_kl']:.5f}, {base['calibration_kl']:.5f}",
                f"{row['kl']:.5f}, {base['kl']:.5f}",
                f"{more:+.5f}, {low:+.5f} to {high:+.5f}",
                verdict(low, high),
            ]
        )
    titles = ["policy", "rate", "skip", "KL on calibration: with, without", "KL on test: with, without"]
    titles += ["difference on test, paired 95 %", "on test"]
    lines = ["# Changes to the policies that were tried", "", measured["about"], ""]
    return "\n".join([*lines, *markdown(titles, cells)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", type=Path, default=RESULTS / "policies.json", help="of policies.py")
    parser.add_argument("--rates", type=float, nargs="+", default=(0.67, 0.83))
    parser.add_argument("--record", type=Path, default=RESULTS / "policies_tried", help="path without ending")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = load(args.of)
    if not measured:
        parser.error(f"{args.of} does not exist; run bench/policies.py first.")
    _, tuning, test = prepare(measured["settings"])
    path = args.record.with_suffix(".json")
    record = load(path)
    if record.get("settings") != measured["settings"]:
        record = {"settings": measured["settings"], "rows": []}
    for rate in args.rates:
        done = {row["policy"] for row in record["rows"] if row["rate"] == rate}
        for base, policy in changes(tuning, at(measured["rows"], MARGINAL, rate)):
            if policy.name in done:
                continue
            row = tuning.row(policy, rate, test) | {"of": base}
            record["rows"].append(row)
            print(time.strftime("%H:%M:%S"), rate, row["policy"], said(row), flush=True)
            save(path, record)
            write_atomically(args.record.with_suffix(".md"), table(record, measured))


if __name__ == "__main__":
    main()
