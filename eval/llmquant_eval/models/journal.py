"""What was measured so far, on disk, so that a run that was killed resumes.

JSON Lines: a key that says everything the value depends on (model, options, prompts), and the
value. Lines are appended and synced as values come. A key of another model or other options is
never looked up, so nothing has to be thrown away when a command changes; a line that a kill cut in
two is measured again. The file is deleted when the work is done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from llmquant.errors import LlmquantError, UsageError


def key_of(*parts: object) -> str:
    """Hex sha256 of values that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Journal:
    """An open journal; several threads may add at the same time. See :func:`opened`."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.path, self._file = path, file
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        file.seek(0)
        for line in file:
            try:
                entry = json.loads(line)
                self._values[str(entry["key"])] = entry["value"]
            except (ValueError, KeyError, TypeError):  # the cut line of a killed run
                continue

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> Any:
        """The value, or None."""
        return self._values.get(key)

    def add(self, key: str, value: Any) -> None:
        """Store a value; it is on disk when this returns."""
        line = json.dumps({"key": key, "value": value})
        with self._lock:
            self._values[key] = value
            try:
                # A line end first: a line that was cut would swallow this one.
                self._file.write("\n" + line + "\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as e:
                raise LlmquantError(
                    f"{self.path} cannot be written: {e}; free some space and run the same command"
                ) from e

    def discard(self) -> None:
        """Forget everything, on disk too."""
        with self._lock:
            self._values.clear()
            self._file.truncate(0)


@contextmanager
def opened(path: Path, *, restart: bool) -> Iterator[Journal]:
    """The journal at ``path``, made where there is none. It is deleted when the block is done, and
    stays when that fails.

    Raises:
        UsageError: another run has it open.
        LlmquantError: it cannot be written.
    """
    try:
        file = path.open("a+", encoding="utf-8", errors="replace")
    except OSError as e:
        raise LlmquantError(f"{path} cannot be written: {e}; give another --output") from e
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UsageError(
                f"{path} is in use by another run; wait for it, or give another --output"
            ) from e
        except OSError as e:
            raise LlmquantError(f"{path} cannot be locked: {e}; give another --output") from e
        journal = Journal(path, file)
        if restart:
            journal.discard()
        done = False
        try:
            yield journal
            done = True
        finally:
            if done or not len(journal):
                path.unlink(missing_ok=True)
