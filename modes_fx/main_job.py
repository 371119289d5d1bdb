"""The main job, end to end on the shipped model: calibrate, search, compile, compare (`modes-fx demo`).

Everything that is printed is also in results.json; every number is measured here and now.
"""

import dataclasses
import json
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import modes_fx
from modes_fx import demo
from modes_fx.calibration.calibrate import calibrate, library_versions
from modes_fx.measure import Measured, Meter
from modes_fx.modality import TEXT, VISION
from modes_fx.plots import plot_alpha, plot_frontier, plot_skip
from modes_fx.policies import reduce_k
from modes_fx.profile import Profile, write_atomically
from modes_fx.progress import progress_bar
from modes_fx.skipping import Counts, block_alphas, simulate, thresholds
from modes_fx.tables import print_results
from modes_fx.threshold_search.search import Point, ThresholdSearch, apply, choose_exponent
from modes_fx.timing import decode_ms, one_thread, prefill_ms

# Skip rates of the policy table; the paper's tables have these for eight experts per token.
_TARGETS = (0.5, 0.67, 0.83)
_GRID = 16
_NEW_TOKENS = 16


@dataclass
class Results:
    """What the demo measured. Skip rates and accuracies are 0..1, KL is nats per answer token, times are ms.

    Attributes:
        accuracy: Per model, exact match per task and their `mean`, on the test split.
        skip: On the test split: `all`, `text`, `vision`, and the two modalities per layer.
        kl: `calibration` (what the search minimised) and `test`.
        max_logit_difference: Compiled against simulated skipping, over every real position of the test split.
        policies: A row per policy and skip rate, on the test split.
        prefill_ms, decode_ms_per_token: Per model, medians of CPU time on one thread.
        seconds: Wall time of each stage.
    """

    target: float
    samples: int
    test_samples: int
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    skip: dict[str, Any] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    max_logit_difference: float = 0.0
    policies: list[dict[str, Any]] = field(default_factory=list)
    prefill_ms: dict[str, float] = field(default_factory=dict)
    decode_ms_per_token: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)


def run_demo(
    out: Path,
    *,
    target: float = 0.83,
    samples: int = 130,
    test_samples: int = 208,
    rounds: int = 7,
    progress: bool = True,
    console: Console | None = None,
) -> Results:
    """Calibrate and search the shipped model at `target`, compile it, and compare it with the unmodified one.

    Args:
        out: Folder for `demo.modes.json`, `results.json`, `alpha.png`, `skip.png`, `frontier.png`.
        target: Wanted skip rate on the calibration split.
        samples: Calibration samples; a multiple of 13 gives every task equally many.
        test_samples: Test samples, which share no scene with the calibration. Multiples of 208 make whole
            batches of 16 rows for both picture sizes, so that the language model is compiled for one shape.
        rounds: Timed rounds; 0 leaves the timing and its compilations out.
    """
    console = console or Console()
    out.mkdir(parents=True, exist_ok=True)
    results = Results(target, samples, test_samples)
    with one_thread():
        model, processor = demo.load()
        test = demo.batches("test", test_samples)
        with _stage("calibrate", results, console):
            batches = demo.batches("calibration", samples)
            calibrated = calibrate(model, batches, processor=processor, progress=progress)
        with _stage("search", results, console):
            profile, chosen, tried = _search(model, batches, calibrated, target, progress)
            profile.save(out / "demo.modes.json")
        with _stage("compare policies", results, console):
            counts = _compare_policies(model, test, profile, chosen, results, progress)
        with _stage("compile and answer the test split", results, console):
            compiled = _compile(profile, results, model, test)
        if rounds:
            with _stage("time prefill and decode", results, console):
                _time(model, compiled, test, rounds, results)
    results.kl["calibration"] = float(profile.kl or 0.0)
    plot_alpha(calibrated, out / "alpha.png")
    plot_skip(counts, out / "skip.png")
    plot_frontier(tried, _policies(results), out / "frontier.png")
    write_atomically(out / "results.json", json.dumps(dataclasses.asdict(results), indent=2) + "\n")
    print_results(results, profile, console)
    console.print(f"Profile, results and plots are in {out}")
    return results


@contextmanager
def _stage(name: str, results: Results, console: Console) -> Iterator[None]:
    console.print(f"[bold]{name}[/bold]")
    start = time.monotonic()
    yield
    results.seconds[name] = round(time.monotonic() - start, 2)


def _search(
    model: nn.Module, batches: Sequence[Any], profile: Profile, target: float, progress: bool
) -> tuple[Profile, dict[float, Profile], list[Point]]:
    """The profile at `target`, the one for each rate of the table, and everything that was measured."""
    with progress_bar("search", None, enabled=progress) as bar:
        plain = ThresholdSearch(model, batches, profile, bar=bar)
        # The power of alpha is chosen at the wanted rate; the rest of the frontier keeps it.
        best = choose_exponent(plain, target, grid=_GRID)
        points = {rate: best.find(rate, grid=_GRID) for rate in sorted({*_TARGETS, target})}
    chosen = {rate: apply(best.profile, point, rate) for rate, point in points.items()}
    return chosen[target], chosen, best.points


def _compare_policies(
    model: nn.Module,
    test: Sequence[Any],
    profile: Profile,
    chosen: dict[float, Profile],
    results: Results,
    progress: bool,
) -> Counts:
    """Fill in accuracy, skip and KL on the test split; returns the counts of `profile` there."""
    with progress_bar("compare", None, enabled=progress) as bar:
        meter = Meter(model, test, profile.visual_token_ids, profile.special_token_ids, bar=bar)

        def row(policy: str, rate: float, measured: Measured) -> None:
            mean = _accuracy(test, measured)["mean"]
            numbers = {"skip": measured.skip, "kl": measured.kl, "accuracy": mean}
            results.policies.append({"policy": policy, "target": rate, **numbers})

        for rate, at_rate in chosen.items():
            alphas = block_alphas(at_rate, meter.blocks)
            measured = meter.measure(thresholds(alphas, at_rate.tau_text, at_rate.tau_vision), bar=bar)
            row("modes_fx", rate, measured)
            if rate == results.target:
                ours = measured
            row("reduce-k", rate, reduce_k(meter, rate, bar=bar).measured)
            row("reduce-k, renormalised", rate, reduce_k(meter, rate, renormalise=True, bar=bar).measured)
    results.kl["test"] = ours.kl
    results.skip = {
        **{"all": ours.skip, "text": ours.skip_text, "vision": ours.skip_vision},
        "text_per_layer": ours.counts.skip_per_block(TEXT),
        "vision_per_layer": ours.counts.skip_per_block(VISION),
    }
    return ours.counts


def _accuracy(test: Sequence[Any], measured: Measured) -> dict[str, float]:
    """Exact match per task, and their unweighted mean as `mean`."""
    right: dict[str, list[bool]] = defaultdict(list)
    tasks = [task for batch in test for task in batch["task"]]
    for task, verdict in zip(tasks, measured.right, strict=True):
        right[task].append(verdict)
    scores = {task: sum(right[task]) / len(right[task]) for task in demo.TASKS if task in right}
    return scores | {"mean": sum(scores.values()) / len(scores)}


class _Compared:
    """The compiled model; beside each of its answers it takes the simulated one and notes the difference."""

    def __init__(self, compiled: nn.Module, eager: nn.Module, profile: Profile) -> None:
        self.compiled, self.eager, self.profile = compiled, eager, profile
        self.max_difference = 0.0

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.compiled.parameters()

    def __call__(self, **inputs: Any) -> Any:
        output = self.compiled(**inputs)
        with simulate(self.eager, self.profile):
            simulated = self.eager(**inputs).logits
        difference = (output.logits - simulated).abs()[inputs["attention_mask"].bool()]
        self.max_difference = max(self.max_difference, float(difference.max()))
        return output


def _load_to_compile() -> Any:
    """A fresh copy of the model whose vision tower stays eager, as it is in the model compared with: it has
    no experts, and compiling it for two picture sizes takes longer than all the rest."""
    model, _ = demo.load()
    tower = model.get_encoder("image")
    tower.forward = torch.compiler.disable(tower.forward)
    return model


def _compile(profile: Profile, results: Results, eager: nn.Module, test: Sequence[Any]) -> nn.Module:
    """A second copy of the model, compiled in place, and its answers to the test split."""
    compiled = _load_to_compile()
    # In place, because generate() of what torch.compile(model) returns runs the uncompiled model.
    compiled.compile(backend=modes_fx.backend(profile), dynamic=None)
    compared = _Compared(compiled, eager, profile)
    with _quiet():
        results.accuracy["original"] = demo.accuracy(eager, test)
        results.accuracy["compiled"] = demo.accuracy(compared, test)
    results.max_logit_difference = compared.max_difference
    return compiled


def _time(eager: nn.Module, compiled: nn.Module, test: Sequence[Any], rounds: int, results: Results) -> None:
    inductor = _load_to_compile()
    inductor.compile(dynamic=None)
    models = {"eager": eager, "torch.compile": inductor, "modes_fx": compiled}
    prompt, _ = demo.question("test", 0)
    with _quiet():
        # The first calls compile: once for the shape, once more for shapes that vary.
        prefill_ms(models, test[0].inputs, 2)
        results.prefill_ms = prefill_ms(models, test[0].inputs, rounds)
        decode_ms(models, prompt, _NEW_TOKENS, 1)
        results.decode_ms_per_token = decode_ms(models, prompt, _NEW_TOKENS, rounds)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's remarks on the vision tower's graph breaks, which say nothing about experts."""
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\..*")
            yield
    finally:
        logger.setLevel(level)


def _policies(results: Results) -> dict[str, list[tuple[float, float]]]:
    """(skip rate, KL) on test of each policy, by name."""
    policies: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in results.policies:
        policies[row["policy"]].append((row["skip"], row["kl"]))
    return dict(policies)
