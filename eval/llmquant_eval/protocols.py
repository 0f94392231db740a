"""Protocols: which tokens are fed, which predictions are scored, and under what name the number may be compared.

A perplexity without its protocol is not a number. The same model on the same text scores differently with windows of
512 and 2048, with overlapping windows, with or without the tail; all of that is in the protocol id (``ppl/gptq-512``)
and figures with different ids never stand in one ranking.

A protocol is a pure function from a token count to windows; it never sees tokens, models or text. A window
``[begin, end)`` is fed whole and the tokens at ``[scored, end)`` are scored, each predicted from what stands before it
inside the window. ``ppl/gptq-N`` feeds non-overlapping windows of N and scores all but the first token of each, as the
GPTQ paper's evaluation and nearly every table since; the tail shorter than N is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmquant.errors import UsageError

_PERPLEXITY_ID = re.compile(r"ppl/gptq-([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Window:
    """Positions in one token stream: ``[begin, end)`` is fed, ``[scored, end)`` is scored."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True, slots=True)
class GptqProtocol:
    """Non-overlapping windows of ``window`` tokens, tail dropped.

    Raises:
        UsageError: a window of fewer than 2 tokens predicts nothing.
    """

    window: int

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError(f"a window of {self.window} tokens has nothing to predict; choose 2 or more")

    @property
    def perplexity_id(self) -> str:
        return f"ppl/gptq-{self.window}"

    @property
    def divergence_id(self) -> str:
        """KL is taken at the same positions as the perplexity, so its id carries the window too."""
        return f"kl/top-{self.window}"

    def windows(self, tokens: int) -> Sequence[Window]:
        """The windows of a stream of ``tokens`` tokens, in order; empty when it is shorter than one window."""
        return [
            Window(begin, begin + self.window, begin + 1) for begin in range(0, tokens - self.window + 1, self.window)
        ]


def parse_protocol(text: str) -> GptqProtocol:
    """``ppl/gptq-N`` → its protocol.

    Raises:
        UsageError: an id that this version does not know.
    """
    match = _PERPLEXITY_ID.fullmatch(text)
    if match is None:
        raise UsageError(f"protocol {text!r} is not known; give ppl/gptq-N with N the window in tokens")
    return GptqProtocol(int(match.group(1)))


def default_window(positions: int | None) -> int:
    """``min(2048, the model's positions)``: the papers' window where the model can take it."""
    return 2048 if positions is None else min(2048, positions)
