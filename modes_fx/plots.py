"""Pictures of a profile (alpha and skip rate per layer, KL over skip rate) and of policies beside it."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Profile

if TYPE_CHECKING:
    from modes_fx.skipping import Counts
    from modes_fx.threshold_search.search import Point

_TEXT, _VISION = "#3b6fb6", "#d9812b"


def plot_alpha(profile: Profile, path: Path) -> None:
    """alpha of each layer, text beside vision, as a PNG."""
    figure, axes = _figure()
    _bars(
        axes,
        [layer.alpha_text for layer in profile.layers],
        [layer.alpha_vision for layer in profile.layers],
    )
    axes.set(xlabel="MoE layer", ylabel="alpha (sums to 1 over layers)", title="Importance of each layer")
    _save(figure, path)


def plot_skip(counts: "Counts", path: Path) -> None:
    """Measured skip rate of each layer, text beside vision, as a PNG."""
    figure, axes = _figure()
    _bars(
        axes,
        [100 * rate for rate in counts.skip_per_block(TEXT)],
        [100 * rate for rate in counts.skip_per_block(VISION)],
    )
    title = f"Skipped pairs, {100 * counts.skip():.1f} % of all"
    axes.set(xlabel="MoE layer", ylabel="skip rate (%)", ylim=(0, 105), title=title)
    _save(figure, path)


def plot_frontier(
    tried: Sequence["Point"], policies: Mapping[str, Sequence[tuple[float, float]]], path: Path
) -> None:
    """KL over skip rate, as a PNG.

    Args:
        tried: Points that the search measured, on the calibration split.
        policies: Name of a policy to its (skip rate, KL) pairs, on the test split.
    """
    figure, axes = _figure()
    axes.plot(
        [100 * p.skip for p in tried], [p.kl for p in tried], ".", color="#bbbbbb", label="tried, calibration"
    )
    for (name, points), mark in zip(policies.items(), cycle("osv^D"), strict=False):
        axes.plot([100 * skip for skip, _ in points], [kl for _, kl in points], f"{mark}-", label=name)
    axes.set(xlabel="measured skip rate (%)", ylabel="KL (nats per answer token)", title="Frontier")
    if all(kl > 0 for points in policies.values() for _, kl in points):
        axes.set_yscale("log")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    _save(figure, path)


def plot_policies(rows: Sequence[Mapping[str, Any]], path: Path, what: Literal["accuracy", "kl"]) -> None:
    """Accuracy or KL over the measured skip rate, a line per policy, as a PNG.

    Args:
        rows: Each with `policy`, `skip` (0..1), `accuracy` (0..1) and `kl` (nats); others are left out.
    """
    figure, axes = _figure(height=6.0)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "kl" in row:
            value = 100 * row["accuracy"] if what == "accuracy" else row["kl"]
            lines.setdefault(row["policy"], []).append((100 * row["skip"], value))
    for (name, points), mark in zip(lines.items(), cycle("os^vD<>ph*XP"), strict=False):
        axes.plot(*zip(*sorted(points), strict=True), f"{mark}-", label=name, markersize=4, linewidth=1)
    label = "accuracy (%)" if what == "accuracy" else "KL (nats per answer token)"
    axes.set(xlabel="measured skip rate (%)", ylabel=label)
    if what == "kl":
        axes.set_yscale("log")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=7)
    _save(figure, path)


def plot_layer_skips(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Skip rate per layer and modality of some policies, one line each, as a PNG.

    Args:
        rows: Each with `policy`, `skip_text` and `skip_vision` (0..1 per layer).
    """
    figure, axes = _figure()
    for row, mark in zip(rows, cycle("os^v"), strict=False):
        for name, key, colour in (("text", "skip_text", _TEXT), ("vision", "skip_vision", _VISION)):
            rates = [100 * rate for rate in row[key]]
            axes.plot(range(len(rates)), rates, f"{mark}-", color=colour, label=f"{row['policy']}, {name}")
    axes.set(xlabel="MoE layer", ylabel="skip rate (%)", ylim=(0, 105))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    _save(figure, path)


def plot_marginal(alphas: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], path: Path) -> None:
    """What a pair at the threshold costs, beside alpha, per layer and modality, each summing to one; a PNG.

    Args:
        alphas, costs: (text, vision) of each layer; costs below zero are drawn as zero.
    """
    figure, axes = _figure()
    places = range(len(alphas))
    shares = {"alpha": alphas, "cost of the next pair": [[max(0.0, c) for c in pair] for pair in costs]}
    for (name, values), style in zip(shares.items(), ("-", "--"), strict=True):
        for column, (modality, colour) in enumerate((("text", _TEXT), ("vision", _VISION))):
            total = sum(pair[column] for pair in values) or 1.0
            line = [pair[column] / total for pair in values]
            axes.plot(places, line, f"o{style}", color=colour, label=f"{name}, {modality}")
    axes.set(xlabel="MoE layer", ylabel="share of the sum over layers")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    _save(figure, path)


def _figure(height: float = 4.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    # Not pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _bars(axes: Any, text: Sequence[float], vision: Sequence[float]) -> None:
    places = range(len(text))
    axes.bar([place - 0.2 for place in places], text, width=0.4, color=_TEXT, label="text")
    axes.bar([place + 0.2 for place in places], vision, width=0.4, color=_VISION, label="vision")
    if len(text) <= 24:
        axes.set_xticks(list(places))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, format="png")
