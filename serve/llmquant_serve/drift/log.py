"""The log: one line of JSON for each observation, after a line that holds the profile.

The log is the truth and holds no text. What the monitor remembers is written beside it now and
then, to start quickly; lines after that are read again. A process that was killed while it wrote
leaves half a line at most, which is cut off.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmquant import DriftMonitor, DriftObservation, DriftProfile, DriftState
from llmquant.errors import LlmquantError, UsageError


class Header(BaseModel):
    """The first line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["drift-log"] = "drift-log"
    schema_version: Literal[1] = 1
    alpha: float
    profile: DriftProfile


class Entry(DriftObservation):
    """Another line.

    Attributes:
        time: in seconds since 1970.
    """

    time: float


class Saved(BaseModel):
    """What the monitor remembered when the log had ``offset`` bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    header: str
    offset: int
    state: DriftState


def read_log(path: Path) -> tuple[Header, Iterator[Entry]]:
    """The header, and the lines as they are read.

    Raises:
        UsageError: there is none, or it is something else; of a line, when it is reached.
    """
    try:
        with path.open("rb") as f:
            first = f.readline()
    except OSError as e:
        raise UsageError(f"the drift log {path} cannot be read: {e.strerror or e}") from e
    return _header(path, first), _entries(path, len(first), 2)


class DriftLog:
    """The log of a server, open for writing; one process has it.

    Args:
        path: made if it is not there.

    Attributes:
        monitor: what the lines say so far.

    Raises:
        UsageError: it is of another profile, of another alpha, or another process's.
    """

    def __init__(self, path: Path, profile: DriftProfile, alpha: float) -> None:
        self.path, self.monitor = path, DriftMonitor(profile, alpha)
        header = Header(alpha=alpha, profile=profile)
        self._header = header.model_dump_json()
        with contextlib.ExitStack() as failed:
            try:
                self._file = failed.enter_context(path.open("ab+", buffering=0))
                self._begin(header)
            except OSError as e:
                raise UsageError(
                    f"the drift log {path} cannot be written: {e.strerror or e}; give another --drift-log"
                ) from e
            failed.pop_all()

    @property
    def state_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.state")

    def append(self, entry: Entry) -> None:
        """Raises OSError where it cannot be written; then nothing of it is."""
        line, size = entry.model_dump_json(exclude_none=True).encode() + b"\n", self._size()
        try:
            if os.write(self._file.fileno(), line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise

    def save(self) -> None:
        """Write what the monitor remembers.

        Raises:
            OSError: it cannot be written.
        """
        saved = Saved(header=self._header, offset=self._size(), state=self.monitor.state())
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                f.write(saved.model_dump_json())
            Path(name).replace(self.state_path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def close(self) -> None:
        self._file.close()

    def _begin(self, header: Header) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(
                f"the drift log {self.path} is another server's; give another --drift-log"
            ) from e
        line = self._header.encode() + b"\n"
        with self.path.open("rb") as f:
            first = f.readline()
        if line.startswith(first) and first != line:  # nothing, or the beginning of this very line
            # The state of a log that was moved away would say what this one does not.
            self.state_path.unlink(missing_ok=True)
            self._file.truncate(0)
            self._file.write(line)
            return
        # Before anything is cut off: the file may be any other.
        if _header(self.path, first) != header:
            raise UsageError(
                f"the drift log {self.path} was begun with another profile or another --drift-alpha; "
                "give another --drift-log, or move this one away"
            )
        self._cut_torn_line()
        self._replay(len(first))

    def _cut_torn_line(self) -> None:
        end = self._size()
        place = -1
        while place < 0:  # the first line has an end
            begin = max(0, end - 2**16)
            self._file.seek(begin)
            place = self._file.read(end - begin).rfind(b"\n")
            end = begin + place + 1 if place >= 0 else begin
        self._file.truncate(end)

    def _replay(self, begin: int) -> None:
        number = 2
        saved = self._saved()
        if saved is not None:
            self.monitor.restore(saved.state)
            begin, number = saved.offset, saved.state.entries + 2
        for entry in _entries(self.path, begin, number):
            self.monitor.add(entry)

    def _saved(self) -> Saved | None:
        with contextlib.suppress(OSError, ValidationError):
            saved = Saved.model_validate_json(self.state_path.read_bytes())
            if saved.header == self._header and saved.offset <= self._size():
                return saved
        return None

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size


def _header(path: Path, line: bytes) -> Header:
    try:
        return Header.model_validate_json(line)
    except ValidationError as e:
        raise UsageError(
            f"{path} is not a drift log; give the file that llmquant serve --drift writes"
        ) from e


def _entries(path: Path, begin: int, number: int) -> Iterator[Entry]:
    """The lines from a place on, the first of which has this number; half a line at the end is
    none."""
    try:
        with path.open("rb") as f:
            f.seek(begin)
            for place, line in enumerate(f, number):
                if not line.endswith(b"\n"):
                    return
                yield _entry(path, place, line)
    except OSError as e:
        raise LlmquantError(f"the drift log {path} cannot be read: {e.strerror or e}") from e


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        return Entry.model_validate_json(line)
    except ValidationError as e:
        raise UsageError(
            f"{path}, line {number} is not a line of a drift log; remove the line, and {path}.state with it"
        ) from e
