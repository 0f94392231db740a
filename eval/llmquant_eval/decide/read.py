"""Results from files: our own items, a Report of ``llmquant eval``, or what lm-eval logged.

lm-eval writes one ``samples_TASK_DATE.jsonl`` per task; a folder of them is one model's results.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmquant.errors import UsageError
from llmquant_eval.decide.results import Item, ItemResults, check_ids, validated
from llmquant_eval.report.files import labelled
from llmquant_eval.report.results import ModelResult
from llmquant_eval.report.schema import Report

_TASK = re.compile(r"samples_(.+?)_\d{4}-\d\d-\d\dT[\d.:-]+\.jsonl")
# lm-eval's metrics of which less is better: word_perplexity, but not parameter or filter.
_LOWER = re.compile(r"(\w+_)?(perplexity|bits_per_byte|brier_score|[twc]er|edit_distance|loss)")
_ACCEPTED = (
    "give results of `llmquant validate`, a report of `llmquant eval --tasks`, what lm-eval's "
    "--log_samples wrote, "
    "or scores of your own as docs/evaluation.md has them"
)


def read_results(source: str) -> ItemResults:
    """One model's results.

    Args:
        source: a file, or a folder of lm-eval's samples; ``FILE#LABEL`` chooses a model of a
            report that has several.

    Raises:
        UsageError: no such file, not one of these, an item without an id or with a score that is
            no number; names the file and the line or item.
    """
    path, label = labelled(source)
    logged = path.is_dir() or path.suffix == ".jsonl"
    text = "" if logged else _text_of(path)
    raw = None if logged else _parsed(text, f"{path} is not JSON")
    if isinstance(raw, dict) and "models" in raw:
        return _of_report(Report.from_json(text, str(path)), path, label)
    if label is not None:
        raise UsageError(f"{path} has one model's results, and #{label} chooses none; leave it out")
    if logged:
        return _logged(path)
    if isinstance(raw, dict) and raw.get("kind") == "items":
        return validated(raw, path)
    raise UsageError(f"{path} holds no results item by item; {_ACCEPTED}")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from e


def _parsed(text: str, wrong: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # thousands of digits, thousands of brackets
        raise UsageError(f"{wrong} ({e}); {_ACCEPTED}") from e


def _of_report(report: Report, path: Path, label: str | None) -> ItemResults:
    model = _chosen(report, path, label)
    items: list[Item] = []
    for task in model.tasks:
        columns = {f"{task.task}/{n}": m.correct for n, m in task.metrics.items() if m.correct}
        for i in range(max(map(len, columns.values()), default=0)):
            scores = {name: float(column[i]) for name, column in columns.items()}
            items.append(Item(id=f"{task.task}/{task.items_sha256[:12]}/{i}", scores=scores))
    if not items:
        raise UsageError(
            f"{path}: {model.label} has no task with a right and wrong per item; run `llmquant eval --tasks`"
        )
    return ItemResults(
        model=model.label,
        data=str(path),
        created=report.created,
        items=tuple(items),
        conditions={
            f"{t.task}": f"{t.few_shot}-shot, task version {t.version}" for t in model.tasks
        },
        computing=_computing(report, model),
    )


def _computing(report: Report, model: ModelResult) -> dict[str, str]:
    """A server computes as it does; of its results only lm-eval is known."""
    known = {"lm-eval": model.tasks[0].lm_eval}
    if model.weights_sha256 is None:
        return known
    settings = report.settings
    return known | {"dtype": settings.dtype, "device": settings.device, "kernel": settings.kernel}


def _chosen(report: Report, path: Path, label: str | None) -> ModelResult:
    """The model that is meant; raises UsageError if the file does not say which."""
    names = [m.label for m in report.models]
    if label is not None and label not in names:
        raise UsageError(f"{path} has no model {label!r}; it has {', '.join(names)}")
    if label is None and len(names) > 1:
        raise UsageError(
            f"{path} has {len(names)} models; say which: "
            + " or ".join(f"'{path}#{n}'" for n in names)
        )
    return report.model(label or names[0])


def _logged(path: Path) -> ItemResults:
    """Of what lm-eval logged: a file, or all in a folder."""
    files = sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path} has no samples_TASK_DATE.jsonl of lm-eval; {_ACCEPTED}")
    source, items = str(path), list[Item]()
    ignored: set[str] = set()
    for file in files:
        named = _TASK.fullmatch(file.name)
        task = named[1] if named else file.stem.removeprefix("samples_")
        for number, row in _rows(file):
            items.append(_sample(task, row, f"{file}, line {number}", ignored))
    if not items:
        raise UsageError(f"{source} is empty")
    names = {n for item in items for n in item.scores}
    lower = sorted(n for n in names if _LOWER.fullmatch(_metric_of(n)))
    notes = [f"not a number per item, left out: {', '.join(sorted(ignored))}"] if ignored else []
    results = ItemResults(
        model=source,
        data=source,
        lower_is_better=tuple(lower),
        items=tuple(items),
        notes=tuple(notes),
    )
    check_ids(results, source)
    return results


def _metric_of(name: str) -> str:
    """``acc`` of ``arc_easy/acc,none``."""
    return name.rpartition("/")[2].partition(",")[0]


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        row = _parsed(line, f"{file}, line {number} is not JSON")
        if not isinstance(row, dict) or "doc_id" not in row:
            raise UsageError(f"{file}, line {number} has no doc_id; {_ACCEPTED}")
        yield number, row


def _sample(task: str, row: dict[str, Any], where: str, ignored: set[str]) -> Item:
    """One line; metrics whose value is no number (sums for a corpus) go into ``ignored``."""
    extraction = str(row.get("filter", "none"))
    suffix = "" if extraction == "none" else f",{extraction}"
    scores: dict[str, float] = {}
    for name in row.get("metrics", ()):
        value, metric = row.get(name), f"{task}/{name}{suffix}"
        if isinstance(value, bool | int | float):
            if not math.isfinite(value):
                raise UsageError(f"{where}: {name} is {value}; run that item again")
            scores[metric] = float(value)
        elif value is None:
            raise UsageError(f"{where}: {name} is missing; run that item again")
        else:
            ignored.add(metric)
    document = row.get("doc_hash") or row["doc_id"]
    return Item(
        id=f"{task}{suffix}/{row['doc_id']}/{document}",
        scores=scores,
        prompt=_text(row.get("arguments")),
        answer=_text(row.get("filtered_resps")),
    )


def _text(value: object) -> str | None:
    """The first string somewhere in what lm-eval logged."""
    while isinstance(value, list | tuple | dict) and value:
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value if isinstance(value, str) else None
