"""The rows of a file that one of the package's own tasks reads: checked before a weight is read.

lm-eval takes what it is given: a label of -1 or a place that is a text makes an item that no model
gets right, a missing question is asked as ``None``, and a label that is none ends the run in a
Python error. So each row must be what its task says it is; an error names the line. What else
stands in a row is left out: data sets guess a column's type, and a column of dates is no text then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmquant.errors import SourceError, UsageError
from llmquant_eval.texts.json_lines import read_rows

Row = Mapping[str, Any]


def local_rows(task: str, file: Path) -> list[dict[str, Any]]:
    """The rows of ``file``, with what one of the tasks in ``local`` asks for.

    Raises:
        SourceError: there is none, or the file cannot be read.
        UsageError: a row that the task cannot ask or score; names the line.
    """
    check, columns = _TASKS[task]
    rows = []
    for line, row in read_rows(file):
        wrong = check(row)
        if wrong is not None:
            raise UsageError(f"{file}, line {line}: {wrong}; {task} cannot use it")
        rows.append({column: _used(row[column]) for column in columns})
    if not rows:
        raise SourceError(f"{file} is empty; give a JSON Lines file with an item on each line")
    return rows


def _arc(row: Row) -> str | None:
    choices = row.get("choices")
    if not isinstance(choices, Mapping):
        return "choices is no object with text and label"
    labels = choices.get("label")
    if (wrong := _no_text(row, "question") or _no_choices(choices, "text")) is not None:
        return wrong
    if not isinstance(labels, list) or len(labels) != len(choices["text"]):
        return "choices has not one label for each text"
    if labels.count(row.get("answerKey")) != 1:
        return "answerKey is not one of the labels"
    return None


def _piqa(row: Row) -> str | None:
    if wrong := next(filter(None, (_no_text(row, k) for k in ("goal", "sol1", "sol2"))), None):
        return wrong
    return _no_place(row, "label", 2)


def _lambada(row: Row) -> str | None:
    if (wrong := _no_text(row, "text")) is not None:
        return wrong
    text: str = row["text"]
    if text != text.rstrip():
        return "text ends in white space, not in the word to be guessed"
    return None if " " in text.lstrip() else "text is one word, with nothing to guess it from"


def _choice(row: Row) -> str | None:
    wrong = _no_text(row, "question") or _no_choices(row, "choices")
    return wrong if wrong is not None else _no_place(row, "answer", len(row["choices"]))


_TASKS: Mapping[str, tuple[Callable[[Row], str | None], tuple[str, ...]]] = {
    "arc_easy_local": (_arc, ("question", "choices", "answerKey")),
    "choice_local": (_choice, ("question", "choices", "answer")),
    "lambada_local": (_lambada, ("text",)),
    "piqa_local": (_piqa, ("goal", "sol1", "sol2", "label")),
}


def _used(value: Any) -> Any:
    """ARC's choices are the only object."""
    return {k: value[k] for k in ("text", "label")} if isinstance(value, Mapping) else value


def _no_text(row: Row, key: str) -> str | None:
    value = row.get(key)
    return None if isinstance(value, str) and value.strip() else f"{key} is no text"


def _no_choices(row: Row, key: str) -> str | None:
    value = row.get(key)
    texts = isinstance(value, list) and all(isinstance(t, str) and t for t in value)
    return None if texts and len(row[key]) > 1 else f"{key} is no list of two texts or more"


def _no_place(row: Row, key: str, places: int) -> str | None:
    value = row.get(key)
    if type(value) is int and 0 <= value < places:
        return None
    return f"{key} is not the place of the right one, an integer from 0 to {places - 1}"
