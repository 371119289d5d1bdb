"""Three pictures of a profile: alpha per layer, skip rate per layer, and KL over skip rate."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Profile

if TYPE_CHECKING:
    from modes_fx.search import Point
    from modes_fx.skipping import Counts

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


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    # Not pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
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
