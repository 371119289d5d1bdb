"""What the command line prints about profiles and results, as rich tables."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from modes_fx.profile import Profile

if TYPE_CHECKING:
    from modes_fx.aot.manifest import Manifest
    from modes_fx.evaluation import Evaluation
    from modes_fx.main_job import Results


def print_profile(profile: Profile, console: Console) -> None:
    """Thresholds, how the profile was made, and a row per layer."""
    console.print(
        f"tau_text {profile.tau_text:.6g}   tau_vision {profile.tau_vision:.6g}   alpha: {profile.method}, "
        f"{profile.num_samples} samples"
    )
    if profile.measured_skip is None:
        console.print("No thresholds were searched yet: this profile skips nothing.")
    else:
        console.print(
            f"skip rate: target {_percent(profile.target_skip)}, measured {_percent(profile.measured_skip)}, "
            f"text {_percent(profile.measured_skip_text)}, vision {_percent(profile.measured_skip_vision)}; "
            f"KL {_number(profile.kl)} nats per answer token{_interval(profile)}"
        )
    table = Table("layer", "alpha text", "alpha vision", "experts")
    table.columns[0].overflow = "fold"
    for layer in profile.layers:
        table.add_row(
            layer.name,
            f"{layer.alpha_text:.4f}",
            f"{layer.alpha_vision:.4f}",
            f"{layer.top_k} of {layer.num_experts}",
        )
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in profile.versions.items())
    console.print(
        f"visual token ids {list(profile.visual_token_ids)}, special {list(profile.special_token_ids)}\n"
        f"made with {versions or 'unknown versions'}; digest {profile.digest()[:12]}"
    )


def print_export(manifest: "Manifest", folder: Path) -> None:
    """A row per file, what the target reports of it, and what calls it takes."""
    programs = [*manifest.programs.values(), *(picture.program for picture in manifest.pictures)]
    reports = {program.file: manifest.details.get(Path(program.file).stem) for program in programs}
    table = Table("file", "size (kB)", "report", title=f"{manifest.model} for {manifest.target}")
    for name, entry in manifest.files.items():
        report = reports.get(name) or {}
        said = ", ".join(f"{key} {value}" for key, value in report.items())
        table.add_row(name, f"{entry['bytes'] / 1e3:,.0f}", said)
    console = Console()
    console.print(table)
    console.print(
        f"up to {manifest.batch.max} rows, {manifest.tokens.max} tokens of a prefill, {manifest.cache.max} "
        f"tokens in the cache; {_picture_sizes(manifest)}\nWrote {folder}",
        soft_wrap=True,
    )


def _picture_sizes(manifest: "Manifest") -> str:
    sizes = [" x ".join(map(str, picture.grid or picture.shape)) for picture in manifest.pictures]
    return f"pictures of {', '.join(sizes)} patches" if sizes else "no pictures"


def print_evaluation(found: "Evaluation") -> None:
    """A row per task and metric, and what was skipped."""
    table = Table("task", "metric", "value", "standard error", "samples", title=found.harness)
    for task, scores in found.scores.items():
        for name, value in scores.items():
            metric, _, way = name.partition(",")
            error = scores.get(f"{metric}_stderr,{way}")
            if "_stderr" not in metric:
                cells = (f"{value:.4f}", "-" if error is None else f"{error:.4f}")
                table.add_row(task, metric, *cells, str(found.samples.get(task, "-")))
    console = Console()
    console.print(table)
    if found.skip:
        rates = ", ".join(f"{name} {_percent(rate)}" for name, rate in found.skip.items())
        console.print(f"measured skip rate: {rates}")


def print_results(results: "Results", profile: Profile, console: Console) -> None:
    """The demo's tables."""
    console.print(_accuracy_table(results))
    console.print(_skip_table(results, profile))
    console.print(_policy_table(results))
    if results.prefill_ms:
        console.print(_time_table(results))
    console.print(
        f"KL {results.kl['calibration']:.4f} nats on calibration, {results.kl['test']:.4f} on test; compiled "
        f"and simulated logits differ by at most {results.max_logit_difference:.1e}; "
        f"{sum(results.seconds.values()):.0f} s in all"
    )


def _accuracy_table(results: "Results") -> Table:
    table = Table("task", "original", "compiled", title=f"Accuracy on {results.test_samples} test samples")
    original, compiled = results.accuracy["original"], results.accuracy["compiled"]
    for task in original:
        if task == "mean":
            table.add_section()
        table.add_row(task, f"{original[task]:.3f}", f"{compiled[task]:.3f}")
    return table


def _skip_table(results: "Results", profile: Profile) -> Table:
    table = Table("layer", "text", "vision", title="Measured skip rate on test")
    rows = zip(results.skip["text_per_layer"], results.skip["vision_per_layer"], strict=True)
    for layer, (text, vision) in zip(profile.layers, rows, strict=True):
        table.add_row(layer.name, _percent(text), _percent(vision))
    table.add_section()
    table.add_row("all layers", _percent(results.skip["text"]), _percent(results.skip["vision"]))
    table.add_row("all tokens", _percent(results.skip["all"]), "")
    return table


def _policy_table(results: "Results") -> Table:
    title = "Policies at the same skip rate, on test"
    table = Table("target", "policy", "measured skip", "KL (nats)", "accuracy", title=title)
    for row in results.policies:
        numbers = (_percent(row["skip"]), _number(row["kl"]), f"{row['accuracy']:.3f}")
        table.add_row(_percent(row["target"]), row["policy"], *numbers)
    return table


def _time_table(results: "Results") -> Table:
    title = "CPU time on one thread, medians, ratio to eager in brackets; vision tower eager"
    table = Table("model", "prefill, 16 rows (ms)", "decode (ms per token)", title=title)
    for name in results.prefill_ms:
        cells = (
            f"{times[name]:.2f} ({times[name] / times['eager']:.2f})"
            for times in (results.prefill_ms, results.decode_ms_per_token)
        )
        table.add_row(name, *cells)
    return table


def _interval(profile: Profile) -> str:
    if profile.kl_low is None or profile.kl_high is None:
        return ""
    return f" (95 % interval {_number(profile.kl_low)} to {_number(profile.kl_high)})"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
