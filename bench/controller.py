"""Fixed thresholds and a controller, where the mix of pictures and text drifts; and what both cost.

    python bench/controller.py                       # both; about 4 minutes on one core
    python bench/controller.py --profile demo.modes.json --record

The demo model's decoder is compiled once, with thresholds that can be moved and its pairs counted. The same
stream of questions, with a picture or without, goes through it twice: with the thresholds of the profile, and
with `modes_fx.Controller`. The target is what the profile's thresholds skip in the first phase.
KL(original || skipped) is that of the first answer token, in nats.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from interleave import Run, interleave, ratios

import modes_fx
from modes_fx import demo
from modes_fx.blocks import find_blocks
from modes_fx.measure import kl_sum
from modes_fx.modality import OTHER, TEXT, VISION
from modes_fx.profile import Profile
from modes_fx.skipping import Tokens, block_alphas, skip, thresholds
from modes_fx.testing import VOCABULARY, tiny_profile, tiny_qwen3_vl_moe
from modes_fx.timing import one_thread

RESULTS = Path(__file__).parent / "results"
# Of the questions, how many come with a picture.
PHASES = (("half pictures", 0.5), ("pictures", 1.0), ("text", 0.0), ("quarter pictures", 0.25))
EVERY = 4
# The last part of a phase, when a controller has had the time to follow.
SETTLED = 0.5


# Factors on the thresholds, for what the dropped mass says of the KL.
FACTORS = (0.5, 0.75, 1.0, 1.4, 2.0)


@dataclass(frozen=True)
class Step:
    """One reading: `skip` of text and vision tokens since the one before, and the mean KL of its calls."""

    phase: str
    skip: float
    kl: float
    tau_text: float
    tau_vision: float


def stream(calls: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Questions of the test split, `calls` for each phase."""
    for phase, (name, pictures) in enumerate(PHASES):
        for call in range(calls):
            has_picture = int((call + 1) * pictures) > int(call * pictures)
            yield name, demo.question("test", phase * calls + call, picture=has_picture)[0]


def make_profile() -> Profile:
    model, processor = demo.load()
    batches = demo.batches("calibration", 52)
    profile = modes_fx.calibrate(model, batches, processor=processor)
    return modes_fx.search(model, batches, profile, target_skip=0.83)


@torch.no_grad()
def drift(profile: Profile, calls: int) -> dict[str, Any]:
    """Both runs, step by step."""
    original, _ = demo.load()
    model, _ = demo.load()
    # What is skipped is the same in either lowering.
    backend = modes_fx.backend(profile, lowering="eager", adjustable=True, counting=True)
    model.get_decoder().compile(backend=backend, dynamic=True)
    questions = list(stream(calls))
    want = [original(**inputs).logits[0, -1:] for _, inputs in questions]

    def run(target: float | None) -> list[Step]:
        assert backend.thresholds is not None
        backend.thresholds.set(text=profile.tau_text, vision=profile.tau_vision)
        controller = None
        if target is not None:
            controller = modes_fx.Controller(backend, target, bounds=(0.1, 10.0), every=EVERY, min_pairs=1)
        steps, kls, seen = [], [], backend.counts()
        for number, (phase, inputs) in enumerate(questions):
            taus = (backend.thresholds.text, backend.thresholds.vision)
            kls.append(kl_sum(want[number], model(**inputs).logits[0, -1:], phase))
            if controller is not None:
                controller.step()
            if len(kls) == EVERY:
                now = backend.counts()
                pairs, dropped = (
                    (now.pairs - seen.pairs)[:, :2].sum(),
                    (now.dropped - seen.dropped)[:, :2].sum(),
                )
                steps.append(Step(phase, float(dropped / pairs), statistics.mean(kls), *taus))
                kls, seen = [], now
        return steps

    fixed = run(None)
    first = [step.skip for step in fixed if step.phase == PHASES[0][0]]
    target = statistics.mean(first)
    before = len(backend.compile_ids)
    controlled = run(target)
    return {
        "target": target,
        "graphs": before,
        "more_graphs_controlled": len(backend.compile_ids) - before,
        "fixed": [asdict(step) for step in fixed],
        "controlled": [asdict(step) for step in controlled],
    }


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per phase and run, over its settled part."""
    rows = []
    for name, _ in PHASES:
        for kind in ("fixed", "controlled"):
            steps = [step for step in result[kind] if step["phase"] == name]
            settled = steps[int(len(steps) * (1 - SETTLED)) :]
            skips = [step["skip"] for step in settled]
            rows.append(
                {
                    "phase": name,
                    "thresholds": kind,
                    "skip": statistics.mean(skips),
                    "worst": max(abs(skip - result["target"]) for skip in skips),
                    "kl": statistics.mean(step["kl"] for step in settled),
                }
            )
    return rows


class Mass:
    """The rule of the thresholds, with alpha * weight of the dropped pairs added up, by modality."""

    def __init__(self, alphas: list[tuple[float, float]], tau_text: float, tau_vision: float) -> None:
        self.rule = thresholds(alphas, tau_text, tau_vision)
        self.alphas = torch.tensor(alphas)
        self.dropped = torch.zeros(3)
        self.all = torch.zeros(3)

    def __call__(self, block: int, weights: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        drop = self.rule(block, weights, tokens)
        kinds = tokens.modality.long()
        mass = self.alphas[block][kinds.clamp(max=VISION)][:, None] * weights
        self.all.index_add_(0, kinds, mass.sum(1))
        self.dropped.index_add_(0, kinds, (mass * drop).sum(1))
        return drop


@torch.no_grad()
def proxy(profile: Profile, questions: int) -> dict[str, list[tuple[float, float, float]]]:
    """Could the dropped mass stand for the KL, which a running model does not know? For each kind of traffic
    and factor on the thresholds: share of the mass of text and vision that is dropped, that of text alone,
    and the KL."""
    model, _ = demo.load()
    blocks = find_blocks(model)
    alphas = block_alphas(profile, blocks)
    kinds = {
        "pictures, calibration": [demo.question("calibration", i)[0] for i in range(questions)],
        "pictures, test": [demo.question("test", i)[0] for i in range(questions)],
        "text, test": [demo.question("test", i, picture=False)[0] for i in range(questions)],
    }
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, asked in kinds.items():
        want = [model(**inputs).logits[0, -1:] for inputs in asked]
        for factor in FACTORS:
            mass = Mass(alphas, factor * profile.tau_text, factor * profile.tau_vision)
            with skip(model, blocks, mass, profile.visual_token_ids, profile.special_token_ids):
                kls = [
                    kl_sum(first, model(**inputs).logits[0, -1:], name)
                    for first, inputs in zip(want, asked, strict=True)
                ]
            both = mass.dropped[:OTHER].sum() / mass.all[:OTHER].sum()
            text = mass.dropped[TEXT] / mass.all[TEXT]
            found.setdefault(name, []).append((float(both), float(text), statistics.mean(kls)))
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "counting": {"counting": True},
    "adjustable": {"adjustable": True},
    "both": {"adjustable": True, "counting": True},
}


@torch.no_grad()
def cost(budget_s: float) -> dict[str, dict[str, list[float]]]:
    """Time of a compiled decoder with each option over that with constants: 20 %, median and 80 %."""
    model = tiny_qwen3_vl_moe(num_layers=4, num_experts=64, top_k=8, hidden=512, intermediate=256)
    profile = tiny_profile(model)
    found = {}
    for what, tokens in (("prefill of 256 tokens", 256), ("decode of 1 token", 1)):
        ids = torch.randint(8, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))
        runs = {
            name: Run(graph_call(model, profile, ids, OPTIONS.get(name, {})))
            for name in ("constants", *OPTIONS)
        }
        with one_thread():
            spent = interleave(runs, budget_s=budget_s, least=20, most=2000)
        found[what] = {name: ratios(spent[name], spent["constants"]) for name in OPTIONS}
    return found


def graph_call(model: Any, profile: Profile, ids: torch.Tensor, options: dict[str, Any]) -> Any:
    """The compiled graph of a decoder with what goes around it at run time, without Dynamo's guards."""
    torch._dynamo.reset()
    backend, calls = modes_fx.backend(profile, **options), []

    def keep(gm: Any, inputs: Any) -> Any:
        compiled = backend(gm, inputs)

        def call(*args: Any) -> Any:
            calls.append(lambda _: compiled(*args))
            return compiled(*args)

        return call

    torch.compile(model.get_decoder().forward, backend=keep)(input_ids=ids, use_cache=False)
    (call,) = calls
    return call


def plot(result: dict[str, Any], path: Path) -> None:
    """Skip rate over the stream, fixed and controlled, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for kind, color in (("fixed", "#d9812b"), ("controlled", "#3b6fb6")):
        axes.plot([100 * step["skip"] for step in result[kind]], color=color, label=f"{kind} thresholds")
    axes.axhline(100 * result["target"], color="#888888", linewidth=1, linestyle="--", label="target")
    per_phase = len(result["fixed"]) // len(PHASES)
    for phase, (name, _) in enumerate(PHASES):
        axes.axvline(phase * per_phase, color="#dddddd", linewidth=1)
        axes.text(phase * per_phase, 1.01, name, fontsize=8, transform=axes.get_xaxis_transform())
    axes.set(xlabel=f"reading, one for each {EVERY} calls", ylabel="skip rate of text and vision (%)")
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(path, dpi=110)


def markdown(
    rows: list[dict[str, Any]],
    costs: dict[str, dict[str, list[float]]],
    masses: dict[str, list[tuple[float, float, float]]],
    result: dict[str, Any],
) -> str:
    text, vision = map(float, result["taus"])
    lines = [
        "# Thresholds that are moved at run time",
        "",
        "`python bench/controller.py --record`, on the demo model with a profile searched for 83 % "
        f"(tau of text {text:.3g}, of vision {vision:.3g}). Target {100 * result['target']:.1f} %; settled "
        f"half of each phase, a reading each {EVERY} calls; KL in nats on the first answer token. Compiled "
        f"with the fixed thresholds: {result['graphs']} graphs; when they moved, "
        f"{result['more_graphs_controlled']} more.",
        "",
        "| traffic | thresholds | skip rate | farthest from the target | KL |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['phase']} | {row['thresholds']} | {100 * row['skip']:.1f} % | "
            f"{100 * row['worst']:.1f} points | {row['kl']:.3f} |"
        )
    lines += [
        "",
        "Time of a compiled decoder (4 layers, hidden 512, 64 experts, top 8, float32, one CPU thread) over "
        "that with constants, median and 20 to 80 %:",
        "",
        "| | " + " | ".join(OPTIONS) + " |",
        "|---|" + "---|" * len(OPTIONS),
    ]
    for what, by_option in costs.items():
        cells = [f"{median:.3f} ({low:.3f} to {high:.3f})" for low, median, high in by_option.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Why there is no KL budget at run time: at the same multiple of the thresholds, the share of alpha * "
        "weight that is dropped (of text and vision, of text alone), and the KL that it comes with.",
        "",
        "| traffic | " + " | ".join(f"x {factor:g}" for factor in FACTORS) + " |",
        "|---|" + "---|" * len(FACTORS),
    ]
    for name, points in masses.items():
        cells = [f"{both:.2f}, {text:.2f}: {kl:.3f}" for both, text, kl in points]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path, help="of the demo model; made anew without")
    parser.add_argument("--calls", type=int, default=48, help="for each phase")
    parser.add_argument("--questions", type=int, default=26, help="of each kind, for the mass and the KL")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each timing of the cost")
    parser.add_argument("--record", action="store_true", help="write results/controller.{json,md,png}")
    given = parser.parse_args()
    costs = cost(given.seconds)
    with one_thread():
        profile = make_profile() if given.profile is None else Profile.load(given.profile)
        result, masses = drift(profile, given.calls), proxy(profile, given.questions)
    result["taus"] = [str(profile.tau_text), str(profile.tau_vision)]
    rows = summary(result)
    text = markdown(rows, costs, masses, result)
    print(text)
    if given.record:
        kept = {**result, "summary": rows, "cost": costs, "mass": masses}
        (RESULTS / "controller.json").write_text(json.dumps(kept, indent=1) + "\n")
        (RESULTS / "controller.md").write_text(text)
        plot(result, RESULTS / "controller.png")


if __name__ == "__main__":
    main()
