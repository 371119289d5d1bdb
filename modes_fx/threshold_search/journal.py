"""What a search has measured, kept in a file, so that a killed one goes on where it was.

The search is a function of what it measures: run again, it asks for the same points, and those that are in
the file are not measured again. What is left of a pass that was under way is kept too.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from modes_fx.errors import SearchError
from modes_fx.measure import Pass
from modes_fx.profile import write_atomically
from modes_fx.threshold_search.points import Point

FORMAT = "modes_fx.search"
VERSION = 1
# A pass under way is written this often at most; a finished point always.
SAVE_SECONDS = 20.0


class Journal:
    """Measured points by power of alpha and thresholds; without a path they are kept nowhere.

    Args:
        path: The file; read if it is there.
        key: What the points belong to, JSON types; a file of another key is refused.
    Raises:
        SearchError: The file is not a journal, or belongs to another search.
        OSError: It cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: dict[str, Any]) -> None:
        self._path, self._key = path, key
        self._batches: list[str] | None = None
        self._points: dict[tuple[float, float, float], Point] = {}
        self._under_way: tuple[tuple[float, float, float], Pass] | None = None
        self._written = time.monotonic()
        if path is not None and Path(path).exists():
            self._read(Path(path))
        elif path is not None:
            self._write()  # A path that cannot be written is an error now, not after the first hour.

    def check_batches(self, digests: list[str]) -> None:
        """Refuse a file that was begun with other batches."""
        if self._batches is not None and self._batches != digests:
            raise self._stale("the batches differ from those it was begun with")
        self._batches = digests

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self._points.values())

    def find(self, exponent: float, taus: tuple[float, float]) -> Point | None:
        return self._points.get((exponent, *taus))

    def under_way(self, exponent: float, taus: tuple[float, float]) -> Pass:
        """How far a killed search had got with these thresholds."""
        if self._under_way is not None and self._under_way[0] == (exponent, *taus):
            return self._under_way[1]
        return Pass()

    def keep(self, point: Point) -> None:
        self._points[point.exponent, point.tau_text, point.tau_vision] = point
        self._under_way = None
        if self._path is not None:
            self._write()

    def keep_pass(self, exponent: float, taus: tuple[float, float], done: Pass) -> None:
        if self._path is not None and time.monotonic() - self._written >= SAVE_SECONDS:
            self._under_way = ((exponent, *taus), done)
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        under_way = None
        if self._under_way is not None:
            place, done = self._under_way
            under_way = {"place": [_plain(value) for value in place], "pass": dataclasses.asdict(done)}
        plain = {
            **{"format": FORMAT, "version": VERSION, "key": self._key, "batches": self._batches},
            "points": [point.to_dict() for point in self._points.values()],
            "under_way": under_way,
        }
        write_atomically(self._path, json.dumps(plain, allow_nan=False) + "\n")
        self._written = time.monotonic()

    def _read(self, path: Path) -> None:
        try:
            plain = json.loads(path.read_bytes())
            if (plain["format"], plain["version"]) != (FORMAT, VERSION):
                raise ValueError
            for point in map(Point.from_dict, plain["points"]):
                self._points[point.exponent, point.tau_text, point.tau_vision] = point
            if plain["under_way"] is not None:
                exponent, text, vision = map(float, plain["under_way"]["place"])
                self._under_way = ((exponent, text, vision), Pass(**plain["under_way"]["pass"]))
            self._batches = plain["batches"]
            key = dict(plain["key"])
        except (ValueError, TypeError, KeyError, AttributeError):
            raise SearchError(
                f"{path} is not a file that search(resume=...) wrote; delete it, or name another."
            ) from None
        for name, value in self._key.items():
            if key.get(name) != value:
                raise self._stale(f"the {name} differs from the one it was begun with")

    def _stale(self, why: str) -> SearchError:
        return SearchError(f"{self._path} belongs to another search: {why}; delete it, or name another.")


def _plain(value: float) -> float | str:
    return "inf" if value == float("inf") else value
