"""From a folder of Reports to rankings, and to no ranking where there can be none.

Numbers are ranked together only if they measure the same thing. What must be equal is a
:class:`BoardKey`: the protocol, the text by its sha256, how many windows of it were scored, the
dtype, the reference by its weights, the tokenizer and the token ids that it made of the text, with
a BOS or a chat template as it may be (both may differ for ``ppl/word`` over the whole text: that
does not depend on them). A report of before, which does not say its ids, stands with those that do
where these agree. For a task it is the very items, the shots and lm-eval's
version. Results that differ in any of these stand in rankings of their own; nothing averages over
them, no option mixes them.

Within a ranking the order is by loss: the ratio of perplexity to the reference's where there is a
reference, else perplexity. A task is ordered by its first metric, more is better. The reference has
no rank: it is what the others are compared with. Where only a part of the text or of the items was
scored nothing has a rank and no point is a front: rows stand by name.

The same model measured again (same weights, label and ranking) counts once, by its newest report. A
kernel that rounds activations gives other numbers, so it stands in the row's name.
Two models that share a label are distinguished by their weights' hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import llmquant
from llmquant.errors import UsageError
from llmquant_eval.leaderboard.board import Board, BoardKey, Row, StoredReport, printable
from llmquant_eval.report.results import Metric, ModelResult
from llmquant_eval.report.schema import ProtocolPass, Report, read_report

_Entry = tuple[Row, str, int]  # of a ranking: the row, its source, how much there is of it


def load_reports(folder: Path) -> list[StoredReport]:
    """Every ``*.json`` of a folder, by name.

    Raises:
        UsageError: not a folder, no report in it, or a file that is not a report of this version.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder of reports; `llmquant eval … --output {folder}/NAME.json` writes one"
        )
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise UsageError(
            f"{folder} has no *.json report in it; `llmquant eval … --output {folder}/NAME.json` writes one"
        )
    return [StoredReport(path, read_report(path)) for path in paths]


def make_boards(reports: Iterable[StoredReport]) -> list[Board]:
    """Group and rank; rankings in the order of their protocol's name, then text, the fullest first.

    Raises:
        UsageError: a report that measured nothing.
    """
    groups: dict[BoardKey, list[_Entry]] = {}
    for stored in reports:
        rows = [*_text_rows(stored), *_task_rows(stored)]
        if not rows:
            raise UsageError(
                f"{stored.path} has neither a protocol nor a task in it, so there is nothing to rank; remove the file"
            )
        for key, row, source, available in rows:
            groups.setdefault(key, []).append((row, source, available))
    boards = [_board(key, entries) for key, entries in _joined(groups).items()]
    return sorted(
        boards,
        key=lambda b: (
            b.is_task,
            b.key.protocol,
            b.source,
            -b.key.windows,
            b.key.dtype,
            b.key.text,
        ),
    )


def _joined(groups: Mapping[BoardKey, list[_Entry]]) -> dict[BoardKey, list[_Entry]]:
    """One ranking for all token ids where the reports say only one kind, or none."""
    kinds = Counter(replace(key, ids=None) for key in groups if key.ids is not None)
    joined: dict[BoardKey, list[_Entry]] = {}
    for key, entries in groups.items():
        either = replace(key, ids=None)
        joined.setdefault(key if kinds[either] > 1 else either, []).extend(entries)
    return joined


def _text_rows(stored: StoredReport) -> Iterable[tuple[BoardKey, Row, str, int]]:
    report = stored.report
    unanswered = {(gap.label, gap.protocol) for gap in report.missing}
    for part in report.passes:
        assert report.text is not None  # there is no pass without a text
        base = _reference_sha(report)
        for result in report.models:
            free = part.perplexity.startswith("ppl/word") and part.windows == part.windows_available
            scored, windows, tokenizer = (
                (0, 0, None) if free else (part.scored, part.windows, result.tokenizer_sha256)
            )
            key = BoardKey(
                _protocols(part),
                report.text.sha256,
                scored,
                windows,
                report.settings.dtype,
                base,
                tokenizer,
                "",
                None if free else part.ids_sha256,
            )
            metrics = _metrics_of(result, part)
            if (result.label, part.perplexity) in unanswered:
                continue  # a server that gave out before the end
            row = Row(_name(report, result), result, report, stored.path, metrics)
            yield key, row, printable(report.text.source), part.windows_available


def _protocols(part: ProtocolPass) -> str:
    return " · ".join(filter(None, (part.perplexity, part.divergence)))


def _metrics_of(result: ModelResult, part: ProtocolPass) -> dict[str, Metric]:
    """The metrics of one pass by plain name (a later pass's are stored as ``name@protocol``)."""
    protocols = (part.perplexity, part.divergence)
    return {
        name.partition("@")[0]: m for name, m in result.metrics.items() if m.protocol in protocols
    }


def _task_rows(stored: StoredReport) -> Iterable[tuple[BoardKey, Row, str, int]]:
    report = stored.report
    for result in report.models:
        for task in result.tasks:
            key = BoardKey(
                task.protocol,
                task.items_sha256,
                0,
                task.items,
                report.settings.dtype,
                _reference_sha(report),
                None,
                f"{task.few_shot}-shot, lm-eval {task.lm_eval}, task version {task.version}",
            )
            row = Row(_name(report, result), result, report, stored.path, {}, task)
            yield key, row, printable(task.task), task.items_available


def _name(report: Report, result: ModelResult) -> str:
    """The label, and the kernel where that rounds activations, which ``auto`` never does: it makes
    another model of it."""
    asked = report.settings.kernel
    if asked in result.kernels and llmquant.rounds_inputs(asked):
        return printable(f"{result.label}, kernel {asked}")
    return printable(result.label)


def _reference_sha(report: Report) -> str | None:
    """sha256 of the reference's weights; None where there is none."""
    return None if report.reference is None else report.model(report.reference).weights_sha256


def _board(key: BoardKey, entries: Sequence[_Entry]) -> Board:
    newest: dict[tuple[str, str], Row] = {}
    for row, _, _ in entries:
        identity = (
            ("", row.result.weights_sha256 or row.name) if row.is_reference else _identity(row)
        )
        if identity not in newest or _counts(row) >= _counts(newest[identity]):
            newest[identity] = row
    rows = _with_distinct_names(list(newest.values()))
    last = max(entries, key=lambda e: e[0].report.created)
    # From all entries: where the same models were measured again without a floor, the floor that
    # was measured still holds.
    floors = [row.report for row, _, _ in entries if _floor_fits(row, key)]
    floor = max(floors, key=lambda r: r.created).noise_floor if floors else None
    board = Board(key, last[1], max(available for _, _, available in entries), tuple(rows), floor)
    return replace(board, rows=tuple(_ranked(board)))


def _counts(row: Row) -> tuple[bool, datetime]:
    """Of two rows of one model the larger counts: the newer, but the reference's losses are the
    same in every report, so the newest that has its speed."""
    return row.is_reference and row.result.cost is not None, row.report.created


def _identity(row: Row) -> tuple[str, str]:
    return row.name, row.result.weights_sha256 or row.result.source


def _floor_fits(row: Row, key: BoardKey) -> bool:
    """The noise floor was measured on the report's first protocol only."""
    report = row.report
    return (
        report.noise_floor is not None
        and bool(report.passes)
        and _protocols(report.passes[0]) == key.protocol
    )


def _with_distinct_names(rows: list[Row]) -> list[Row]:
    """Rows of the same label with the beginning of their weights' hash."""
    seen = Counter(row.name for row in rows)
    return [
        row
        if seen[row.name] == 1
        else replace(
            row, name=f"{row.name} ({(row.result.weights_sha256 or row.result.source)[:8]})"
        )
        for row in rows
    ]


def _ranked(board: Board) -> list[Row]:
    """The reference, then by loss; a result without the ordering metric comes last, unranked. A
    partial run: by name."""
    references = [row for row in board.rows if row.is_reference]
    if board.partial:
        return references + sorted(
            (row for row in board.rows if not row.is_reference), key=lambda row: row.name
        )
    others = sorted(
        (row for row in board.rows if not row.is_reference),
        key=lambda row: (order(board, row), row.name),
    )
    ranked = [
        replace(row, rank=i + 1 if order(board, row) < float("inf") else None)
        for i, row in enumerate(others)
    ]
    return references + ranked


def order(board: Board, row: Row) -> float:
    """What rows are sorted by, least first; infinite where the row lacks it."""
    if row.task is not None:
        first = next(iter(row.task.metrics.values()), None)
        return float("inf") if first is None else -first.value
    metric = row.metrics.get(board.loss_name or "")
    return float("inf") if metric is None else metric.value
