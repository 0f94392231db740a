"""The work folder ``DIR.auto``: what survives a kill, and what a later run need not do again.

    data/calibration.jsonl, data/heldout.jsonl    the text in two parts
    reference/                                    the original's distributions on the held-out part
    baseline.json                                 the original's report
    rungs/NAME/measured.json                      a finished rung
    rungs/NAME/made.json                          that its folder is whole, and what that took
    rungs/NAME/spent.json                         seconds that an unfinished one has taken so far
    rungs/NAME/DIR                                its folder, as long as it may be chosen
    published.json                                whose folder DIR is

Every record has a key, a hash of all that it depends on: the model's bytes, the recipe, both texts,
how it is scored, and versions. A record with another key is not used. Files are replaced whole, so
a kill leaves the old one or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from llmquant import write_file
from llmquant.errors import UsageError
from llmquant_eval.auto.schema import Baseline, Made, Measured, Spent
from llmquant_eval.report.results import Sha256, Strict

_Record = TypeVar("_Record", bound=Strict)
_SAVE_EVERY = 2.0  # seconds between notes of the time that an unfinished rung has taken


class Published(Strict):
    """Whose folder the output is: of the request with this key, with these weights."""

    key: Sha256
    weights_sha256: Sha256


class _Begun(Strict):
    key: Sha256
    spent: Spent


class Work:
    """The folder and its records; ``name`` is the output's, which a candidate's folder has too."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self._name = folder, name

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def reference(self) -> Path:
        return self.folder / "reference"

    def rung(self, name: str) -> Path:
        return self.folder / "rungs" / name

    def candidate(self, name: str) -> Path:
        """The folder of a rung's result."""
        return self.rung(name) / self._name

    def measured(self, name: str, key: str) -> Measured | None:
        """A rung that was finished under the same key."""
        found = _read(self.rung(name) / "measured.json", Measured)
        return found if found is not None and found.key == key else None

    def made(self, name: str, key: str) -> Made | None:
        """A rung's folder that was finished under the same key; whether it is still there, the
        caller looks."""
        found = _read(self.rung(name) / "made.json", Made)
        return found if found is not None and found.key == key else None

    def keep_made(self, name: str, made: Made) -> None:
        _write(self.rung(name) / "made.json", made)

    def keep_measured(self, name: str, measured: Measured) -> None:
        _write(self.rung(name) / "measured.json", measured)
        (self.rung(name) / "spent.json").unlink(missing_ok=True)

    def baseline(self, key: str) -> Baseline | None:
        found = _read(self.folder / "baseline.json", Baseline)
        return found if found is not None and found.key == key else None

    def keep_baseline(self, baseline: Baseline) -> None:
        _write(self.folder / "baseline.json", baseline)

    def published(self) -> Published | None:
        return _read(self.folder / "published.json", Published)

    def keep_published(self, published: Published) -> None:
        _write(self.folder / "published.json", published)

    def begin(self, name: str, key: str) -> Spent:
        """What an unfinished rung has taken so far. One with another key is deleted: nothing of it
        may be resumed."""
        begun = _read(self.rung(name) / "spent.json", _Begun)
        if begun is not None and begun.key == key:
            return begun.spent
        shutil.rmtree(self.rung(name), ignore_errors=True)
        self.rung(name).mkdir(parents=True)
        self.spend(name, key, Spent())
        return Spent()

    def spend(self, name: str, key: str, spent: Spent) -> None:
        _write(self.rung(name) / "spent.json", _Begun(key=key, spent=spent))

    def drop(self, name: str) -> None:
        """Delete a candidate's folder; what was measured of it stays."""
        shutil.rmtree(self.candidate(name), ignore_errors=True)


class Meter:
    """Seconds since it was made, on top of ``before``: of the wall clock, and of all processors
    with child processes that ended."""

    def __init__(self, before: Spent | None = None) -> None:
        self._before = before or Spent()
        self._wall, self._cpu = time.perf_counter(), _processors()
        self._saved = self._wall

    def spent(self) -> Spent:
        now = Spent(wall=time.perf_counter() - self._wall, cpu=_processors() - self._cpu)
        return self._before + now

    def due(self) -> bool:
        """Whether it is time to note what was spent."""
        now = time.perf_counter()
        if now - self._saved < _SAVE_EVERY:
            return False
        self._saved = now
        return True


def key_of(facts: Mapping[str, object]) -> str:
    """A hash of facts."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _processors() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _read(path: Path, kind: type[_Record]) -> _Record | None:
    """A record; None where there is none, or one that another version wrote."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}") from e


def _write(path: Path, record: Strict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, record.model_dump_json(indent=2) + "\n")
