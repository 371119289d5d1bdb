"""The command line: `modes-fx demo | calibrate | search | explain | evaluate | export | show`.

Whatever the user can put right is one sentence on standard error and exit code 2; a traceback is a bug.
Only the command that runs imports torch and transformers, so that --help is quick.
"""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from modes_fx.errors import ModesError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Skip the experts that do not matter: MoDES for mixture-of-experts multimodal models.",
)

_MODEL = "Folder of a transformers model, its name on the Hub, or `demo` for the one inside."
ModelOption = Annotated[str, typer.Option("--model", help=_MODEL)]
ProfileArgument = Annotated[Path, typer.Argument(help="A profile, as `calibrate` or `search` wrote it.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where to write the profile.")]
ResumeOption = Annotated[
    Path | None, typer.Option(help="Keep progress in this file; the same command run again goes on from it.")
]


def _model_option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="How the model is loaded")


def _data_option(help: str, *names: str, **given: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Samples", **given)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How to load a model: options that several commands share."""

    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], _model_option("Of the weights; auto: as stored.")
    ] = "auto"
    device_map: Annotated[
        str | None, _model_option("As of transformers: `auto` spreads the layers over all devices.")
    ] = None
    trust_remote_code: Annotated[
        bool, _model_option("Run the code that the model brings along.", "--trust-remote-code")
    ] = False

    def processor(self, model: str) -> Any:
        from modes_fx.data.loading import load_processor

        return load_processor(model, trust_remote_code=self.trust_remote_code)

    def model(self, model: str) -> Any:
        from modes_fx.data.loading import load_model

        return load_model(
            model, dtype=self.dtype, device_map=self.device_map, trust_remote_code=self.trust_remote_code
        )


@dataclass(frozen=True, kw_only=True)
class Source(Loading):
    """What to load, and samples to run it on."""

    data: Annotated[
        str | None,
        _data_option(
            "A .jsonl, .json, .parquet, .csv or .arrow file, a folder for the datasets library, or a name on "
            "the Hub; the demo model has samples of its own."
        ),
    ] = None
    data_name: Annotated[str | None, _data_option("Configuration of the data set.")] = None
    data_split: Annotated[str | None, _data_option("Split of the data set.")] = None
    image_column: Annotated[str, _data_option("A picture, its path, or a list of them.")] = "image"
    question_column: Annotated[str, _data_option("What is asked.")] = "question"
    answer_column: Annotated[str, _data_option("What is answered; of a list the first.")] = "answer"
    task_column: Annotated[str | None, _data_option("Names the task of a row.")] = None
    prompt: Annotated[
        str, _data_option("What to ask; {question} is the row's, {COLUMN} any other text of it.")
    ] = "{question}"
    text_only: Annotated[bool, _data_option("Take no pictures.", "--text-only")] = False
    image_table: Annotated[
        str | None,
        _data_option(
            "Configuration whose rows are the pictures (columns id, image); the image column then holds ids."
        ),
    ] = None
    template: Annotated[
        list[str] | None, _data_option("NAME=VALUE for the chat template, e.g. enable_thinking=false.")
    ] = None
    samples: Annotated[int | None, _data_option("Use no more samples than this.", min=1)] = None
    seed: Annotated[
        int | None, _data_option("Take samples in a random order; else the first ones.", min=0)
    ] = None
    batch_size: Annotated[int, _data_option("Samples in a batch.", min=1)] = 8

    def load(self, model: str) -> tuple[Any, Any, Any]:
        """(model, processor, batches): the model last, for it takes longest and the others may be wrong."""
        processor = self.processor(model)
        batches = self.batches(model, processor)
        return self.model(model), processor, batches

    def batches(self, model: str, processor: Any, *, rows: int | None = None) -> Any:
        """Samples, `rows` of them in a batch in place of what the options say."""
        if self.data is None:
            if model != "demo":
                raise ModesError("A model of your own needs --data; only the demo has samples inside.")
            from modes_fx import demo as shipped

            return shipped.batches("calibration", self.samples or 130, batch_size=rows or 16)
        from modes_fx.data import ChatBatches, Columns, PictureTable, load_rows

        pictures = None
        if self.image_table is not None:
            pictures = PictureTable(load_rows(self.data, name=self.image_table, split=self.data_split))
        return ChatBatches(
            load_rows(self.data, name=self.data_name, split=self.data_split),
            processor,
            columns=Columns(
                image=None if self.text_only else self.image_column,
                question=self.question_column,
                answer=self.answer_column,
                task=self.task_column,
                prompt=self.prompt,
            ),
            pictures=pictures,
            batch_size=rows or self.batch_size,
            samples=self.samples,
            seed=self.seed,
            template=dict(map(_template_argument, self.template or [])),
        )


def _template_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ModesError(f"--template takes NAME=VALUE, got {text!r}.")
    return name, {"true": True, "false": False}.get(value.lower(), value)


def takes(options: type[Loading]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of `options`, in place of its argument `source`."""
    hints = get_type_hints(options, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(options)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            source = options(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            command(**given, source=source)

        signature = inspect.signature(command)
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]
        parameters = [*(parameter for parameter in own if parameter.name != "source"), *shared]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the profile, results.json and plots.")] = Path(
        "modes-fx-demo"
    ),
    target: Annotated[float, typer.Option(min=0, max=1, help="Wanted skip rate.")] = 0.83,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 130,
    test_samples: Annotated[int, typer.Option(min=1, help="Test samples.")] = 208,
    rounds: Annotated[int, typer.Option(min=0, help="Timed rounds; 0 leaves timing out.")] = 7,
) -> None:
    """Calibrate, search, compile and compare the small trained model that comes with modes_fx.

    Example:  modes-fx demo --out modes-fx-demo --target 0.83
    """
    from modes_fx.main_job import run_demo

    run_demo(out, target=target, samples=samples, test_samples=test_samples, rounds=rounds)


@app.command()
@takes(Source)
def calibrate(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    out: OutOption,
    source: Source,
    variant: Annotated[
        Literal["modality", "paper", "modes-code"],
        typer.Option(help="One alpha per modality, one for both, or what the paper's code does."),
    ] = "modality",
    method: Annotated[
        Literal["exact", "taylor", "taylor-gate", "taylor-loss"],
        typer.Option(help="Every block dropped in turn, or an estimate from one pass and its gradients."),
    ] = "exact",
    check: Annotated[
        int, typer.Option(min=0, help="Compare an estimate with the exact alpha of so many samples.")
    ] = 0,
    resume: ResumeOption = None,
) -> None:
    """Measure alpha, the importance of every MoE layer, and write a profile that skips nothing yet.

    Started by torchrun, its processes share the work: torchrun --nproc-per-node 8 -m modes_fx calibrate ...

    Example:  modes-fx calibrate path/to/model --data questions.jsonl --out model.modes.json
    """
    import modes_fx

    loaded, processor, batches = source.load(model)
    profile = modes_fx.calibrate(
        loaded, batches, processor=processor, variant=variant, method=method, check=check, resume=resume
    )
    _write(profile, out)


@app.command()
@takes(Source)
def search(
    profile: ProfileArgument,
    source: Source,
    target_skip: Annotated[
        float | None, typer.Option(help="Wanted skip rate, at the least KL.", min=0, max=1)
    ] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Or the most skip within this KL, nats per answer token.", min=0)
    ] = None,
    target_skip_text: Annotated[
        float | None, typer.Option(help="Least skip rate of text tokens.", min=0, max=1)
    ] = None,
    target_skip_vision: Annotated[
        float | None, typer.Option(help="Least skip rate of vision tokens.", min=0, max=1)
    ] = None,
    task_floor: Annotated[
        float | None,
        typer.Option(help="Share of its accuracy that each task must keep; see --task-column.", min=0, max=1),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; PROFILE itself by default.")] = None,
    model: ModelOption = "demo",
    tolerance: Annotated[
        float, typer.Option(help="How far from the target the measured rate may lie.")
    ] = 0.01,
    method: Annotated[
        Literal["guided", "staircase", "exhaustive"],
        typer.Option(help="At most 30 passes, the paper's walk, or the whole grid."),
    ] = "guided",
    grid: Annotated[int, typer.Option(min=1, help="Thresholds of the grid per modality.")] = 100,
    exponent: Annotated[
        list[float] | None,
        typer.Option(help="Power of alpha; of several the best is kept. [default: 1, 0.5, 0.25, 0]"),
    ] = None,
    resume: ResumeOption = None,
    frontier: Annotated[Path | None, typer.Option(help="Write every measured point to this file.")] = None,
) -> None:
    """Set a profile's two thresholds: the least KL at a skip rate, or the most skip within a budget.

    Example:  modes-fx search model.modes.json --target-skip 0.83 --model path/to/model --data q.jsonl
    """
    import modes_fx
    from modes_fx.threshold_search.targets import Target

    target = Target(
        skip=target_skip,
        kl=target_kl,
        skip_text=target_skip_text,
        skip_vision=target_skip_vision,
        task_floors=task_floor,
    )
    calibrated = modes_fx.Profile.load(profile)
    loaded, _, batches = source.load(model)
    found = modes_fx.search(
        loaded,
        batches,
        calibrated,
        target=target,
        tolerance=tolerance,
        method=method,
        grid=grid,
        exponents=exponent or None,
        resume=resume,
        save_frontier=frontier,
    )
    _write(found, out or profile)


@app.command()
@takes(Source)
def explain(profile: ProfileArgument, source: Source, model: ModelOption = "demo") -> None:
    """Compile the model with a profile and say what was found, rewritten, left alone, and why.

    Example:  modes-fx explain model.modes.json --model path/to/model --data questions.jsonl
    """
    import modes_fx

    loaded_profile = modes_fx.Profile.load(profile)
    loaded, _, batches = dataclasses.replace(source, samples=1).load(model)
    typer.echo(str(modes_fx.explain(loaded, loaded_profile, **_inputs(batches[0]))))


def _inputs(batch: Any) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("labels", "task")}


@app.command()
@takes(Loading)
def evaluate(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    tasks: Annotated[str, typer.Option(help="Names of tasks, separated by commas.")],
    source: Loading,
    profile: Annotated[Path | None, typer.Option(help="What to skip; without it, nothing.")] = None,
    harness: Annotated[
        Literal["lmms-eval", "lm-eval"], typer.Option(help="Questions about pictures, or text alone.")
    ] = "lmms-eval",
    how: Annotated[
        Literal["attach", "compile"], typer.Option(help="Skip in the uncompiled model, or in a compiled one.")
    ] = "attach",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a batch.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="No more samples of a task than this.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of task files of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
) -> None:
    """Score a model, with a profile or without, on benchmarks of lmms-eval or lm-eval.

    Example:  modes-fx evaluate path/to/model --profile model.modes.json --tasks gqa,pope
    """
    import json

    from modes_fx.evaluation import evaluate as run
    from modes_fx.profile import Profile, write_atomically
    from modes_fx.tables import print_evaluation

    chosen = None if profile is None else Profile.load(profile)
    processor = source.processor(model)
    found = run(
        source.model(model),
        processor,
        [task for task in tasks.split(",") if task],
        profile=chosen,
        harness=harness,
        how=how,
        batch_size=batch_size,
        limit=limit,
        include_path=include_path,
    )
    if out is not None:
        write_atomically(out, json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    print_evaluation(found)


@app.command()
@takes(Source)
def export(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    profile: ProfileArgument,
    target: Annotated[str, typer.Option(help="What to write: aoti, onnx, tensorrt-rtx or tensorrt.")],
    out: Annotated[Path, typer.Option(help="Folder for the programs; an export in it is replaced.")],
    source: Source,
    max_batch: Annotated[int, typer.Option(min=1, help="Most rows of a call.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prefill.")] = 4096,
    max_cache: Annotated[int, typer.Option(min=1, help="Most tokens that a decode step finds.")] = 8192,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of the target, VALUE in JSON, e.g. 'compute_capabilities=[\"SM89\"]'."),
    ] = None,
) -> None:
    """Write a model that skips what a profile drops as programs that run without either.

    They are traced with samples; the vision encoder is written for each size of picture among these (of 26
    samples unless --samples says otherwise).

    Example:  modes-fx export path/to/model model.modes.json --target onnx --out served --data q.jsonl
    """
    import modes_fx
    from modes_fx.aot.targets import module_of
    from modes_fx.tables import print_export

    module_of(target)
    chosen = modes_fx.Profile.load(profile)
    options = dict(map(_target_option, option or []))
    processor = source.processor(model)
    samples = dataclasses.replace(source, samples=source.samples or 26)
    batches = samples.batches(model, processor, rows=min(2, max_batch))
    manifest = modes_fx.export(
        source.model(model),
        chosen,
        [_inputs(batch) for batch in batches],
        out,
        target=target,
        dynamic={"batch": (1, max_batch), "tokens": (1, max_tokens), "cache": (1, max_cache)},
        options=options,
    )
    print_export(manifest, out)


def _target_option(text: str) -> tuple[str, Any]:
    import json

    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        raise ModesError(f"--option takes NAME=VALUE with a value in JSON, got {text!r}.") from None


@app.command()
def show(profile: ProfileArgument) -> None:
    """Print a profile: thresholds, skip rates, and alpha of every layer.

    Example:  modes-fx show model.modes.json
    """
    from modes_fx.profile import Profile

    _show(Profile.load(profile))


def _show(profile: Any, last_line: str = "") -> None:
    from rich.console import Console

    from modes_fx.tables import print_profile

    console = Console()
    print_profile(profile, console)
    if last_line:
        console.print(last_line)


def _write(profile: Any, out: Path) -> None:
    """Write a profile and say so; of several processes one does."""
    if os.environ.get("RANK", "0") == "0":
        profile.save(out)
        _show(profile, f"Wrote {out}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; see the module's docstring for errors."""
    try:
        code = app(arguments, prog_name="modes-fx", standalone_mode=False)
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except Exception as error:
        message = _sentence(error)
        if message is None:
            raise
        _fail(message, 2)
    sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: BaseException) -> str | None:
    """What to tell the user; None for a bug of ours."""
    # Dynamo wraps what a backend raises.
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, ModesError):
        error = inner
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename or 'a file'}: {error.strerror}."
    if isinstance(error, ModesError | OSError):
        return str(error)
    # Bad options and arguments; typer brings its own copy of click, so the class is known by its method.
    explain_usage = getattr(error, "format_message", None)
    return None if explain_usage is None else str(explain_usage())


def _fail(message: str, code: int) -> None:
    # Without any command the help has been printed, and there is nothing to add.
    if message:
        sys.stderr.write(f"modes-fx: {' '.join(message.split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
