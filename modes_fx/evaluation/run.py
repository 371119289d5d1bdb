"""Run tasks of a harness on a loaded model, with a profile or without."""

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modes_fx.errors import ModesError
from modes_fx.evaluation.skipping import How, start_skipping
from modes_fx.modality import TEXT, VISION
from modes_fx.profile import Profile

Harness = Literal["lmms-eval", "lm-eval"]


@dataclass(frozen=True)
class Evaluation:
    """What the tasks gave.

    Attributes:
        harness: With its version.
        scores: Per task, what the harness reports: metrics by `name,filter`, and their standard errors.
        samples: Per task, how many.
        skip: `text` and `vision`: dropped pairs / all pairs of that modality over all that was run, prefill
            and decode; empty without a profile.
    """

    harness: str
    scores: dict[str, dict[str, float]]
    samples: dict[str, int]
    skip: dict[str, float] = field(default_factory=dict)


def evaluate(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    profile: Profile | str | os.PathLike[str] | None = None,
    harness: Harness = "lmms-eval",
    how: How = "attach",
    batch_size: int = 1,
    limit: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Evaluate a model on tasks of lmms-eval or lm-eval.

    Args:
        model: A transformers model; with a profile, it skips from then on.
        processor: The model's processor, or its tokenizer.
        tasks: Names that the harness knows, or that `include_path` defines.
        profile: What to skip; None for the model as it is.
        harness: lmms-eval asks with pictures, by generation; lm-eval with text, by likelihood or generation.
        how: See `start_skipping`.
        batch_size: Samples in a batch.
        limit: No more samples of a task than this.
        include_path: Folder of task files of your own.
    Raises:
        ModesError: The harness is not installed, or knows no such task.
    """
    if harness not in _HARNESSES:
        raise ModesError(f"harness must be lmms-eval or lm-eval, got {harness!r}.")
    given = _Given(model, processor, tuple(tasks), profile, how, batch_size, limit, _folder(include_path))
    results, counts = _HARNESSES[harness](given)
    return _evaluation(harness, results, counts)


@dataclass(frozen=True)
class _Given:
    """What `evaluate` was called with."""

    model: Any
    processor: Any
    tasks: tuple[str, ...]
    profile: Any
    how: How
    batch_size: int
    limit: int | None
    include_path: str | None

    def run(self, simple_evaluate: Any, manager: Any, lm: Any) -> Any:
        """Both harnesses are called alike."""
        return simple_evaluate(
            model=lm,
            tasks=list(self.tasks),
            task_manager=manager,
            batch_size=self.batch_size,
            limit=self.limit,
            log_samples=False,
        )


def _lmms_eval(given: _Given) -> tuple[Any, Any]:
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing("lmms-eval", error) from error
    from modes_fx.evaluation.lmms_model import SkippingModel

    manager = TaskManager(include_path=given.include_path)
    _check_tasks(given.tasks, manager.all_tasks, "lmms-eval")
    lm = SkippingModel(given.model, given.profile, given.how, given.processor, given.batch_size)
    return given.run(simple_evaluate, manager, lm), lm.counts


def _lm_eval(given: _Given) -> tuple[Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing("lm-eval", error) from error

    manager = TaskManager(include_path=given.include_path)
    _check_tasks(given.tasks, manager.all_tasks, "lm-eval")
    counts = None if given.profile is None else start_skipping(given.model, given.profile, given.how)
    tokenizer = getattr(given.processor, "tokenizer", given.processor)
    lm = HFLM(pretrained=given.model, tokenizer=tokenizer, backend="causal", batch_size=given.batch_size)
    return given.run(lm_eval.simple_evaluate, manager, lm), counts


# name -> (what was asked) -> (the harness's results, counts of skipped pairs or None)
_HARNESSES: dict[str, Callable[[_Given], tuple[Any, Any]]] = {"lmms-eval": _lmms_eval, "lm-eval": _lm_eval}


def _folder(include_path: Any) -> str | None:
    if include_path is None:
        return None
    if not Path(include_path).is_dir():
        raise ModesError(f"{os.fspath(include_path)} is no folder of task files.")
    return os.fspath(include_path)


def _missing(harness: str, error: ImportError) -> ModesError:
    cures = {
        "lm-eval": "pip install lm-eval accelerate",
        # It requires torchvision, whose build for CUDA cannot be imported beside a CPU build of torch.
        "lmms-eval": "pip install lmms-eval; beside a CPU build of torch, pip install lm-eval accelerate "
        "loguru tenacity, then pip install --no-deps lmms-eval",
    }
    return ModesError(f"{harness} cannot be imported ({error}): {cures[harness]}.")


def _check_tasks(tasks: Sequence[str], known: Sequence[str], harness: str) -> None:
    unknown = [task for task in tasks if task not in known]
    if unknown or not tasks:
        raise ModesError(
            f"{harness} has no task {', '.join(unknown) or '(none was named)'}; it knows {len(known)}; "
            "include_path adds a folder of others."
        )


def _evaluation(harness: str, results: Any, counts: Any) -> Evaluation:
    scores = {
        # Metrics have the name of a filter behind a comma; the rest is about the task.
        task: {
            name: float(value)
            for name, value in found.items()
            if "," in name and isinstance(value, float | int)
        }
        for task, found in results["results"].items()
    }
    samples = {task: int(number["effective"]) for task, number in results.get("n-samples", {}).items()}
    skip = {}
    if counts is not None:
        counted = counts()
        skip = {"text": counted.skip(TEXT), "vision": counted.skip(VISION)}
    return Evaluation(f"{harness} {importlib.metadata.version(harness)}", scores, samples, skip)
