"""The file of the user's prompts. An error names the line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import SourceError, UsageError
from llmquant_eval.texts.json_lines import read_rows
from llmquant_eval.validate.examples import KEYS, Example, example_of


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
    for line, row in read_rows(path):
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
