"""`modes_fx.export`: a model and its profile, written as programs that run without either."""

import importlib.metadata
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.aot.manifest import NAME, Manifest, Picture, Range
from modes_fx.aot.programs import Sizes, Traced, TracedModel, drop_asserts, trace
from modes_fx.aot.targets import module_of
from modes_fx.errors import ExportError
from modes_fx.exported import rewrite
from modes_fx.profile import Profile
from modes_fx.progress import progress_bar

DYNAMIC = {"batch": (1, 64), "tokens": (1, 4096), "cache": (1, 8192)}
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt_rtx", "triton")


def export(
    model: nn.Module | Any,
    profile: Profile | str | os.PathLike[str],
    inputs: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
    path: str | os.PathLike[str],
    *,
    target: str = "aoti",
    dynamic: Mapping[str, tuple[int, int]] | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Manifest:
    """Write a model that skips what the profile drops as a folder of programs; `modes_fx.load` opens it.

    The folder appears whole or not at all; one that an export wrote before is replaced.

    Args:
        model: An eager language model of transformers, with or without pictures.
        profile: A `Profile`, or the path of one; its constants are baked in.
        inputs: Inputs of a prefill as the model takes them, to trace with, or several such. For a model that
            is to see pictures, with pictures; the vision encoder is exported for each size in any of them.
        path: The folder to write.
        target: `aoti`, `onnx`, `tensorrt-rtx` or `tensorrt`; see `modes_fx.aot.targets`.
        dynamic: Ranges, both ends included, of `batch` (rows of a call), `tokens` (of a prefill) and `cache`
            (tokens that a decode step finds there); what is left out is as in `DYNAMIC`.
        options: Of the target; see `write_programs` in its module.
        progress: Show a progress bar on standard error.
    Returns:
        The manifest, with sizes and what the target reports.
    Raises:
        ExportError: The target is unknown or not installed, or the model cannot be exported.
        ProfileError, RewriteError: As from `modes_fx.rewrite`.
    """
    if not isinstance(profile, Profile):
        profile = Profile.load(profile)
    module = module_of(target)
    folder = _check_folder(Path(path))
    with progress_bar("export", None, enabled=progress) as bar:
        bar.note("tracing")
        traced = trace(model, [inputs] if isinstance(inputs, Mapping) else inputs, _sizes(dynamic))
        programs = {
            "prefill": _rewritten(traced.prefill, profile),
            "decode": _rewritten(traced.decode, profile),
            **{_picture_name(i): picture.traced for i, picture in enumerate(traced.pictures)},
        }
        bar.expect(len(programs))
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
            partial = Path(name) / folder.name
            partial.mkdir()
            written, details = module.write_programs(partial, programs, dict(options or {}), bar)
            manifest = _manifest(model, profile, traced, target, module, written, details).write(partial)
            if folder.exists():
                os.replace(folder, Path(name) / "before")
            os.replace(partial, folder)
    return manifest


def _rewritten(traced: Traced, profile: Profile) -> Traced:
    program = rewrite(traced.program, profile)
    drop_asserts(program)
    return Traced(program, traced.inputs, traced.outputs)


def _sizes(dynamic: Mapping[str, tuple[int, int]] | None) -> Sizes:
    given = dict(dynamic or {})
    unknown = sorted(set(given) - set(DYNAMIC))
    if unknown:
        raise ExportError(f"dynamic takes {', '.join(DYNAMIC)}, got {', '.join(unknown)}.")
    for name, (low, high) in given.items():
        if not 1 <= low <= high:
            raise ExportError(
                f"dynamic[{name!r}] must be (least, most), 1 <= least <= most, got {low, high}."
            )
    return Sizes(**{name: Range(*size) for name, size in (DYNAMIC | given).items()})


def _check_folder(folder: Path) -> Path:
    """Refuse to replace anything but an export."""
    folder = Path(os.path.realpath(folder))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / NAME).is_file()):
        raise ExportError(f"{folder} exists and is no export of modes_fx; pass another path, or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _picture_name(index: int) -> str:
    return f"picture_{index}"


def _manifest(
    model: Any,
    profile: Profile,
    traced: TracedModel,
    target: str,
    module: Any,
    written: dict[str, Any],
    details: dict[str, Any],
) -> Manifest:
    sizes = traced.sizes
    return Manifest(
        target=target,
        model=type(model).__name__,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        profile={
            "digest": profile.digest(),
            "tau_text": str(profile.tau_text),
            "tau_vision": str(profile.tau_vision),
            "measured_skip": profile.measured_skip,
        },
        versions=_versions(),
        requires=module.requires(),
        batch=sizes.batch,
        tokens=sizes.tokens,
        cache=sizes.cache,
        programs={name: written[name] for name in ("prefill", "decode")},
        pictures=tuple(
            Picture(written[_picture_name(i)], picture.shape, picture.grid, picture.rows)
            for i, picture in enumerate(traced.pictures)
        ),
        picture_token_id=traced.picture_token_id,
        merge_size=traced.merge_size,
        feature_size=traced.feature_size,
        eos_token_ids=_eos_token_ids(model),
        details=details,
    )


def _eos_token_ids(model: Any) -> tuple[int, ...]:
    config = getattr(model, "generation_config", None) or model.config
    ids = getattr(config, "eos_token_id", None)
    return () if ids is None else tuple(ids) if isinstance(ids, Sequence) else (int(ids),)


def _versions() -> dict[str, str]:
    found = {}
    for name in ("modes_fx", *_LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found
