"""A JSON Lines file of the user's, read line by line, with whatever byte-order mark, line ends and
blank lines it has. An error names the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError, UsageError

LONGEST = 4_000_000
"""Bytes of a line: a prompt of a million tokens."""


def read_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSON Lines file, each with its line.

    Raises:
        SourceError: the file cannot be read.
        UsageError: a line that is no JSON object; names it.
    """
    for line, raw in _lines(path):
        where = f"{path}, line {line}"
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            row = json.loads(text, parse_constant=_no_number) if text else None
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


def _no_number(name: str) -> Any:
    """Python reads and writes these, and JSON has none: what pandas says where nothing is."""
    raise ValueError(f"{name} is no JSON; write null where there is no value")


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
