"""`modes_fx.explain`: what a compile of this model with this profile rewrites and leaves alone, and why."""

import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
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
        traits: What its router and experts are like.
        specialised: What its constants let the passes simplify.
        runs: How often it ran rewritten in the call.
        max_error: Largest relative difference that the proof of its rewrite saw.
    """

    layer: str | None
    rewritten: bool
    reason: str
    theta_text: float | None = None
    theta_vision: float | None = None
    modality: str = ""
    traits: str = ""
    specialised: tuple[str, ...] = ()
    runs: int = 0
    max_error: float | None = None


@dataclass(frozen=True)
class Report:
    """What `explain` found; `str()` is a plain table, `table()` one for rich.

    Attributes:
        rows: One per layer of the profile, in layer order, then what is left alone.
        num_graphs: Graphs that Dynamo made.
        num_rewritten_graphs: Those with experts or token ids; the others go to the lowering untouched.
        graph_breaks: How often Dynamo broke the graph, by its reason.
        num_recompiles: Graphs of code that had been compiled before: other sizes, or another layer's weights.
        passes: How often each pass changed a graph.
        warnings: What was said while compiling.
    """

    rows: tuple[Row, ...]
    num_graphs: int
    num_rewritten_graphs: int = 0
    graph_breaks: dict[str, int] = field(default_factory=dict)
    num_recompiles: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def num_rewritten(self) -> int:
        return sum(row.rewritten for row in self.rows)

    def summary(self) -> str:
        """One line: how many of how many."""
        return (
            f"{self.num_rewritten} of {len(self.rows)} blocks rewritten. "
            f"{self.num_graphs} graphs, {self.num_rewritten_graphs} of them changed; "
            f"{sum(self.graph_breaks.values())} graph breaks, {self.num_recompiles} recompiles."
        )

    def header(self) -> tuple[str, ...]:
        """Names of the columns. What is the same for all blocks has none, see `notes`."""
        return (*_COLUMNS, *self._columns_that_differ())

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text, without the header; a number in brackets is that of a reason."""
        reasons = self._reasons()
        return [
            (
                row.layer or "(unknown block)",
                f"no [{reasons.index(row.reason) + 1}]" if row.reason else "yes",
                _number(row.theta_text),
                _number(row.theta_vision),
                str(row.runs),
                "" if row.max_error is None else f"{row.max_error:.0e}",
                *(_OPTIONAL[name](row) for name in self._columns_that_differ()),
            )
            for row in self.rows
        ]

    def notes(self) -> list[str]:
        """What stands under the table: reasons, what all blocks have in common, breaks, passes, warnings."""
        notes = [f"[{number}] {reason}" for number, reason in enumerate(self._reasons(), start=1)]
        for name, text in _OPTIONAL.items():
            common = {text(row) for row in self.rows} - {""}
            if len(common) == 1 and name not in self._columns_that_differ():
                notes.append(f"{name}: {common.pop()}")
        notes += [f"graph break, {count} times: {why}" for why, count in self.graph_breaks.items()]
        changed = {name: count for name, count in self.passes.items() if count}
        if changed:
            notes.append("passes: " + ", ".join(f"{name} {count}" for name, count in changed.items()))
        return [*notes, *(f"warning: {text}" for text in self.warnings)]

    def table(self) -> "Table":
        """The report as a `rich.table.Table`."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self.summary(), caption=escape("\n".join(self.notes())), caption_justify="left")
        for name in self.header():
            table.add_column(name)
        for cells in self.cells():
            table.add_row(*map(escape, cells))
        return table

    def __str__(self) -> str:
        lines = [self.header(), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
        text = ["  ".join(cells).rstrip() for cells in padded]
        notes = [textwrap.fill(note, _WIDTH, subsequent_indent="    ") for note in self.notes()]
        return "\n".join([*text, self.summary(), *notes])

    def _reasons(self) -> list[str]:
        return list(dict.fromkeys(row.reason for row in self.rows if row.reason))

    def _columns_that_differ(self) -> list[str]:
        """Of what may be the same for all blocks: what is not, among those that were rewritten."""
        rows = [row for row in self.rows if row.rewritten]
        return [name for name, text in _OPTIONAL.items() if len({text(row) for row in rows}) > 1]


_WIDTH = 110
_COLUMNS = ("block", "rewritten", "drop text <", "drop vision <", "runs", "error")
_OPTIONAL: dict[str, Callable[[Row], str]] = {
    "specialised": lambda row: ", ".join(row.specialised),
    "modality from": lambda row: row.modality,
    "traits": lambda row: row.traits,
}


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
    before = _graph_breaks()
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
    return Report(
        rows=tuple(_rows(backend)),
        num_graphs=len(backend.compile_ids),
        num_rewritten_graphs=len(backend.graphs),
        graph_breaks=dict((_graph_breaks() - before).most_common()),
        # An id is `frame/number`; earlier compiles of the frame, with other backends, count on.
        num_recompiles=len(backend.compile_ids) - len({each.split("/")[0] for each in backend.compile_ids}),
        passes=dict(passes),
        warnings=tuple(said),
    )


def _graph_breaks() -> Counter[str]:
    """Dynamo's counts so far, by first lines; after a break in a loop it skips the whole function."""
    counts: Counter[str] = Counter()
    for kind in ("graph_break", "unimplemented"):
        for why, count in torch._dynamo.utils.counters[kind].items():
            counts[why.strip().splitlines()[0]] += count
    return counts


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
        sources = dict.fromkeys(unit.modality_source or "" for unit, _ in mine)
        rows.append(
            Row(
                layer=layer.name,
                rewritten=not refused,
                reason=refused,
                theta_text=_theta(backend.profile.tau_text, layer.alpha_text),
                theta_vision=_theta(backend.profile.tau_vision, layer.alpha_vision),
                modality=", ".join(sources),
                traits=next((block.traits for _, block in mine if block.traits), ""),
                specialised=tuple(dict.fromkeys(how for _, block in mine for how in block.specialised)),
                runs=runs,
                max_error=max(errors, default=None),
            )
        )
    rows += [Row(None, False, block.reason, traits=block.traits) for _, block in seen if block.layer is None]
    return rows


def _theta(tau: float, alpha: float) -> float:
    """The routing weight below which a pair is dropped."""
    if alpha == 0:
        return float("inf") if tau > 0 else 0.0
    return tau / alpha


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
