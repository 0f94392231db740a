"""The Report: one evaluation run as JSON, enough to repeat it and to know what may be compared with
it.

Every metric carries its protocol id, its standard error and the number of tokens and windows it is
made of. Hashes say which weights, tokenizer, recipe and text were used; versions, hardware, dtype
and kernel say on what. A reader of another schema version must refuse rather than guess, and
unknown fields are errors (``extra="forbid"``).

``to_json`` and ``from_json`` are inverse: floats are written with all their digits, NaN and
infinities are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, Field, ValidationError

from llmquant.errors import UsageError
from llmquant_eval.report.results import Metric, ModelResult, Sha256, Strict

SCHEMA_VERSION = 1


class NoiseFloor(Strict):
    """KL and top-1 agreement of the reference with itself at ``other_dtype``: what rounding alone
    looks like."""

    other_dtype: str
    kl_mean: Metric
    top1_agreement: Metric


class ProtocolPass(Strict):
    """One protocol of the run and how much of the text it scored; fewer windows than available is a
    partial run.

    ``ids_sha256`` is over the token ids and the windows; older reports do not have it.
    """

    perplexity: str
    divergence: str | None
    tokens: int
    scored: int
    windows: int
    windows_available: int
    ids_sha256: Sha256 | None = None


class TextRows(Strict):
    """The rows of the evaluation text: ``used + sum(dropped) == read``.

    ``empty`` of the used ones hold nothing but white space. ``dropped`` counts by reason, and so
    does ``partly`` what is left out of used ones.
    """

    read: int
    used: int
    empty: int
    dropped: dict[str, int]
    partly: dict[str, int] = Field(default_factory=dict)


class ReportText(Strict):
    """The evaluation text, and how much of it the run's first protocol scored.

    :class:`ProtocolPass` has every protocol. Older reports do not have ``rows``.
    """

    source: str
    sha256: Sha256
    tokens: int
    windows: int
    windows_available: int
    window: int
    rows: TextRows | None = None

    def lost(self) -> str | None:
        """The text and what of it was dropped, in words; None if nothing is known to be."""
        rows = self.rows
        if rows is None or not (rows.dropped or rows.partly):
            return None
        lost = {"dropped": rows.dropped, "left out of these": rows.partly}
        reasons = (
            f"; {what}: {', '.join(f'{count:,} {reason}' for reason, count in counts.items())}"
            for what, counts in lost.items()
            if counts
        )
        return f"{self.source}: {rows.used:,} of {rows.read:,} rows used{''.join(reasons)}"


class Missing(Strict):
    """What a server did not answer: ``windows`` of ``windows_wanted`` of a protocol, or all
    ``tasks``."""

    label: str
    protocol: str
    windows: int | None = None
    windows_wanted: int | None = None
    reason: str

    def text(self) -> str:
        """In words, without the reason."""
        if self.windows is None:
            return f"{self.label}: {self.protocol}"
        return (
            f"{self.label}: {self.windows:,} of {self.windows_wanted:,} windows of {self.protocol}"
        )


class Settings(Strict):
    """How the models were run, as asked for: ``kernel`` "auto" and ``batch_size`` None were chosen
    automatically.

    ``dtype_reason`` says why the dtype is what it is where ``auto`` was asked for; older reports do
    not have it.
    """

    dtype: str
    dtype_reason: str | None = None
    device: str
    kernel: str
    batch_size: int | None


class Hardware(Strict):
    """The machine. ``cores`` are those this process may use; memory in bytes.

    ``instruction_sets`` are those of the processor that torch may use; older reports do not have
    them.
    """

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    accelerator: str | None
    instruction_sets: list[str] | None = None


class Report(Strict):
    """One run of ``llmquant eval``: its command, settings and the results of its models.

    ``missing`` is what a server that failed did not answer; without that it is empty. A metric is
    there only if all of its protocol was scored.
    """

    schema_version: Literal[1] = 1
    created: AwareDatetime
    command: str
    protocols: list[str]
    passes: list[ProtocolPass] = Field(default_factory=list)
    text: ReportText | None
    settings: Settings
    reference: str | None
    noise_floor: NoiseFloor | None
    models: list[ModelResult]
    missing: list[Missing] = Field(default_factory=list)
    versions: dict[str, str]
    hardware: Hardware

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the report") -> Report:
        """Parse a report.

        Raises:
            UsageError: not JSON, another schema version, fields that do not fit, or a reference
                that is none of the models; names the source and the field.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UsageError(
                f"{source} is not JSON ({e}); give a file that `llmquant eval --output` wrote"
            ) from e
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UsageError(
                f"{source} has schema_version {version}, of a newer llmquant; this one reads {SCHEMA_VERSION}. Update llmquant, "
                "or run the evaluation again"
            )
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{source} has schema_version {version!r} and this llmquant reads {SCHEMA_VERSION}; "
                "run the evaluation again"
            )
        try:
            report = cls.model_validate(raw)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(
                f"{source}: {where}: {first['msg']}; give a report as `llmquant eval --output` writes it"
            ) from e
        labels = [m.label for m in report.models]
        if report.reference is not None and report.reference not in labels:
            raise UsageError(
                f"{source}: reference: {report.reference!r} is none of its models ({', '.join(labels)})"
            )
        return report

    def model(self, label: str) -> ModelResult:
        """The result with that label; raises KeyError."""
        for result in self.models:
            if result.label == label:
                return result
        raise KeyError(label)


def read_report(path: Path) -> Report:
    """A report from a file.

    Raises:
        UsageError: unreadable, or not a report of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from e
    return Report.from_json(text, str(path))
