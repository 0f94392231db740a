"""Progress of one rung, while it is made and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmquant.errors import LlmquantError
from llmquant_eval.auto.answer.screen import Screen
from llmquant_eval.auto.ladder import Step
from llmquant_eval.auto.trials.work import Meter, Work

if TYPE_CHECKING:
    from llmquant import Progress


class BudgetSpentError(LlmquantError):
    """The time budget ended while a rung was worked on; what it did is kept where it can be."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Seconds that a search may take, None for any, and that the rest of it has taken."""

    budget: float | None
    elsewhere: float


class Watch:
    """Progress of one rung: shown, noted on disk, and stopped at the end of the time budget.

    ``limit`` None: a candidate that was measured before is made again, which is neither noted nor
    stopped.
    """

    def __init__(
        self,
        work: Work,
        screen: Screen,
        step: Step,
        key: str,
        meter: Meter,
        limit: Limit | None,
    ) -> None:
        self.meter = meter
        self._work, self._screen, self._name, self._folder = work, screen, step.name, step.folder
        self._key, self._limit = key, limit

    def block(self, where: Progress) -> None:
        """For :class:`llmquant.Events`: a linear begins."""
        self._tell("quantizing block", where.block + 1, where.blocks)

    def phase(self, phase: str) -> None:
        self._tell(phase, 0, 0)

    def stage(self, stage: str, done: int, total: int) -> None:
        """For an evaluation."""
        self._tell(f"measuring {stage}", done, total)

    def _tell(self, what: str, done: int, total: int) -> None:
        self._screen.doing(self._name, what, min(done, total), total)
        if self.meter.due():
            self.save()
            self.check()

    def save(self) -> None:
        """Note what was spent so far."""
        if self._limit is not None:
            self._work.spend(self._folder, self._key, self.meter.spent())

    def check(self) -> None:
        """Raises BudgetSpentError where no time is left."""
        limit = self._limit
        if limit is None or limit.budget is None:
            return
        if limit.elsewhere + self.meter.spent().wall >= limit.budget:
            self.save()
            raise BudgetSpentError(f"the time budget ended during {self._name}")
