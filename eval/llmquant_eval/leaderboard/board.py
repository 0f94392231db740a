"""What a ranking is made of: its key, its rows, and what each row lost.

Numbers stand in one ranking only if they measure the same thing; what must be equal is a
:class:`BoardKey`. How reports become rankings is in :mod:`llmquant_eval.leaderboard.ranking`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmquant_eval.report.results import Metric, ModelResult, TaskResult
from llmquant_eval.report.schema import NoiseFloor, Report
from llmquant_eval.report.words import counted

_LOSSES = ("perplexity_ratio", "word_perplexity_ratio", "perplexity", "word_perplexity")


@dataclass(frozen=True, slots=True)
class StoredReport:
    """A report and the file that it was read from."""

    path: Path
    report: Report


@dataclass(frozen=True, slots=True)
class BoardKey:
    """All that must be equal for two results to be ranked together. ``text`` is the sha256 of the
    text, or of a task's items; ``ids`` that of the tokens it was cut into, None where the reports
    say one kind or none.

    ``windows`` and ``scored`` tokens are 0 where they follow from the tokenizer and the tokenizer
    may differ.
    """

    protocol: str
    text: str
    scored: int
    windows: int
    dtype: str
    reference: str | None
    tokenizer: str | None
    detail: str
    ids: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One model in a ranking. ``metrics`` by plain name, those of this ranking alone; ``rank`` None
    for the reference."""

    name: str
    result: ModelResult
    report: Report
    path: Path
    metrics: dict[str, Metric]
    task: TaskResult | None = None
    rank: int | None = None

    @property
    def is_reference(self) -> bool:
        return self.result.role == "reference"

    @property
    def scheme(self) -> str:
        """The model's quantization, for people."""
        return printable(self.result.scheme)

    @property
    def decode_speed(self) -> float | None:
        """Tokens per second, or None where it was not measured."""
        return None if self.result.cost is None else self.result.cost.decode_tokens_per_second

    @property
    def machine(self) -> str:
        """What a speed depends on beside the model: two speeds are compared only if this is
        equal."""
        hardware, cost = self.report.hardware, self.result.cost
        threads = hardware.threads if cost is None else cost.threads
        where = hardware.accelerator or f"{hardware.processor}, {counted(threads, 'thread')}"
        return f"{where}, {self.report.settings.dtype}"


@dataclass(frozen=True, slots=True, eq=False)
class Board:
    """One ranking: the reference first, then rows by loss. ``available`` windows or items of which
    the key's were scored."""

    key: BoardKey
    source: str
    available: int
    rows: tuple[Row, ...]
    floor: NoiseFloor | None = None

    @property
    def is_task(self) -> bool:
        return self.key.protocol.startswith("task/")

    @property
    def partial(self) -> bool:
        return 0 < self.key.windows < self.available

    @property
    def title(self) -> str:
        """Protocol and text, as a heading."""
        return f"{self.key.protocol} on {self.source}" if not self.is_task else self.key.protocol

    @property
    def scope(self) -> str:
        """How much was scored, in words."""
        unit = "items" if self.is_task else "windows"
        if not self.partial:
            return f"all {self.available:,} {unit}" if self.key.windows else f"all {unit}"
        return f"partial, not ranked: the first {self.key.windows:,} of {self.available:,} {unit}"

    @property
    def loss_name(self) -> str | None:
        """The metric that orders the rows, or None for a task."""
        candidates = [row for row in self.rows if not row.is_reference]
        measured = {name for row in candidates for name in row.metrics}
        measured = measured or {name for row in self.rows for name in row.metrics}
        return next((name for name in _LOSSES if name in measured), None)


def printable(text: str) -> str:
    """A label from a report with control, line and direction characters replaced: they would act on
    a terminal or a page."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def loss(row: Row, name: str) -> Metric | None:
    """A loss of a row; the reference's ratio to itself is 1 and its KL 0, by definition and without
    error."""
    if name in row.metrics or not row.is_reference:
        return row.metrics.get(name)
    base = next(iter(row.metrics.values()), None)
    by_definition = {"perplexity_ratio": 1.0, "word_perplexity_ratio": 1.0, "kl_mean": 0.0}
    if base is None or name not in by_definition:
        return None
    unit = "nats" if name == "kl_mean" else "ratio"
    return base.model_copy(
        update={"unit": unit, "value": by_definition[name], "standard_error": None}
    )
