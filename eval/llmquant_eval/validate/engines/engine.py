"""What a run needs of a model, wherever it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmquant_eval.validate.answers import Measured, Task, Unit

ONE_ITEM = 1


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are generated.

    Attributes:
        max_tokens: at most so many.
        temperature: 0 is greedy.
        seed: of drawing, where the temperature is above 0.
        raw: prompts are continued as text, without a chat template.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    raw: bool = False

    def __str__(self) -> str:
        drawn = f"temperature {self.temperature:g}, seed {self.seed}"
        return f"{'greedy' if self.temperature == 0 else drawn}, at most {self.max_tokens} tokens"

    def conditions(self, system: str | None) -> dict[str, str]:
        """What must be the same where answers are compared. ``system``: the message that prompts
        without one were given; it may be private, so its hash stands for it."""
        asked = (
            "none" if system is None else f"sha256 {hashlib.sha256(system.encode()).hexdigest()}"
        )
        return {
            "generation": str(self),
            "prompts": "continued as text (--raw)" if self.raw else "as chats",
            "--system": asked,
        }


class Engine(Protocol):
    """A model that answers.

    Attributes:
        label: what it is called in results.
        thinks: its chat template knows ``</think>``.
        scores: it gives log-probabilities of a text.
        together: tasks that one unit has at most.
        observes: it observes answers for a drift profile, whose tokenizer has this fingerprint;
            None if it does not.
        original: a model that is known not to be quantized, so that others are compared with it.
    """

    label: str
    thinks: bool
    scores: bool
    together: int
    observes: str | None
    original: bool

    def identity(self) -> Mapping[str, object]:
        """Everything but the tasks that determines what is measured."""
        ...

    def computing(self) -> Mapping[str, str]:
        """What its numbers depend on beside the model, as far as it is known."""
        ...

    def check(self, tasks: Sequence[Task], where: Callable[[Task], str]) -> list[str]:
        """What people should know of how the tasks will be asked.

        Raises:
            UsageError: a task cannot be done; names its line.
        """
        ...

    def same(self, unit: Unit, before: Sequence[Measured]) -> bool:
        """Whether this is still the model that measured ``before``."""
        ...

    def measure(self, units: Sequence[Unit]) -> Iterator[tuple[int, list[Measured]]]:
        """The place of a unit and its results, as units are done, in whatever order.

        Raises:
            TaskError: one failed; those that were done have been given.
        """
        ...


class TaskError(Exception):
    """What failed, and on which task."""

    def __init__(self, task: Task, why: Exception) -> None:
        super().__init__(str(why))
        self.task, self.why = task, why
