"""Rows of data sets, and what their cells hold: text, numbers, pictures in every form that they come in."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modes_fx.errors import ModesError

Row = Mapping[str, Any]
Rows = Any  # a sequence of rows, or a `datasets.Dataset`
_READERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class JsonRows(list[dict[str, Any]]):
    """Rows of a JSON file, and the folder that relative paths of pictures start from."""

    def __init__(self, rows: list[dict[str, Any]], folder: Path) -> None:
        super().__init__(rows)
        self.folder = folder


def load_rows(source: str | os.PathLike[str], *, name: str | None = None, split: str | None = None) -> Rows:
    """The rows of a data set, as something with a length and an index.

    Args:
        source: A file (.jsonl, .json, .parquet, .csv, .arrow), a folder that `datasets` can read (of such
            files, of pictures with a metadata file, or written by `save_to_disk`), or a name on the Hub.
            Relative paths of pictures in a JSON file start at its folder.
        name: The configuration, where a data set has several.
        split: Needed where a data set has several.
    Raises:
        ModesError: It cannot be read, or there is a choice to make; the message names the choices.
        OSError: A JSON file cannot be read.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".json"):
        return _read_json(path)
    if (path.suffix in _READERS or path.is_absolute()) and not path.exists():
        raise ModesError(f"{path}: there is no such data set; pass a file, a folder, or a name on the Hub.")
    try:
        import datasets  # type: ignore[import-not-found]
    except ImportError:
        raise ModesError(
            f"Reading {os.fspath(source)} needs the datasets library: pip install datasets. "
            "Files of JSON Lines are read without it."
        ) from None
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        elif path.suffix in _READERS:
            loaded = datasets.load_dataset(_READERS[path.suffix], data_files=str(path))
        else:
            loaded = datasets.load_dataset(os.fspath(source), name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ModesError(f"{os.fspath(source)} cannot be read: {first_line(error)}") from error
    if not isinstance(loaded, Mapping):
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        wanted = "Choose a split" if split is None else f"There is no split {split}"
        raise ModesError(f"{wanted}: {os.fspath(source)} has {', '.join(map(str, loaded))}.")
    return loaded[split]


def _read_json(path: Path) -> JsonRows:
    """Objects of a JSON list, or one a line."""
    text = path.read_text(encoding="utf-8")
    whole = path.suffix == ".json" and text.lstrip().startswith("[")
    parts = [(1, text)] if whole else list(enumerate(text.splitlines(), start=1))
    rows: list[Any] = []
    for number, part in parts:
        if not part.strip():
            continue
        try:
            read = json.loads(part)
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1
            raise ModesError(f"{path} line {line} is not JSON ({error.msg}).") from None
        rows += read if whole else [read]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ModesError(f"{path}: row {index} must be an object with question, answer and image.")
    return JsonRows(rows, path.parent)


class PictureTable(Mapping[Any, Any]):
    """Pictures by their key, where they are rows of their own (as in GQA); each is read when it is asked for.

    Args:
        rows: As of `load_rows`.
        key, image: The two columns.
    """

    def __init__(self, rows: Rows, *, key: str = "id", image: str = "image") -> None:
        check_columns(rows, [key, image])
        self._rows, self._image = undecoded(rows, image), image
        keys = rows[key] if hasattr(rows, "features") else [row[key] for row in rows]
        self._places = {name: place for place, name in enumerate(keys)}

    def __getitem__(self, key: Any) -> Any:
        return self._rows[self._places[key]][self._image]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def check_columns(rows: Rows, wanted: Sequence[str]) -> None:
    """Refuse rows without a wanted column, naming those that they have."""
    there = getattr(rows, "column_names", None)
    if there is None:
        there = list(dict.fromkeys(name for row in rows for name in row))
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ModesError(f"There is no column {', '.join(missing)}; there are {', '.join(there) or 'none'}.")


def undecoded(rows: Rows, image: str | None) -> Rows:
    """The rows with their pictures as bytes or paths, so that looking at a row decodes none."""
    features = getattr(rows, "features", None)
    if features is None or image is None:
        return rows
    from datasets import Image as ImageFeature  # type: ignore[import-not-found]
    from datasets import List

    kind = features[image]
    if isinstance(kind, ImageFeature):
        return rows.cast_column(image, ImageFeature(decode=False))
    if isinstance(kind, List) and isinstance(kind.feature, ImageFeature):
        return rows.cast_column(image, List(ImageFeature(decode=False)))
    return rows


def cell_text(value: Any) -> str:
    """Of a list the first entry, of a number its digits, of what is missing nothing."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, int | float) and value == value else ""


def cell_list(value: Any) -> list[Any]:
    """A cell of one or several things, as a list; None is nothing."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def has_picture(value: Any) -> bool:
    """Whether a cell's entry is there at all; it may still not be a picture."""
    if isinstance(value, Mapping):
        return value.get("bytes") is not None or value.get("path") is not None
    return value is not None and not (isinstance(value, str) and not value)


def open_picture(value: Any, folder: Path) -> Image.Image:
    """An RGB picture from one of PIL, an array, bytes, a path, or the mapping that `datasets` keeps it in.

    Args:
        folder: Where relative paths start.
    Raises:
        OSError, ValueError, TypeError: It is none.
    """
    if isinstance(value, Mapping):
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if isinstance(value, np.ndarray):
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    with Image.open(BytesIO(value) if isinstance(value, bytes) else folder / value) as opened:
        return opened.convert("RGB")


def first_line(error: BaseException) -> str:
    """An error of another library in one line, with its class."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
