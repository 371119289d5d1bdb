"""Run tasks of a harness on a loaded model, with a profile or without."""

import importlib.metadata
import os
from collections.abc import Sequence
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
    if harness == "lmms-eval":
        return _lmms_eval(model, processor, tasks, profile, how, batch_size, limit, include_path)
    if harness == "lm-eval":
        return _lm_eval(model, processor, tasks, profile, how, batch_size, limit, include_path)
    raise ModesError(f"harness must be lmms-eval or lm-eval, got {harness!r}.")


def _lmms_eval(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    profile: Any,
    how: How,
    batch_size: int,
    limit: int | None,
    include_path: Any,
) -> Evaluation:
    try:
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing("lmms-eval", error) from error
    from modes_fx.evaluation.lmms_model import SkippingModel

    manager = TaskManager(include_path=_folder(include_path))
    _check_tasks(tasks, manager.all_tasks, "lmms-eval")
    lm = SkippingModel(model, profile, how, processor, batch_size)
    results = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        batch_size=batch_size,
        limit=limit,
        log_samples=False,
    )
    return _evaluation("lmms-eval", results, lm.counts)


def _lm_eval(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    profile: Any,
    how: How,
    batch_size: int,
    limit: int | None,
    include_path: Any,
) -> Evaluation:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise _missing("lm-eval", error) from error

    manager = TaskManager(include_path=_folder(include_path))
    _check_tasks(tasks, manager.all_tasks, "lm-eval")
    counts = None if profile is None else start_skipping(model, profile, how)
    tokenizer = getattr(processor, "tokenizer", processor)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        log_samples=False,
        batch_size=batch_size,
    )
    return _evaluation("lm-eval", results, counts)


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
