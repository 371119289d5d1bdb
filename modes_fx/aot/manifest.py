"""`manifest.json`: what an exported folder holds, what it was made for, and the sha256 of every file.

It is written last, so that a folder with a manifest is whole; and read first, so that nothing of a folder
that was damaged, edited or made elsewhere is ever run.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modes_fx.errors import ExportError
from modes_fx.profile import write_atomically

NAME = "manifest.json"
FORMAT = "modes_fx.export"
VERSION = 1


@dataclass(frozen=True)
class Range:
    """Sizes that one dimension may have, both ends included."""

    min: int
    max: int

    def check(self, name: str, size: int) -> None:
        """Raise ValueError where a call is outside of what was exported."""
        if not self.min <= size <= self.max:
            raise ValueError(
                f"{name} is {size}, and this program was exported for {self.min} to {self.max}; "
                f"export it with dynamic={{{name!r}: ({min(self.min, size)}, {max(self.max, size)})}}."
            )


@dataclass(frozen=True)
class Program:
    """One program of the folder.

    Attributes:
        file: Its file, in the folder.
        inputs: Names of its tensors, in order.
        outputs: Names of its results, in order.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """The vision program for pictures of one size.

    Attributes:
        program: One picture's `pixel_values` -> its rows for the language model, `[N, H]` each.
        shape: Of one picture's `pixel_values`.
        grid: Its row of `image_grid_thw`, or None where the model has no such input.
        rows: Visual tokens of one picture.
    """

    program: Program
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    rows: int


@dataclass(frozen=True)
class Manifest:
    """See the module's docstring.

    Attributes:
        target: `aoti`, `onnx`, `tensorrt-rtx` or `tensorrt`.
        model: Class of the model, for people.
        dtype: Of logits, cache and pictures.
        profile: Digest, thresholds and measured skip rate of the profile whose constants are baked in.
        versions: Of the libraries that made the files.
        requires: What the machine that runs them must have, by name; see each target.
        batch, tokens, cache: Rows of a call, tokens of a prefill, tokens a decode step may find in the cache.
        programs: `prefill` and `decode`.
        pictures: One for each size of pictures; empty for a model that sees none, or was exported without.
        picture_token_id: Placeholder of a visual token, None without pictures.
        merge_size: Patches that make one visual token, along one side of the grid; where it is set,
            positions count time, height and width (M-RoPE), else tokens alone.
        feature_size: Width of a picture's rows, None without pictures.
        eos_token_ids: What ends an answer.
        details: What a target wants to tell, e.g. sizes and build times of engines.
        files: sha256 and size of every file.
    """

    target: str
    model: str
    dtype: str
    profile: dict[str, Any]
    versions: dict[str, str]
    requires: dict[str, Any]
    batch: Range
    tokens: Range
    cache: Range
    programs: dict[str, Program]
    pictures: tuple[Picture, ...] = ()
    picture_token_id: int | None = None
    merge_size: int | None = None
    feature_size: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, folder: Path) -> "Manifest":
        """Hash the files of a folder and write the manifest; what is written is returned."""
        names = sorted(path.name for path in folder.iterdir() if path.name != NAME)
        files = {name: {"sha256": sha256(folder / name), "bytes": _size(folder / name)} for name in names}
        whole = dataclasses.replace(self, files=files)
        body = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(whole)}
        write_atomically(folder / NAME, json.dumps(body, indent=2) + "\n")
        return whole

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a folder's manifest and check every file that it names.

        Raises:
            ExportError: No manifest, a foreign or damaged one, a file that is missing or was changed.
        """
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ExportError(
                f"{folder} holds no {NAME}: modes_fx.export did not write it, or did not end; export again."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ExportError(f"{path} is damaged ({error}); export again.") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ExportError(
                f'{path} is not a manifest of modes_fx ("format": "{FORMAT}" is missing); pass a folder '
                "that modes_fx.export wrote."
            )
        if data.get("version") != VERSION:
            raise ExportError(
                f"{path} has version {data.get('version')!r}, this modes_fx reads version {VERSION}; export "
                "again, or use the modes_fx that wrote it."
            )
        try:
            manifest = _from_json(cls, data)
            manifest._check_files(folder)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(f"{path} was edited or damaged ({error!r}); export again.") from None
        return manifest

    def _check_files(self, folder: Path) -> None:
        programs = [*self.programs.values(), *(picture.program for picture in self.pictures)]
        unlisted = {program.file for program in programs} - set(self.files)
        if unlisted:
            raise ValueError(f"no sha256 of {', '.join(sorted(unlisted))}")
        for name, entry in self.files.items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(f"{name!r} is not the name of a file in the folder")
            path = folder / name
            if not path.is_file():
                raise ExportError(f"{path} is missing; copy the whole folder, or export again.")
            if _size(path) != entry["bytes"] or sha256(path) != entry["sha256"]:
                raise ExportError(
                    f"{path} is not the file that was exported (its sha256 differs from the one in {NAME}); "
                    "copy the folder again, or export again."
                )


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size


def _from_json(cls: type[Manifest], data: dict[str, Any]) -> Manifest:
    known = {item.name for item in dataclasses.fields(cls)}
    body = {key: value for key, value in data.items() if key in known}
    for key in ("batch", "tokens", "cache"):
        body[key] = Range(**body[key])
    body["programs"] = {name: _program(entry) for name, entry in body["programs"].items()}
    body["pictures"] = tuple(
        Picture(
            _program(entry["program"]),
            tuple(entry["shape"]),
            None if entry["grid"] is None else tuple(entry["grid"]),
            entry["rows"],
        )
        for entry in body["pictures"]
    )
    body["eos_token_ids"] = tuple(body["eos_token_ids"])
    return cls(**body)


def _program(entry: dict[str, Any]) -> Program:
    return Program(entry["file"], tuple(entry["inputs"]), tuple(entry["outputs"]))
