"""One text in two parts: what candidates are calibrated on, and what they are judged by.

No document is in both. Documents are ordered by the hash of their content, equal ones once, and the
first half of the characters calibrates: the division depends on the texts and on nothing else, and
either half is a fair sample of all. Fewer than :data:`FEW` documents make no fair halves, so each
is cut in two at a blank line near its middle: the beginning calibrates, the end is held out.

With a calibration source of its own all of the text is held out, without the documents that the
source has too. Both parts are written as JSON Lines into the work folder, and their hashes go into
every record that rests on them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llmquant
from llmquant.errors import LlmquantError, SourceError
from llmquant_eval.auto.schema import Part, Split
from llmquant_eval.report.files import write_file

if TYPE_CHECKING:
    from llmquant import Documents

FEW = 20
"""Documents below which each is cut in two."""

_BLANK = re.compile(r"\n[^\S\n]*\n\s*")


def make_split(sources: Sequence[str], calibration: str | None, folder: Path) -> Split:
    """Divide the text and write the parts into ``folder``.

    Raises:
        SourceError: a source that cannot be read, is a chat or has too little text.
    """
    rows = [row for source in sources for row in _texts(source)]
    where = ", ".join(sources)
    if calibration is None:
        first, second, how = _halves(rows, where)
        part = _written(first, folder / "calibration.jsonl")
        shared = 0
    else:
        known = llmquant.read_documents(calibration)
        taken = {_hash(row) for row in known.rows if isinstance(row, str)}
        second = [row for row in dict.fromkeys(rows) if _hash(row) not in taken]
        shared = len(set(rows)) - len(second)
        how = "calibration from a source of its own; all of --data is held out"
        part = _part(known, calibration)
        if not second:
            raise SourceError(
                f"--data {where}: every document is in --calibration {calibration} too; give other text"
            )
    heldout = _written(second, folder / "heldout.jsonl")
    return Split(how=how, calibration=part, heldout=heldout, shared=shared)


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


def _texts(source: str) -> list[str]:
    """The rows of a source that hold text."""
    documents = llmquant.read_documents(source)
    documents.text()  # refuses chats, which have no perplexity of their own
    return [row for row in documents.rows if isinstance(row, str) and row.strip()]


def _halves(rows: Sequence[str], where: str) -> tuple[list[str], list[str], str]:
    distinct = sorted(dict.fromkeys(rows), key=_hash)
    if len(distinct) < FEW:
        pairs = [_cut(row) for row in dict.fromkeys(rows)]
        first, second = ([p[side] for p in pairs if p[side].strip()] for side in (0, 1))
        overlap = set(first) & set(second)
        second = [row for row in second if row not in overlap]
        how = "each document was cut at a blank line near its middle: the beginning calibrates, the end is held out"
    else:
        half, first, done = sum(map(len, distinct)) / 2, [], 0
        while done < half:
            first.append(distinct[len(first)])
            done += len(first[-1])
        second = distinct[len(first) :]
        how = "half of the documents calibrates, the other half is held out, by the hash of each"
    if not first or not second:
        raise SourceError(
            f"--data {where} cannot be divided: it has {len(distinct)} documents without a blank line to cut at; "
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


def _written(rows: Iterable[str], path: Path) -> Part:
    """The rows as a file; left alone where it has them already."""
    text = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    source = f"jsonl:{path}#text"
    return _part(llmquant.read_documents(source), source)


def _part(documents: Documents, source: str) -> Part:
    return Part(
        source=source,
        documents=len(documents.rows),
        characters=sum(len(row) for row in documents.rows),
        rows_sha256=documents.sha256,
    )
