"""A Metric: which examples it scores, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmquant_eval.validate.answers import Measured
from llmquant_eval.validate.examples import Example


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per example.

    Attributes:
        applies: by the example alone, never by what was answered: two models are compared on the
            same items.
        score: of what was measured.
        lower: less is better.
        generates: it is made of an answer; otherwise of log-probabilities.
        lengthwise: differs between good answers too, as a length does.
    """

    name: str
    applies: Callable[[Example], bool]
    score: Callable[[Example, Measured], float | None]
    lower: bool = False
    generates: bool = True
    lengthwise: bool = False
