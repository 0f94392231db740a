"""What ``llmquant auto`` stores: a record for each measured rung, and the report of the whole
search. Unknown fields are errors, as in every record of an evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime

from llmquant_eval.report.results import Finite, ModelResult, Sha256, Strict
from llmquant_eval.report.schema import Hardware, Report

Outcome = Literal["met", "not met", "failed", "excluded", "skipped", "not reached"]
"""``failed``: could not be made. ``excluded``: before the search, by a forecast. ``skipped``:
during it, since it could not be chosen. ``not reached``: the time budget was spent."""

Decision = Literal["chosen", "keep the original"]
EXIT_CODES: dict[Decision, int] = {"chosen": 0, "keep the original": 3}


class Spent(Strict):
    """Seconds of wall clock, and of all processors."""

    wall: Finite = 0.0
    cpu: Finite = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(wall=self.wall + other.wall, cpu=self.cpu + other.cpu)


class Part(Strict):
    """The calibration text or the held-out one. ``rows_sha256`` is over its rows, as for
    :class:`llmquant.Documents`."""

    source: str
    documents: int
    characters: int
    rows_sha256: Sha256


class Split(Strict):
    """How the text was divided.

    ``how`` says it in words; ``chats``: the documents are chats, whose answers are judged;
    ``shared`` counts documents of the held-out text that were left out because the calibration text
    has them too.
    """

    how: str
    chats: bool = False
    calibration: Part
    heldout: Part
    shared: int = 0


class Check(Strict):
    """One bound on one candidate: the measured loss and its upper confidence limit (None where
    nothing tells a spread)."""

    name: str
    value: Finite
    upper: Finite | None
    bound: Finite
    met: bool


class Made(Strict):
    """A rung's folder: what it took, its recipe as it was used, and its weights.

    ``overlap`` is the share of the calibration windows' shingles that stand in the held-out text;
    None without calibration.
    """

    key: Sha256
    quantizing: Spent
    recipe: str
    overlap: Finite | None
    weights_sha256: Sha256


class Measured(Strict):
    """A rung that was made and measured, or that failed; kept in the work folder under ``key``,
    which is a hash of everything that it depends on. Other fields are those of :class:`Made`."""

    key: Sha256
    quantizing: Spent
    measuring: Spent = Spent()
    recipe: str = ""
    overlap: Finite | None = None
    model: ModelResult | None = None
    failure: str | None = None

    @property
    def spent(self) -> Spent:
        return self.quantizing + self.measuring


class Baseline(Strict):
    """The original, measured once."""

    key: Sha256
    spent: Spent
    report: Report


class Rung(Strict):
    """One line of the report. ``forecast_bytes`` of weight files, ``expected_kl`` of a model of
    this size where the recipe was measured on one."""

    name: str
    stage: str
    outcome: Outcome
    why: str
    forecast_bytes: int | None = None
    forecast_bits: Finite | None = None
    expected_kl: Finite | None = None
    expected_ratio: Finite | None = None
    checks: tuple[Check, ...] = ()
    measured: Measured | None = None
    cached: bool = False


class AutoReport(Strict):
    """The answer, and everything it rests on.

    ``alpha`` is shared by ``looks`` rungs, ``alpha_each`` for each. ``evaluate`` is the command
    that repeats the chosen model's numbers.
    """

    schema_version: Literal[1] = 1
    kind: Literal["auto"] = "auto"
    created: AwareDatetime
    command: str
    model: str
    output: str
    decision: Decision
    chosen: str | None
    why: str
    next: str
    bounds: list[str]
    limits: list[str]
    alpha: Finite
    looks: int
    alpha_each: Finite
    split: Split
    calibration_windows: int
    calibration_window: int
    heldout_windows: int
    heldout_windows_available: int
    heldout_window: int
    baseline: ModelResult
    baseline_spent: Spent
    rungs: list[Rung]
    stopped: str | None = None
    evaluate: str | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str]
    hardware: Hardware

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @property
    def spent(self) -> Spent:
        total = self.baseline_spent
        for rung in self.rungs:
            total += rung.measured.spent if rung.measured is not None else Spent()
        return total
