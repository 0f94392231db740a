"""The monitor: requests are compared with a profile, one by one, and alarms are raised.

Every statistic has evidence of its own (:mod:`llmquant.drift.evidence`), and an alarm when that
reaches the number of statistics divided by ``alpha``. So without drift the probability that any of
them ever raises an alarm, however long and often one looks, is at most ``alpha``.

Users who ask other things get other answers, from a model that is as good as before. Therefore the
prompts have statistics of their own. What changed is told from both (``Cause``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from llmquant.drift.evidence import EXPERTS, Evidence
from llmquant.drift.observation import DriftObservation
from llmquant.drift.profile import STATISTICS, DriftProfile, Ruler, Side, empty_gaps
from llmquant.errors import UsageError
from llmquant.records import Record

WINDOW, _WINDOWS = 50, 400
_SUSPICION = 4.0  # evidence on prompts that leaves open whether they changed
_ENOUGH_GAPS = 30
_MEMORY = 20.0  # observations that a recent mean looks back

Cause = Literal["nothing", "prompts", "model", "undecided"]
_SAYS: dict[Cause, str] = {
    "nothing": "no drift",
    "prompts": "the prompts have changed: measure the model on prompts like these, and make a new profile",
    "model": "the answers have changed and the prompts have not: look at the model, its files and the engine",
    "undecided": "prompts and answers have changed: the prompts alone may explain it; score the "
    "original beside it to know (serve --reference with --drift-sample), or run llmquant validate on new prompts",
}


class DriftAlarm(Record):
    """A statistic that has drifted.

    Attributes:
        request: the number of the request, from 1, at which it was raised.
        evidence: then; the odds against no drift.
        before, recent: mean of the profile, and of the last requests.
        told: the hooks have run.
    """

    statistic: str
    side: Side
    request: int
    evidence: float
    before: float | None
    recent: float
    told: bool = False


class DriftWindow(Record):
    """Requests that follow each other.

    Attributes:
        last: number of its last request.
        means: by statistic.
        evidence: by statistic, after the last of them.
    """

    last: int
    means: dict[str, float]
    evidence: dict[str, float]


class Kept(Record):
    """Where the evidence on one statistic is."""

    counts: tuple[int, ...]
    seen: int = Field(ge=0)
    capital: tuple[float, ...] = Field(min_length=EXPERTS, max_length=EXPERTS)
    peak: float
    recent: float | None


class DriftState(Record):
    """All that a monitor remembers; bounded."""

    entries: int = Field(ge=0)
    requests: int = Field(ge=0)
    kept: dict[str, Kept]
    sums: dict[str, tuple[float, int]]
    windows: tuple[DriftWindow, ...]
    alarms: tuple[DriftAlarm, ...]


class DriftRow(Record):
    """One statistic in a report."""

    statistic: str
    label: str
    side: Side
    seen: int
    before: float | None
    recent: float | None
    evidence: float
    peak: float
    alarm: int | None


class DriftReport(Record):
    """Where a monitor is."""

    model: str
    alpha: float
    threshold: float
    requests: int
    cause: Cause
    says: str
    alarms: tuple[DriftAlarm, ...]
    rows: tuple[DriftRow, ...]
    windows: tuple[DriftWindow, ...]
    unfinished: int = 0


class DriftMonitor:
    """Compares requests with a profile.

    Args:
        alpha: the probability of any false alarm, ever.

    Attributes:
        entries: observations so far.
        requests: those of them that are requests.

    Raises:
        UsageError: alpha is no probability.
    """

    ALPHA: ClassVar[float] = 0.01
    """Where none is given."""

    def __init__(self, profile: DriftProfile, alpha: float = ALPHA, window: int = WINDOW) -> None:
        if not 0 < alpha < 1:
            raise UsageError(f"alpha is {alpha}; it must be between 0 and 1")
        self.profile, self.alpha, self.threshold = profile, alpha, len(STATISTICS) / alpha
        self.entries = self.requests = 0
        self._window = window
        self._ruler = Ruler(profile.prompt_words, profile.answer_words)
        samples = {"gap": empty_gaps(), **profile.statistics}
        self._before = {name: sample.mean for name, sample in samples.items()}
        self._evidence = {
            name: Evidence(s.edges, s.counts, f"{profile.tokenizer_sha256}:{name}")
            for name, s in samples.items()
        }
        self._peak = dict.fromkeys(samples, 1.0)
        self._recent: dict[str, float | None] = dict.fromkeys(samples)
        self._sums: dict[str, tuple[float, int]] = {}
        self._windows: deque[DriftWindow] = deque(maxlen=_WINDOWS)
        self.alarms: list[DriftAlarm] = []

    def add(self, seen: DriftObservation) -> Sequence[DriftAlarm]:
        """The alarms that this observation raises."""
        self.entries += 1
        request = seen.prompt_length is not None or seen.answer_length is not None
        self.requests += request
        raised = [
            alarm
            for name, number in self._ruler.numbers(seen).items()
            if name in self._evidence and (alarm := self._add(name, number)) is not None
        ]
        if request and self.requests % self._window == 0:
            self._close_window()
        return raised

    def mark_told(self, statistic: str) -> None:
        """The hooks have run for the alarm of a statistic."""
        self.alarms = [
            alarm.model_copy(update={"told": True}) if alarm.statistic == statistic else alarm
            for alarm in self.alarms
        ]

    def evidence(self) -> dict[str, float]:
        """By statistic."""
        return {name: evidence.value for name, evidence in self._evidence.items()}

    @property
    def cause(self) -> Cause:
        """What the alarms say together."""
        sides = {alarm.side for alarm in self.alarms}
        if "model" in sides:
            return "model"
        moved = [
            value >= _SUSPICION
            for name, value in self.evidence().items()
            if STATISTICS[name].side == "prompts"
        ]
        if "answers" not in sides:
            return "prompts" if sides else "nothing"
        if not any(moved):
            return "model"
        return "prompts" if self._is_cleared() else "undecided"

    def _is_cleared(self) -> bool:
        """Whether the original, asked beside the model as it was for the profile, finds it
        unchanged."""
        gap = self._evidence["gap"]
        measured = "gap" in self.profile.statistics and gap.seen >= _ENOUGH_GAPS
        return measured and self._peak["gap"] < _SUSPICION

    def state(self) -> DriftState:
        return DriftState(
            entries=self.entries,
            requests=self.requests,
            kept={
                name: Kept(
                    counts=tuple(e.counts),
                    seen=e.seen,
                    capital=tuple(e.capital.tolist()),
                    peak=self._peak[name],
                    recent=self._recent[name],
                )
                for name, e in self._evidence.items()
            },
            sums=dict(self._sums),
            windows=tuple(self._windows),
            alarms=tuple(self.alarms),
        )

    def restore(self, state: DriftState) -> None:
        """Go on where another monitor of the same profile was."""
        self.entries, self.requests = state.entries, state.requests
        for name, kept in state.kept.items():
            self._evidence[name].restore(kept.counts, kept.seen, kept.capital)
            self._peak[name], self._recent[name] = kept.peak, kept.recent
        self._sums, self.alarms = dict(state.sums), list(state.alarms)
        self._windows.extend(state.windows)

    def report(self, unfinished: int = 0) -> DriftReport:
        raised = {alarm.statistic: alarm.request for alarm in self.alarms}
        rows = tuple(
            DriftRow(
                statistic=name, label=STATISTICS[name].label, side=STATISTICS[name].side,
                seen=e.seen, before=self._before[name], recent=self._recent[name],
                evidence=e.value, peak=self._peak[name], alarm=raised.get(name),
            )
            for name, e in self._evidence.items()
        )  # fmt: skip
        return DriftReport(
            model=self.profile.model, alpha=self.alpha, threshold=self.threshold,
            requests=self.requests, cause=self.cause, says=_SAYS[self.cause],
            alarms=tuple(self.alarms), rows=rows, windows=tuple(self._windows),
            unfinished=unfinished,
        )  # fmt: skip

    def _add(self, name: str, number: float) -> DriftAlarm | None:
        value = self._evidence[name].add(number)
        self._peak[name] = max(self._peak[name], value)
        recent = self._recent[name]
        recent = number if recent is None else recent + (number - recent) / _MEMORY
        self._recent[name] = recent
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + number, count + 1)
        if value < self.threshold or any(alarm.statistic == name for alarm in self.alarms):
            return None
        alarm = DriftAlarm(
            statistic=name, side=STATISTICS[name].side, request=self.requests, evidence=value,
            before=self._before[name], recent=recent,
        )  # fmt: skip
        self.alarms.append(alarm)
        return alarm

    def _close_window(self) -> None:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._windows.append(DriftWindow(last=self.requests, means=means, evidence=self.evidence()))
        self._sums = {}
