"""One progress bar, on standard error, silent where nobody watches."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")


class Bar:
    """Counts steps and shows a note beside them; with `progress=None` it does nothing."""

    def __init__(self, progress: "Progress | None" = None, task: "TaskID | None" = None) -> None:
        self._progress, self._task = progress, task

    def step(self, count: int = 1) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def over(self, named: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Give each of `named`, and show its name until the next is asked for: a step each."""
        for name, each in named:
            self.note(name)
            yield name, each
            self.step()

    def expect(self, steps: int) -> None:
        """Say how many more steps there are, as far as is known now."""
        if self._progress is not None and self._task is not None:
            task = next(task for task in self._progress.tasks if task.id == self._task)
            self._progress.update(self._task, total=task.completed + steps)

    def note(self, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=text)


def rate(steps_per_second: float | None) -> str:
    """Steps per second, or seconds per step where that is the longer number; "" where it is not known yet."""
    if not steps_per_second:
        return ""
    return f"{steps_per_second:.1f}/s" if steps_per_second >= 1 else f"{1 / steps_per_second:.1f} s each"


@contextmanager
def progress_bar(description: str, total: int | None, *, enabled: bool) -> Iterator[Bar]:
    """A bar of `total` steps (None: unknown) while the block runs."""
    if not enabled:
        yield Bar()
        return
    # Here, so that a process which only compiles does not load it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.finished_speed or task.speed), style="progress.data.speed")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))
