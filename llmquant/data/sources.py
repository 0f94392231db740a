"""One door for every text of the project: what a model is calibrated on, and what it is evaluated
on.

A source is one string:

    hf:NAME[:CONFIG]:SPLIT[:FIELD]   a dataset of the hub, or a local folder
    file:PATH                        one UTF-8 file, which is one document
    jsonl:PATH[#FIELD]               one JSON object (or string) a line
    json:PATH[#FIELD]                one JSON list of strings or objects
    csv:PATH[#FIELD]                 a table whose first line names its columns; tabs in a .tsv
    parquet:PATH[#FIELD]             a table
    PATH                             an existing file, by its suffix; others as ``file:``

FIELD, where it is left out, is ``text`` if the records have it, else ``messages``. A value is a
text, or a chat: a list of ``{"role", "content"}``, with a column ``tools`` beside it where tools
were offered (:mod:`llmquant.data.chats`). SPLIT may be sliced: ``train[:1000]``.

An ``hf:`` source with three parts is read by its split, for which a part is taken that starts with
train, test, validation, valid, val, dev or eval: ``hf:D:train:body`` is split and field,
``hf:D:en:train`` config and split. Where both or neither look like a split it is refused, and an
empty CONFIG settles it: ``hf:D::SPLIT:FIELD``.

Rows come through exactly: no stripping, no newline translation (a byte order mark is removed), and
empty rows are kept, because the papers' perplexity joins *all* rows of WikiText by two newlines.
What cannot be a row is dropped and counted by reason; JSON that does not parse is an error. Nothing
here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from llmquant.checkpoint.atomic import refuse_held
from llmquant.data.chats import Chat, NotAChatError, is_unicode, parse_chat
from llmquant.data.local_files import MAX_BYTES, READERS
from llmquant.errors import SourceError

GRAMMAR = (
    "hf:NAME[:CONFIG]:SPLIT[:FIELD], file:PATH, or PATH#FIELD after jsonl:, json:, csv: or parquet:"
)
DEFAULT_FIELDS = ("text", "messages")
TOOLS = "tools"
"""The column with the tools that a chat was offered."""
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)([._-][\w.-]*)?(\[.*\])?(\+.*)?")
_COLON = re.compile(r":(?![^\[]*\])")  # a colon inside train[:10] is not a separator
Kind: TypeAlias = Literal["hf", "file", "jsonl", "json", "csv", "parquet"]
_RECORDS: Mapping[str, Kind] = {k: k for k in get_args(Kind) if k not in ("hf", "file")}
_SUFFIXES: Mapping[str, Kind] = {
    **{f".{name}": kind for name, kind in _RECORDS.items()},
    ".ndjson": "jsonl",
    ".tsv": "csv",
}


Row: TypeAlias = str | Chat


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed source string. ``name`` is a path or a dataset name; ``config`` and ``split`` belong
    to ``hf``."""

    kind: Kind
    name: str
    field: str | None = None
    config: str | None = None
    split: str = ""

    def __str__(self) -> str:
        if self.kind == "hf":
            parts = [
                self.name,
                self.config or "",
                self.split,
                *([self.field] if self.field else []),
            ]
            return "hf:" + ":".join(parts)
        return f"{self.kind}:{self.name}" + (f"#{self.field}" if self.field else "")


@dataclass(frozen=True)
class Documents:
    """Texts and chats as they were read.

    ``dropped`` counts by reason the records that could not be rows; ``len(rows) + sum(dropped) ==
    rows_read``. ``duplicates`` counts the non-empty rows that equal an earlier one. ``sha256`` is
    that of the rows written as JSON Lines: each row's ``json.dumps(row, ensure_ascii=False)`` (a
    chat as a list of objects, or with its tools as one object) and a newline.
    """

    rows: tuple[Row, ...]
    source: str
    rows_read: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    sha256: str = ""

    @classmethod
    def of(
        cls, rows: Iterable[Row], source: str, dropped: Mapping[str, int] | None = None
    ) -> Documents:
        """Documents of rows at hand; counts the duplicates and hashes the content."""
        rows, dropped = tuple(rows), dict(dropped or {})
        digest = hashlib.sha256()
        for row in rows:
            plain = row if isinstance(row, str) else row.as_json()
            digest.update(json.dumps(plain, ensure_ascii=False).encode() + b"\n")
        full = [row for row in rows if not is_empty(row)]
        duplicates = len(full) - len(set(full))
        return cls(
            rows, source, len(rows) + sum(dropped.values()), dropped, duplicates, digest.hexdigest()
        )

    @property
    def empty(self) -> int:
        """Rows of nothing but white space; they are kept."""
        return sum(map(is_empty, self.rows))

    def text(self) -> str:
        """All rows joined by two newlines: the convention of the GPTQ paper, for evaluation.

        Raises:
            SourceError: a row is a chat, which is no text until a tokenizer's template has written
                it.
        """
        texts = [row for row in self.rows if isinstance(row, str)]
        if len(texts) < len(self.rows):
            raise SourceError(
                f"{self.source}: {len(self.rows) - len(texts)} of {len(self.rows)} rows are chats, not plain text; "
                "name a field of plain text"
            )
        return "\n\n".join(texts)


def is_empty(row: Row) -> bool:
    """Whether a row holds nothing but white space."""
    return not row.strip() if isinstance(row, str) else row.empty


def counted(dropped: Mapping[str, int]) -> str:
    """Counts by reason, in words; empty if nothing was dropped."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)


def parse_source(source: str) -> Source:
    """Read a source string by the grammar above; touches nothing but, for a bare path, the file's
    existence.

    Raises:
        SourceError: no such scheme or file, a missing part, or three ``hf:`` parts that can be read
            two ways.
    """
    kind, _, rest = source.partition(":")
    if kind == "hf":
        return _parse_hf(source, _COLON.split(rest))
    if (kind == "file" or kind in _RECORDS) and not rest:
        raise SourceError(f"{source!r} names no path; write {GRAMMAR}")
    if kind == "file":
        return Source("file", rest)
    if kind in _RECORDS:
        path, _, name = rest.partition("#")
        return Source(_RECORDS[kind], path, name or None)
    path, _, name = source.partition("#") if not Path(source).is_file() else (source, "", "")
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir():
        raise SourceError(
            f"{source!r} is a folder; name a split of it, hf:{path}:train, or a file in it"
        )
    if not Path(path).is_file() or (name and suffix not in _SUFFIXES):
        raise SourceError(f"{source!r} is neither an existing file nor a source; write {GRAMMAR}")
    return Source(_SUFFIXES.get(suffix, "file"), path, name or None)


def _parse_hf(source: str, parts: list[str]) -> Source:
    name, rest = parts[0], parts[1:]
    if not name or not rest or not rest[-1] or len(rest) > 3:
        raise SourceError(
            f"{source!r} does not name a dataset and a split; write hf:NAME[:CONFIG]:SPLIT[:FIELD]"
        )
    if len(rest) == 1:
        return Source("hf", name, split=rest[0])
    if len(rest) == 3:
        config, split, column = rest
        if split:
            return Source("hf", name, column, config or None, split)
        raise SourceError(f"{source!r} leaves the split empty; write hf:NAME::SPLIT:FIELD")
    first, second = (_SPLIT.fullmatch(part) is not None for part in rest)
    if not rest[0] or (second and not first):
        return Source("hf", name, config=rest[0] or None, split=rest[1])
    if first and not second:
        return Source("hf", name, rest[1], None, rest[0])
    raise SourceError(
        f"{source!r} is ambiguous: {'both' if first else 'neither'} of {rest[0]!r} and {rest[1]!r} "
        f"{'look' if first else 'looks'} like a split; write all four parts, with CONFIG empty if there is none: "
        f"hf:{name}::{rest[0]}:{rest[1]} or hf:{name}:{rest[0]}:{rest[1]}:text"
    )


def read_documents(source: str, *, limit: int | None = None) -> Documents:
    """Read a source.

    Args:
        source: a string of the grammar above.
        limit: read at most so many records.

    Raises:
        SourceError: it does not exist, does not parse, has no such field, is too large, or holds no
            row of text.
    """
    if limit is not None and limit < 1:
        raise SourceError(f"{source}: a limit of {limit} rows reads nothing; give 1 or more")
    parsed = parse_source(source)
    return _collect(islice(_records(parsed), limit), parsed)


def refuse_texts(path: Path, *sources: str | None) -> None:
    """Refuse a destination, a folder or a file, that holds a text that is read: replacing it would
    delete that.

    Args:
        sources: strings of the grammar above; None stands for no text.

    Raises:
        UsageError: it does.
        SourceError: a string that is no source.
    """
    for source in filter(None, sources):
        refuse_held(path, f"the text {source}", [Path(parse_source(source).name)])


def _records(source: Source) -> Iterator[object]:
    if source.kind == "hf":
        from llmquant.data.hub_datasets import (
            hf_records,
        )  # here, because datasets takes a second to import

        fields = (source.field,) if source.field else DEFAULT_FIELDS
        return hf_records(source.name, source.config, source.split, fields, TOOLS)
    return READERS[source.kind](Path(source.name))


def _collect(records: Iterable[object], source: Source) -> Documents:
    """Turn records into rows, counting what cannot be one."""
    column = source.field
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    seen: dict[str, None] = {}
    size = 0
    for record in records:
        if isinstance(record, dict):
            seen |= dict.fromkeys(record)
            column = column or next((name for name in DEFAULT_FIELDS if name in record), None)
        row = _row(record, column, by_name=source.field is not None)
        if isinstance(row, _Dropped):
            dropped[row.reason] += 1
            continue
        rows.append(row)
        size += len(row)
        if size > MAX_BYTES:
            rows_of_it = (
                f"{source.split.partition('[')[0]}[:10000]"
                if source.kind == "hf"
                else "a smaller file"
            )
            raise SourceError(
                f"{source} holds more than {MAX_BYTES / 2**30:.3g} GiB of text; name {rows_of_it}"
            )
    if not any(not is_empty(row) for row in rows):
        raise SourceError(
            _nothing(source, column, list(seen), dropped + Counter({"empty": len(rows)}))
        )
    if seen:
        source = Source(source.kind, source.name, column, source.config, source.split)
    return Documents.of(rows, str(source), dropped)


def _nothing(
    source: Source, column: str | None, seen: list[str], dropped: Mapping[str, int]
) -> str:
    reasons = counted(dropped) or "no records at all"
    if seen and column not in seen:
        wanted = f"field {column!r}" if column else "field 'text' or 'messages'"
        return f"{source} has no {wanted}; its fields: {', '.join(seen)}"
    return f"{source} contains no row of text: {reasons}"


@dataclass(frozen=True, slots=True)
class _Dropped:
    reason: str


def _row(record: object, column: str | None, *, by_name: bool) -> Row | _Dropped:
    """The row in a record, or why there is none. ``by_name``: the user chose the field, so a bare
    string is none."""
    value, tools = record, None
    if isinstance(record, dict):
        if column is None or column not in record:
            return _Dropped("missing field")
        value = record[column]
        tools = record.get(TOOLS) if column != TOOLS else None
    elif by_name or not isinstance(record, str):
        return _Dropped("not an object")
    if value is None:
        return _Dropped("null")
    if isinstance(value, str):
        return value if is_unicode(value) else _Dropped("not Unicode")
    if not isinstance(value, list):
        return _Dropped("neither text nor chat")
    try:
        return parse_chat(value, tools)
    except NotAChatError as e:
        return _Dropped(str(e))
