"""Records of a local file, exactly as its bytes have them: ``file:``, ``jsonl:``, ``json:``,
``csv:`` and ``parquet:`` sources.

Files are read as bytes, because text mode would turn a carriage return into a line end, and
``splitlines`` would end a line at U+2028, which JSON allows inside a string.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path

from llmquant.errors import SourceError

MAX_BYTES = 1 << 30
"""Text beyond this is refused: it would not fit the memory, and no calibration or evaluation needs
it."""
_BOM = b"\xef\xbb\xbf"


def file_records(path: Path) -> Iterator[object]:
    """The whole file, as one text.

    Raises:
        SourceError: unreadable, too large or not UTF-8 (so do the others).
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


def csv_records(path: Path) -> Iterator[object]:
    """One mapping a row, columns by the first line; every value is a text.

    Raises:
        SourceError: a column without a name or with that of another, a row with more values than
            columns, or a quotation that does not end; names file and line.
    """
    lines = io.StringIO(_decode(_bytes(path), str(path)), newline="")
    csv.field_size_limit(MAX_BYTES)
    rows = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        columns = next(rows, [])
        if len(set(columns)) < len(columns) or not all(columns):
            raise SourceError(f"{path}: its first line must name every column, each once")
        for row in rows:
            if len(row) > len(columns):
                raise SourceError(
                    f"{path}:{rows.line_num} has {len(row)} values for {len(columns)} columns; correct it, or read "
                    f"the file as plain text: file:{path}"
                )
            if row:
                yield dict(zip_longest(columns, row))
    except csv.Error as e:
        raise SourceError(f"{path}:{rows.line_num} is not CSV: {e}; correct it") from e


def parquet_records(path: Path) -> Iterator[object]:
    """One mapping a row.

    Raises:
        SourceError: it does not parse.
    """
    import pyarrow as pa  # here, because it takes half a second to import
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            for batch in parquet.ParquetFile(file).iter_batches(1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise SourceError(
            f"{path} cannot be read as Parquet: {str(e).splitlines()[0]}; check the file"
        ) from e
    except OSError as e:
        raise _unreadable(path, e) from e


READERS: Mapping[str, Callable[[Path], Iterator[object]]] = {
    "file": file_records,
    "jsonl": jsonl_records,
    "json": json_records,
    "csv": csv_records,
    "parquet": parquet_records,
}
"""By the kind of a source."""


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
