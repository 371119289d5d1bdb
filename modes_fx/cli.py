"""The command line: `modes-fx demo | calibrate | search | explain | show`.

Whatever the user can put right is one sentence on standard error and exit code 2; a traceback is a bug.
Only the command that runs imports torch and transformers, so that --help is quick.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modes_fx.errors import ModesError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Skip the experts that do not matter: MoDES for mixture-of-experts multimodal models.",
)

ModelOption = Annotated[
    str, typer.Option("--model", help="Folder of a transformers model, or `demo` for the one inside.")
]
BatchesOption = Annotated[
    Path | None,
    typer.Option(
        "--batches",
        help='JSON Lines, {"question": ..., "answer": ..., "image": PATH}; the demo model has its own.',
    ),
]
SamplesOption = Annotated[int | None, typer.Option("--samples", min=1, help="Use no more samples than this.")]
ProfileArgument = Annotated[Path, typer.Argument(help="A profile, as `calibrate` or `search` wrote it.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where to write the profile.")]


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
def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a transformers model, or `demo`.")],
    out: OutOption,
    batches: BatchesOption = None,
    samples: SamplesOption = None,
    variant: Annotated[
        Literal["modality", "paper"], typer.Option(help="One alpha per modality, or one for both.")
    ] = "modality",
    resume: Annotated[
        Path | None, typer.Option(help="Keep progress in this file; run again to go on.")
    ] = None,
) -> None:
    """Measure alpha, the importance of every MoE layer, and write a profile that skips nothing yet.

    Example:  modes-fx calibrate path/to/model --batches questions.jsonl --out model.modes.json
    """
    import modes_fx

    loaded, processor = _load(model)
    data = _batches(model, batches, samples, processor)
    profile = modes_fx.calibrate(loaded, data, processor=processor, variant=variant, resume=resume)
    profile.save(out)
    _show(profile, f"Wrote {out}")


@app.command()
def search(
    profile: ProfileArgument,
    target_skip: Annotated[float, typer.Option(min=0, max=1, help="Wanted skip rate.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; PROFILE itself by default.")] = None,
    model: ModelOption = "demo",
    batches: BatchesOption = None,
    samples: SamplesOption = None,
    tolerance: Annotated[
        float, typer.Option(help="How far from the target the measured rate may lie.")
    ] = 0.01,
    grid: Annotated[int, typer.Option(min=1, help="Steps of the text threshold.")] = 100,
    exponent: Annotated[
        list[float] | None,
        typer.Option(help="Power of alpha; of several the best by KL is kept. [default: 1, 0.5, 0.25, 0]"),
    ] = None,
) -> None:
    """Set a profile's two thresholds so that a wanted share of the experts is skipped.

    Example:  modes-fx search model.modes.json --target-skip 0.83 --model path/to/model --batches q.jsonl
    """
    import modes_fx

    calibrated = modes_fx.Profile.load(profile)
    loaded, processor = _load(model)
    found = modes_fx.search(
        loaded,
        _batches(model, batches, samples, processor),
        calibrated,
        target_skip=target_skip,
        tolerance=tolerance,
        grid=grid,
        exponents=exponent or None,
    )
    found.save(out or profile)
    _show(found, f"Wrote {out or profile}")


@app.command()
def explain(profile: ProfileArgument, model: ModelOption = "demo", batches: BatchesOption = None) -> None:
    """Compile the model with a profile and say what was found, rewritten, left alone, and why.

    Example:  modes-fx explain model.modes.json --model path/to/model --batches questions.jsonl
    """
    import modes_fx

    loaded_profile = modes_fx.Profile.load(profile)
    loaded, processor = _load(model)
    batch = _batches(model, batches, 1, processor)[0]
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "task")}
    report = modes_fx.explain(loaded, loaded_profile, **inputs)  # type: ignore[attr-defined]
    typer.echo(str(report))


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


def _load(model: str) -> tuple[Any, Any]:
    """(model, processor) of a folder, or of the demo; never from the network."""
    if model == "demo":
        from modes_fx import demo as shipped

        return shipped.load()
    if not (Path(model) / "config.json").is_file():
        raise ModesError(f"{model} is not a model folder (it has no config.json); pass a folder or `demo`.")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        loaded = AutoModelForImageTextToText.from_pretrained(
            model, dtype="auto", experts_implementation="grouped_mm", local_files_only=True
        )
        processor = AutoProcessor.from_pretrained(model, local_files_only=True)
    except (ValueError, OSError) as error:
        raise ModesError(f"{model} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return loaded.eval(), processor


def _batches(model: str, path: Path | None, samples: int | None, processor: Any) -> list[Any]:
    if path is not None:
        from modes_fx.records import read_batches

        return read_batches(path, processor, limit=samples)
    if model != "demo":
        raise ModesError("A model of your own needs --batches FILE.jsonl; only the demo has samples inside.")
    from modes_fx import demo as shipped

    return shipped.batches("calibration", samples or 130)


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
