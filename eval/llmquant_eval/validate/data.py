"""The file of the user's data, read line by line: JSON Lines with whatever byte-order mark, line
ends and blank lines it has. An error names the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError, UsageError
from llmquant_eval.validate.examples import KEYS, Example, example_of

LONGEST = 4_000_000
"""Bytes of a line: a prompt of a million tokens."""


@dataclass(frozen=True, slots=True)
class Data:
    """The examples.

    Attributes:
        sha256: of the rows that are used, whatever their line ends; two results with the same one
            are about the same items.
        unknown: keys that no metric knows.
        system: the message that prompts without one were given, if there are such.
    """

    source: str
    examples: tuple[Example, ...]
    sha256: str
    unknown: tuple[str, ...]
    system: str | None = None


def read_data(source: str, limit: int | None, system: str | None) -> Data:
    """The first ``limit`` examples.

    Raises:
        SourceError: no such file, or nothing in it.
        UsageError: a line that cannot be right; names it.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves no item; give 1 or more")
    path = Path(source)
    if not path.is_file():
        raise SourceError(f"--data {source} is not a file; give a JSON Lines file")
    examples: list[Example] = []
    lines: dict[str, int] = {}
    digest, unknown, given = hashlib.sha256(), dict[str, None](), False
    for line, row in _rows(path):
        where = f"{source}, line {line}"
        example = example_of(row, line, where, system)
        if (first := lines.setdefault(example.id, line)) != line:
            raise UsageError(f"{where}: id {example.id!r} is that of line {first}; ids are unique")
        examples.append(example)
        given = given or (system is not None and example != example_of(row, line, where, None))
        unknown |= dict.fromkeys(key for key in row if key not in KEYS)
        digest.update(json.dumps([example.id, row], sort_keys=True).encode() + b"\n")
        if len(examples) == limit:
            break
    if not examples:
        raise SourceError(f"{source} is empty; give a JSON Lines file with a prompt on each line")
    return Data(
        source, tuple(examples), digest.hexdigest(), tuple(unknown), system if given else None
    )


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, raw in _lines(path):
        where = f"{path}, line {line}"
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            raise UsageError(
                f"{where} is not Unicode: it has a \\ud… escape without its other half; remove it"
            ) from e
        except UnicodeDecodeError as e:
            raise UsageError(f"{where} is not UTF-8 text: {e}; save the file as UTF-8") from e
        except (ValueError, RecursionError) as e:
            raise UsageError(
                f"{where} is not JSON ({e}); the file must be JSON Lines: one object on each line"
            ) from e
        if not text:
            continue
        if not isinstance(row, dict):
            kind = "a list" if isinstance(row, list) else "no object"
            raise UsageError(
                f"{where} is {kind}; the file must be JSON Lines: one object on each line"
            )
        yield line, row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines by number; one is never held whole that is too long."""
    try:
        with path.open("rb") as f:
            number = 0
            while raw := f.readline(LONGEST + 1):
                number += 1
                if len(raw) > LONGEST:
                    raise UsageError(
                        f"{path}, line {number} is longer than {LONGEST // 10**6} MB; "
                        "is it one object on each line? Shorten or remove that line"
                    )
                yield number, raw
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e}") from e
