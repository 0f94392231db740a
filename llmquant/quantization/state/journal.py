"""An append-only file of JSON lines, each with its checksum: what happened for certain, in order.

A line counts once its bytes are on the disk. A crash in the middle of one leaves a torn last line,
which reading leaves out and the next append overwrites.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llmquant.checkpoint.atomic import fsync_path

_SUM = 16  # hex digits of the checksum


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")
    return hashlib.sha256(text).hexdigest()[:_SUM].encode() + b" " + text + b"\n"


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records up to the first line that is torn or damaged, and the bytes they take; nothing
    where there is no file."""
    records: list[dict[str, Any]] = []
    end = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        text = line[_SUM + 1 : -1]
        if (
            not line.endswith(b"\n")
            or hashlib.sha256(text).hexdigest()[:_SUM].encode() + b" " != line[: _SUM + 1]
        ):
            break
        records.append(json.loads(text))
        end += len(line)
    return records, end


class Journal:
    """Appends durably.

    Args:
        path: the file; made when it is missing.
        end: bytes that count; whatever stands behind them is cut off.

    Raises (all methods):
        OSError: the disk refused.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self._file = path.open("r+b" if path.is_file() else "w+b", buffering=0)
        try:
            self._file.truncate(end)
            self._file.seek(end)
            fsync_path(path.parent)
        except OSError:
            self._file.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it is on the disk when this returns."""
        line = memoryview(_line(record))
        while line:
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
