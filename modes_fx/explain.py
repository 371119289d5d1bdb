"""`modes_fx.explain`: what a compile of this model with this profile rewrites and leaves alone, and why."""

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modes_fx.backend import Backend
from modes_fx.errors import ModesError
from modes_fx.profile import Profile

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One block: a layer of the profile, or something in the graphs that looks like a block and is none.

    Attributes:
        layer: Name in the profile, or None.
        rewritten: It was rewritten in every graph that holds it, and ran.
        reason: Why not, else empty.
        theta_text, theta_vision: Routing weights below these are dropped: tau / alpha; None without a layer.
        modality: Where the modality of its tokens comes from.
        runs: How often it ran rewritten in the call.
        max_error: Largest relative difference that the proof of its rewrite saw.
    """

    layer: str | None
    rewritten: bool
    reason: str
    theta_text: float | None = None
    theta_vision: float | None = None
    modality: str | None = None
    runs: int = 0
    max_error: float | None = None


@dataclass(frozen=True)
class Report:
    """What `explain` found; `str()` is a plain table, `table()` one for rich.

    Attributes:
        rows: One per layer of the profile, in layer order, then what is left alone.
        num_graphs: Graphs with experts or token ids; the others go to the lowering untouched.
        passes: How often each pass changed a graph.
        warnings: What was said while compiling.
    """

    rows: tuple[Row, ...]
    num_graphs: int
    passes: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def num_rewritten(self) -> int:
        return sum(row.rewritten for row in self.rows)

    def summary(self) -> str:
        """One line: how many of how many."""
        done = f"{self.num_rewritten} of {len(self.rows)} blocks rewritten, in {self.num_graphs} graphs"
        return f"{done}; " + ", ".join(f"{name} {count}" for name, count in self.passes.items())

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text, without the header."""
        return [
            (
                row.layer or "(unknown block)",
                "yes" if row.rewritten else "no",
                _number(row.theta_text),
                _number(row.theta_vision),
                row.modality or "",
                str(row.runs),
                "" if row.max_error is None else f"{row.max_error:.1e}",
                row.reason,
            )
            for row in self.rows
        ]

    def table(self) -> "Table":
        """The report as a `rich.table.Table`."""
        from rich.table import Table

        table = Table(title=self.summary())
        for name in _HEADER:
            table.add_column(name)
        for cells in self.cells():
            table.add_row(*cells)
        return table

    def __str__(self) -> str:
        lines = [_HEADER, *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADER))]
        padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
        text = ["  ".join(cells).rstrip() for cells in padded]
        return "\n".join([*text, self.summary(), *self.warnings])


_HEADER = ("block", "rewritten", "drop text <", "drop vision <", "modality from", "runs", "error", "reason")


def explain(model: nn.Module, profile: Profile | str | os.PathLike[str], **inputs: Any) -> Report:
    """Compile `model` with `profile` for these inputs, run it once, and report. The model stays as it was.

    Args:
        model: The model, compiled or not.
        profile: A `Profile`, or the path of one.
        inputs: The model's own keyword inputs, of one call.
    Raises:
        ProfileError: The profile cannot be read, or was made for another model.
    """
    # The lowering does not matter to what is found, and this one compiles quickly.
    backend = Backend(profile, strict=False, lowering="eager")
    inner = getattr(model, "_orig_mod", model)
    from torch._dynamo.exc import BackendCompilerFailed

    compiled = torch.compile(inner.forward, backend=backend)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            compiled(**inputs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ModesError):
                raise error.inner_exception from None
            raise
    said = dict.fromkeys(str(w.message) for w in caught if "skipped" in str(w.message))
    passes: Counter[str] = Counter()
    for unit in backend.graphs:
        passes.update(unit.counts)
    return Report(tuple(_rows(backend)), len(backend.graphs), dict(passes), tuple(said))


def _rows(backend: Backend) -> list[Row]:
    seen = [(unit, block) for unit in backend.graphs for block in unit.blocks]
    rows = []
    for index, layer in enumerate(backend.profile.layers):
        mine = [(unit, block) for unit, block in seen if block.layer == layer.name]
        runs = backend.run.executed[index]
        refused = next((block.reason for _, block in mine if not block.rewritten), "")
        if not mine:
            refused = (
                "its experts are in no graph; are they eager? model.set_experts_implementation('grouped_mm')"
            )
        elif not refused and not runs:
            refused = "it was rewritten, but did not run"
        errors = [block.max_error for _, block in mine if block.max_error is not None]
        rows.append(
            Row(
                layer=layer.name,
                rewritten=not refused,
                reason=refused,
                theta_text=_theta(backend.profile.tau_text, layer.alpha_text),
                theta_vision=_theta(backend.profile.tau_vision, layer.alpha_vision),
                modality=mine[0][0].modality_source if mine else None,
                runs=runs,
                max_error=max(errors, default=None),
            )
        )
    rows += [Row(None, False, block.reason) for _, block in seen if block.layer is None]
    return rows


def _theta(tau: float, alpha: float) -> float:
    """The routing weight below which a pair is dropped."""
    if alpha == 0:
        return float("inf") if tau > 0 else 0.0
    return tau / alpha


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
