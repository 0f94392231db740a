"""What a model is asked, and what it answered: the part of a run that costs time, kept in the
journal as it is done. Scores are computed from it and never stored without it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmquant import DriftObservation
from llmquant_eval.report.results import Finite, Strict
from llmquant_eval.validate.examples import Example

_CLOSED = "</think>"
_OPENED = "<think>"


class Answer(Strict):
    """What was generated.

    Attributes:
        text: without special tokens.
        marked: with them, where that is another text (``[TOOL_CALLS]`` is one).
        tokens: that were generated, the one that ends the turn included; None where a server does
            not say.
        ended: the model ended its turn; it was not cut off.
        opened: the prompt itself ends in an open ``<think>``.
        thoughts: what a server gave apart from the answer.
        calls: of tools, as a server gave them; in OpenAI's form.
        observed: for a drift profile, if one is wanted.
    """

    text: str
    marked: str | None = None
    tokens: int | None = None
    ended: bool
    opened: bool = False
    thoughts: str | None = None
    calls: tuple[dict[str, Any], ...] = ()
    observed: DriftObservation | None = None

    @property
    def thinking_closed(self) -> bool:
        """Nothing was left open: a model that never says ``</think>`` never answers."""
        if self.thoughts is not None and not self.text.strip() and not self.calls:
            return False
        opened = self.opened or _OPENED in self.text
        return not opened or _CLOSED in self.text

    @property
    def final(self) -> str:
        """The answer without what was thought before it; empty where thinking has no end."""
        if not self.thinking_closed:
            return ""
        return self.text.rpartition(_CLOSED)[2].strip()

    @property
    def words(self) -> list[str]:
        """Of the whole text; a character that is a word by itself (Han, kana) is one."""
        return re.findall(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+|[^\w\s]", self.text)


class Scored(Strict):
    """A continuation that was given: the sum of its tokens' log-probabilities in nats."""

    logprob: Finite
    tokens: int


class Measured(Strict):
    """Everything that was measured of one example."""

    answer: Answer | None = None
    scored: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked of a model about one example.

    Attributes:
        generate: an answer is to be generated.
        continuations: texts whose log-probability after the prompt is to be scored.
    """

    example: Example
    generate: bool
    continuations: tuple[str, ...]

    @property
    def asks(self) -> bool:
        return self.generate or bool(self.continuations)

    def identity(self) -> Mapping[str, object]:
        """All that the model sees of it."""
        return {
            "messages": list(self.example.messages),
            "plain": self.example.plain,
            "tools": list(self.example.tools),
            "generate": self.generate,
            "continuations": list(self.continuations),
        }


Unit = Sequence[Task]
"""Tasks that are measured together; their results do not depend on any other unit."""
