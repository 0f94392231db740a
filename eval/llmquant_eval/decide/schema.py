"""The Verdict: what a comparison found, as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime

from llmquant_eval.report.results import Finite, Strict

Decision = Literal["SHIP", "DON'T SHIP", "INCONCLUSIVE"]
EXIT_CODES: dict[Decision, int] = {"SHIP": 0, "DON'T SHIP": 1, "INCONCLUSIVE": 3}


class Example(Strict):
    """An item on which the two differ."""

    id: str
    prompt: str | None = None
    baseline: str | None = None
    candidate: str | None = None


class FlipCounts(Strict):
    """Items that only one of the two has right, with examples."""

    lost: int
    gained: int
    lost_examples: tuple[Example, ...] = ()
    gained_examples: tuple[Example, ...] = ()


class MetricVerdict(Strict):
    """One metric.

    ``difference``, its ``interval`` and ``margin`` are in the metric's own unit; a loss is
    negative, also where lower is better. ``points`` says that scores are between 0 and 1, so that
    people read these as percentage points. ``margin_text`` is the margin as it was asked for.
    ``detectable`` is how far from the margin the truth must be for this sample to say so with the
    wanted power, ``needed`` the number of items that would settle the question if the true
    difference is the one seen; both at the level of Holm's strictest step. P-values are one-sided;
    the adjusted ones are Holm's over all metrics.
    """

    metric: str
    items: int
    groups: int | None
    baseline: Finite
    candidate: Finite
    difference: Finite
    interval: tuple[Finite, Finite] | None
    method: str
    points: bool
    margin: Finite
    margin_text: str
    flips: FlipCounts | None
    p_not_worse: Finite
    p_worse: Finite
    adjusted_not_worse: Finite
    adjusted_worse: Finite
    detectable: Finite | None
    needed: int | None
    decision: Decision


class Verdict(Strict):
    """The answer, and everything it rests on."""

    schema_version: Literal[1] = 1
    kind: Literal["verdict"] = "verdict"
    created: AwareDatetime
    baseline: str
    candidate: str
    decision: Decision
    alpha: Finite
    power: Finite
    metrics: list[MetricVerdict]
    notes: list[str]
    versions: dict[str, str]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"
