"""Up the ladder, from cheap to dear, until nothing that is left could be chosen.

What is done next follows from what was measured and from forecasts alone. A search that was killed
therefore takes the same way again, over records instead of runs, and ends with the same choice.

The stop rule: a rung is skipped if a candidate that met the bound is as small (its weight files are
at most a hundredth larger), or if one that did not meet it says that this one will not (see
:meth:`llmquant_eval.auto.ladder.Step.hopeless_after`). With ``--fastest`` size is no reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmquant_eval.auto.answer.render import checks_text, duration
from llmquant_eval.auto.ladder import Step
from llmquant_eval.auto.schema import Baseline, Measured, Rung
from llmquant_eval.auto.trials.rung import Trial
from llmquant_eval.auto.trials.watch import BudgetSpentError

_SMALLER = 0.99
"""A rung must promise weight files of less than this share of the best candidate's."""


@dataclass(slots=True)
class Climb:
    """One way up a ladder.

    Attributes:
        trial: how rungs are made and measured.
        baseline: the original.
        steps: the ladder.
        expected: rung → KL and perplexity ratio on a measured model of this size.
        alpha: level of each rung.
        rungs: outcomes, in the ladder's order.
        best: the candidate that would be chosen now.
        stopped: why the search ended early.
    """

    trial: Trial
    baseline: Baseline
    steps: Sequence[Step]
    expected: Mapping[str, tuple[float, float]]
    alpha: float
    rungs: list[Rung] = field(default_factory=list)
    best: tuple[Step, Measured] | None = None
    stopped: str | None = None
    _lost: list[Step] = field(default_factory=list)

    def run(self) -> None:
        """Fill ``rungs``, ``best`` and ``stopped``."""
        for step in self.steps:
            rung = self._rung(step)
            self.rungs.append(rung)
            self.trial.screen.done(rung)

    def _rung(self, step: Step) -> Rung:
        if step.refused is not None:
            return self._line(step, "excluded", step.refused)
        if (why := self._needless(step)) is not None:
            return self._line(step, "skipped", why)
        if self.stopped is not None:
            return self._line(step, "not reached", "the time budget was spent before")
        measured = self.trial.measured(step)
        cached = measured is not None
        if measured is None:
            try:
                measured = self.trial.run(step, self.baseline, self._spent())
            except BudgetSpentError as e:
                self.stopped = self._out_of_time(str(e))
                return self._line(step, "not reached", str(e))
        return self._judged(step, measured, cached)

    def _needless(self, step: Step) -> str | None:
        """Why a rung could not be chosen, or None."""
        assert step.nbytes is not None
        if self.best is not None and not self.trial.request.fastest:
            best, measured = self.best
            if step.nbytes >= _SMALLER * _bytes(measured):
                return f"it would not be smaller than {best.name}, which meets the bound"
        for lost in self._lost:
            if step.hopeless_after(lost):
                return f"{lost.name} did not meet the bound, and this one is expected to lose more"
        return None

    def _judged(self, step: Step, measured: Measured, cached: bool) -> Rung:
        if measured.model is None:
            self.trial.work.drop(step.folder)
            return self._line(step, "failed", measured.failure or "", measured, cached)
        bounds = self.trial.request.bounds
        model = measured.model
        checks = bounds.checks(model.metrics, model.tasks, self.alpha)
        met = all(check.met for check in checks)
        if not met:
            self._lost.append(step)
        if met and self._better(measured):
            loser, self.best = self.best, (step, measured)
        else:
            loser = (step, measured)
        if loser is not None and not self.trial.request.keep_candidates:
            self.trial.work.drop(loser[0].folder)
        rung = self._line(step, "met" if met else "not met", checks_text(checks), measured, cached)
        return rung.model_copy(update={"checks": tuple(checks)})

    def _better(self, measured: Measured) -> bool:
        """Whether this one is to be chosen rather than the best so far."""
        if self.best is None:
            return True
        if self.trial.request.fastest:
            return _speed(measured) > _speed(self.best[1])
        return _bytes(measured) < _bytes(self.best[1])

    def _line(
        self,
        step: Step,
        outcome: str,
        why: str,
        measured: Measured | None = None,
        cached: bool = False,
    ) -> Rung:
        kl, ratio = self.expected.get(step.name, (None, None))
        return Rung.model_validate(
            {
                "name": step.name,
                "stage": step.stage,
                "outcome": outcome,
                "why": why,
                "forecast_bytes": step.nbytes,
                "forecast_bits": step.bits,
                "expected_kl": kl,
                "expected_ratio": ratio,
                "measured": measured,
                "cached": cached,
            }
        )

    def _spent(self) -> float:
        """Seconds of the baseline and of all rungs so far."""
        return self.baseline.spent.wall + sum(
            r.measured.spent.wall for r in self.rungs if r.measured is not None
        )

    def _out_of_time(self, why: str) -> str:
        budget = self.trial.request.time_budget or 0.0
        return (
            f"The search stopped at its time budget of {duration(budget)}: {why}. "
            "The same command with a larger --time-budget resumes it."
        )


def _bytes(measured: Measured) -> int:
    assert measured.model is not None
    return measured.model.bytes_on_disk or 0


def _speed(measured: Measured) -> float:
    cost = None if measured.model is None else measured.model.cost
    return 0.0 if cost is None else cost.decode_tokens_per_second
