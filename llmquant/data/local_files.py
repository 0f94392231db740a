"""Records of a local file, exactly as its bytes have them: ``file:``, ``jsonl:`` and ``json:``
sources.

Files are read as bytes, because text mode would turn a carriage return into a line end, and
``splitlines`` would end a line at U+2028, which JSON allows inside a string.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from llmquant.errors import SourceError

MAX_BYTES = 1 << 30
"""Text beyond this is refused: it would not fit the memory, and no calibration or evaluation needs
it."""
_BOM = b"\xef\xbb\xbf"


def file_records(path: Path) -> Iterator[object]:
    """The whole file, as one text.

    Raises:
        SourceError: unreadable, too large or not UTF-8 (so do the other two).
    """
    yield _decode(_bytes(path), str(path))


def jsonl_records(path: Path) -> Iterator[object]:
    """One JSON value a line; blank lines are no records.

    Raises:
        SourceError: a line that does not parse; names file and line.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                data = line.removeprefix(_BOM) if number == 1 else line
                if data.strip():
                    yield _parse(data, f"{path}:{number}")
    except OSError as e:
        raise _unreadable(path, e) from e


def json_records(path: Path) -> Iterator[object]:
    """The items of one JSON list.

    Raises:
        SourceError: it does not parse, or is not a list.
    """
    data = _parse(_bytes(path), str(path))
    if not isinstance(data, list):
        raise SourceError(
            f"{path} holds a JSON {type(data).__name__}, not a list; use jsonl: for one object a line"
        )
    yield from data


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(
                f"{path} has more than {MAX_BYTES / 2**30:.3g} GiB; cut it, or use jsonl: with fewer lines"
            )
        return path.read_bytes().removeprefix(_BOM)
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path} cannot be read: {error.strerror or error}; check the path")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise SourceError(
            f"{where} is not UTF-8 at byte {e.start}; convert it, or name a text file"
        ) from e


def _parse(data: bytes, where: str) -> object:
    try:
        return json.loads(_decode(data, where))
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{where} is not JSON: {e}; correct or delete it") from e
