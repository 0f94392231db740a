"""What a row of the leaderboard shows: the same columns, digits and commands in Markdown, on the
page and in the app.

Each cell is its text and, where it is a number, the bare value that a page sorts by. Columns
without a single value in a ranking are left out, so a ranking whose speeds were not measured has no
empty columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmquant_eval.leaderboard.board import Board, Row, loss, printable
from llmquant_eval.report.results import Metric
from llmquant_eval.report.table import ABSENT, size, speed, with_error

_TITLES = {
    "perplexity_ratio": "ratio",
    "word_perplexity_ratio": "ratio",
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
    "byte_perplexity": "byte perplexity",
    "bits_per_byte": "bits/byte",
    "kl_mean": "KL nats",
    "kl_p99": "KL p99",
    "top1_agreement": "top-1 %",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """``text`` with ``error`` (``±…``, or empty); ``value`` None sorts last."""

    text: str
    error: str = ""
    value: float | None = None

    @property
    def both(self) -> str:
        return f"{self.text} {self.error}".strip()


@dataclass(frozen=True, slots=True)
class Column:
    """A title and the cell of each row. ``more_is_better`` says which way a first click sorts."""

    title: str
    cell: Callable[[Row], Cell]
    more_is_better: bool = False


def columns(board: Board) -> list[Column]:
    """The columns of a ranking that have something in them: what orders it first, then the other
    losses, then costs."""
    wanted = [
        *(_task_columns(board) if board.is_task else _metric_columns(board)),
        *_cost_columns(),
    ]
    return [c for c in wanted if any(c.cell(row).value is not None for row in board.rows)]


def _metric_columns(board: Board) -> list[Column]:
    """Those that were measured; what the reference has by definition alone makes no column."""
    measured = {name for row in board.rows for name in row.metrics}

    def column(name: str, title: str) -> Column:
        scale = 100.0 if name == "top1_agreement" else 1.0
        return Column(
            title, lambda row: metric_cell(loss(row, name), scale), name == "top1_agreement"
        )

    return [column(name, title) for name, title in _TITLES.items() if name in measured]


def metric_cell(metric: Metric | None, scale: float = 1.0) -> Cell:
    """A metric with its error, or a dash."""
    if metric is None:
        return Cell(ABSENT)
    return Cell(*with_error(metric.value, metric.standard_error, scale), metric.value * scale)


def _task_columns(board: Board) -> list[Column]:
    names = dict.fromkeys(
        name for row in board.rows if row.task is not None for name in row.task.metrics
    )
    return [column for name in names for column in (_task_column(name), _flips_column(name))]


def _task_column(name: str) -> Column:
    return Column(name, lambda row: _task_cell(row, name), more_is_better=True)


def _flips_column(name: str) -> Column:
    return Column(f"{name}: lost, gained", lambda row: _flips(row, name))


def _task_cell(row: Row, name: str) -> Cell:
    metric = None if row.task is None else row.task.metrics.get(name)
    return (
        Cell(ABSENT)
        if metric is None
        else Cell(*with_error(metric.value, metric.standard_error), metric.value)
    )


def _flips(row: Row, name: str) -> Cell:
    paired = None if row.task is None else row.task.paired.get(name)
    if paired is None:
        return Cell(ABSENT)
    return Cell(
        f"−{paired.lost} +{paired.gained}",
        f"p={paired.p_value:.2g}",
        float(paired.lost - paired.gained),
    )


def _cost_columns() -> list[Column]:
    def number(value: float | None, text: Callable[[float], str]) -> Cell:
        return Cell(ABSENT) if value is None else Cell(text(value), value=float(value))

    return [
        Column("size", lambda r: number(r.result.bytes_on_disk, size)),
        Column("bits/w", lambda r: number(r.result.bits_per_weight, "{:.4g}".format)),
        Column("decode tok/s", lambda r: number(r.decode_speed, speed), True),
        Column(
            "prefill tok/s", lambda r: number(_cost(r, "prefill_tokens_per_second"), speed), True
        ),
        Column("load s", lambda r: number(_cost(r, "load_seconds"), "{:.2f}".format)),
        Column(
            "peak memory",
            lambda r: number(_cost(r, "device_peak_bytes") or _cost(r, "peak_memory_bytes"), size),
        ),
    ]


def _cost(row: Row, name: str) -> float | None:
    return None if row.result.cost is None else getattr(row.result.cost, name)


def rank_text(row: Row) -> str:
    """The rank, ``base`` for the reference, a dash for a row without the ordering metric or of a
    partial run."""
    if row.is_reference:
        return "base"
    return ABSENT if row.rank is None else str(row.rank)


def repeat_commands(row: Row) -> list[str]:
    """The command that repeats the row, one shell command a line."""
    return [printable(step) for step in row.report.command.split(" && ")]


def _floor_means(board: Board) -> str:
    """In float32 a smaller KL is still one that was measured."""
    if board.key.dtype == "float32":
        return "A smaller KL is less than what computing in that dtype changes."
    return "Less is rounding."


def notes(board: Board) -> list[str]:
    """What the numbers of a ranking mean, one sentence each."""
    key, lines = board.key, []
    if board.is_task:
        lines.append(
            f"{key.detail}; {board.scope}. Lost and gained: items that the reference had right, or wrong, and the "
            "model not; p by McNemar's exact test."
        )
        return lines
    tokens = f", {key.scored:,} tokens scored" if key.scored else ""
    ids = f" Token ids sha256 {key.ids[:12]}…." if key.ids else ""
    lines.append(
        f"{board.scope[0].upper()}{board.scope[1:]}{tokens}, {key.dtype}. Text sha256 {key.text[:12]}….{ids} ± is one "
        "standard error; ratios are paired with the reference, window by window."
    )
    texts = [row.report.text for row in board.rows if row.report.text is not None]
    lost = dict.fromkeys(filter(None, (text.lost() for text in texts)))
    lines += [f"Not all of the text: {printable(part)}." for part in lost]
    if board.floor is not None:
        kl = metric_cell(board.floor.kl_mean).both
        lines.append(
            f"Noise floor (the reference against itself in {board.floor.other_dtype}): KL {kl}. {_floor_means(board)}"
        )
    machines = {row.machine for row in board.rows if row.decode_speed is not None}
    if len(machines) > 1:
        lines.append(
            "Speeds were measured on different machines and are comparable only within one; see each row."
        )
    elif not machines:
        lines.append("Speed and memory were not measured in these runs.")
    excluded = [
        f"{row.name}: {row.result.excluded_tokens}"
        for row in board.rows
        if row.result.excluded_tokens
    ]
    if excluded:
        lines.append(
            f"Tokens left out of KL and top-1 because their divergence is not finite: {', '.join(excluded)}."
        )
    return lines
