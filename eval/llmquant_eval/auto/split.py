"""One text in two parts: what candidates are calibrated on, and what they are judged by.

No document is in both. Documents are ordered by the hash of their content, equal ones once, and the
first half of the characters calibrates: the division depends on the texts and on nothing else, and
either half is a fair sample of all. Fewer than :data:`FEW` documents make no fair halves, so each
is cut in two at a blank line near its middle: the beginning calibrates, the end is held out. A chat
is a document too, and is never cut.

With a calibration source of its own all of the text is held out, without the documents that the
source has too. Both parts are written as JSON Lines into the work folder, and their hashes go into
every record that rests on them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmquant
from llmquant import write_file
from llmquant.errors import LlmquantError, SourceError
from llmquant_eval.auto.schema import Part, Split

if TYPE_CHECKING:
    from llmquant import Chat, Documents

FEW = 20
"""Documents below which each is cut in two."""

_BLANK = re.compile(r"\n[^\S\n]*\n\s*")


def make_split(sources: Sequence[str], calibration: str | None, folder: Path) -> Split:
    """Divide the text and write the parts into ``folder``.

    Raises:
        SourceError: a source that cannot be read or has too little text; chats beside plain text.
    """
    rows = [row for source in sources for row in _rows(source)]
    where = ", ".join(sources)
    chats = sum(not isinstance(row, str) for row in rows)
    if 0 < chats < len(rows):
        raise SourceError(
            f"--data {where}: {chats} of {len(rows)} documents are chats, the others plain text; give one kind"
        )
    if calibration is None:
        first, second, how = _halves(rows, where)
        part = _written(first, folder / "calibration.jsonl")
        shared = 0
    else:
        known = llmquant.read_documents(calibration)
        taken = {_hash(row) for row in known.rows}
        second = [row for row in dict.fromkeys(rows) if _hash(row) not in taken]
        shared = len(set(rows)) - len(second)
        how = "calibration from a source of its own; all of --data is held out"
        part = _part(known, calibration)
        if not second:
            raise SourceError(
                f"--data {where}: every document is in --calibration {calibration} too; give other text"
            )
    heldout = _written(second, folder / "heldout.jsonl")
    return Split(how=how, chats=chats > 0, calibration=part, heldout=heldout, shared=shared)


def check_disjoint(split: Split) -> None:
    """The two parts as they lie on the disk share no document.

    Raises:
        LlmquantError: they do, or were changed since.
    """
    calibration, heldout = (
        llmquant.read_documents(part.source) for part in (split.calibration, split.heldout)
    )
    for part, found in ((split.calibration, calibration), (split.heldout, heldout)):
        if found.sha256 != part.rows_sha256:
            raise LlmquantError(
                f"{part.source} was changed during the search; run the same command again"
            )
    both = {_hash(r) for r in calibration.rows} & {_hash(r) for r in heldout.rows}
    if both:
        raise LlmquantError(
            f"{len(both)} documents are in the calibration and in the held-out text; they would make the measured loss too small"
        )


def _rows(source: str) -> list[str | Chat]:
    """The rows of a source that hold anything."""
    rows = llmquant.read_documents(source).rows
    return [r for r in rows if (r.strip() if isinstance(r, str) else not r.empty)]


def _halves(
    rows: Sequence[str | Chat], where: str
) -> tuple[list[str | Chat], list[str | Chat], str]:
    texts = [row for row in rows if isinstance(row, str)]
    first: list[str | Chat]
    second: list[str | Chat]
    distinct = sorted(dict.fromkeys(rows), key=_hash)
    if texts and len(distinct) < FEW:
        pairs = [_cut(text) for text in dict.fromkeys(texts)]
        first = [start for start, _ in pairs if start.strip()]
        second = [end for _, end in pairs if end.strip()]
        overlap = set(first) & set(second)
        second = [row for row in second if row not in overlap]
        how = "each document was cut at a blank line near its middle: the beginning calibrates, the end is held out"
    else:
        half, count, done = sum(map(len, distinct)) / 2, 0, 0
        while done < half:
            done += len(distinct[count])
            count += 1
        first, second = distinct[:count], distinct[count:]
        how = "half of the documents calibrates, the other half is held out, by the hash of each"
    if not first or not second:
        kind = "documents without a blank line to cut at" if texts else "different chats"
        raise SourceError(
            f"--data {where} cannot be divided: it has {len(distinct)} {kind}; "
            "give more text, or name the calibration text with --calibration"
        )
    return first, second, how


def _cut(text: str) -> tuple[str, str]:
    """At the blank line that is nearest to the middle; all of it first where there is none."""
    breaks = [(m.start(), m.end()) for m in _BLANK.finditer(text.strip())]
    if not breaks:
        return text, ""
    middle = len(text.strip()) / 2
    start, end = min(breaks, key=lambda at: abs(at[0] - middle))
    return text.strip()[:start], text.strip()[end:]


def _hash(row: Any) -> str:
    plain = row if isinstance(row, str) else json.dumps(row.as_json(), ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _written(rows: Sequence[str | Chat], path: Path) -> Part:
    """The rows as a file; left alone where it has them already."""
    text = "".join(json.dumps(_line(row), ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    field = "text" if isinstance(rows[0], str) else "messages"
    source = f"jsonl:{path}#{field}"
    return _part(llmquant.read_documents(source), source)


def _line(row: str | Chat) -> dict[str, Any]:
    if isinstance(row, str):
        return {"text": row}
    return {"messages": row.plain()} | ({"tools": json.loads(row.tools)} if row.tools else {})


def _part(documents: Documents, source: str) -> Part:
    return Part(
        source=source,
        documents=len(documents.rows),
        characters=sum(len(row) for row in documents.rows),
        rows_sha256=documents.sha256,
    )
