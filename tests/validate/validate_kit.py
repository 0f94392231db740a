"""What the tests of ``llmquant validate`` share: data on disk, examples and answers as values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmquant_eval.validate.answers import Answer, Measured, Scored
from llmquant_eval.validate.examples import Example, example_of


def write_rows(path: Path, *rows: object) -> Path:
    """JSON Lines; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def example(**row: Any) -> Example:
    return example_of({"prompt": "Say something, please.", **row}, 1, "data, line 1", None)


def said(text: str, *, scored: tuple[tuple[float, int], ...] = (), **more: Any) -> Measured:
    """What was measured of an example whose answer is ``text``."""
    answer = Answer(**{"text": text, "tokens": len(text.split()), "ended": True, **more})
    return Measured(answer=answer, scored=tuple(Scored(logprob=p, tokens=n) for p, n in scored))
