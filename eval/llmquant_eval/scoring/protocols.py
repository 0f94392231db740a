"""Protocols: which tokens are fed, which predictions are scored, and under what name the number may
be compared.

A perplexity without its protocol is not a number. The same model on the same text scores
differently with windows of 512 and 2048, with overlapping windows, with or without the tail; all of
that is in the protocol id (``ppl/gptq-512``) and figures with different ids never stand in one
ranking.

A protocol is a pure function from a token count to windows; it never sees tokens, models or text.
Of a window ``[begin, end)`` the tokens ``[begin, end-1)`` are fed and those at ``[scored, end)``
are scored, each predicted from what stands before it inside the window: the last token is a target
only.

* ``ppl/gptq-N``: non-overlapping windows of N, all but the first token of each scored, the tail
  shorter than N dropped: the GPTQ paper's evaluation and nearly every table since.
* ``ppl/strided-N-S``: windows of N that begin S tokens apart, each scoring what the one before it
  did not: every token but the very first is scored once, the tail included. These are the windows
      of Hugging Face's page on perplexity of
  fixed-length models; the mean is taken over tokens, where that page's loop weighs windows.
* ``ppl/word-N``: lm-eval's rolling windows. Every document stands alone after one prefix token
  (BOS, else EOS), all its tokens are scored, N predictions at a time; the last window is filled up
  with context from before. ``ppl/word-wikitext-N`` is the same over text put through lm-eval's
  WikiText detokenizer, words and bytes counted before it.
* ``ppl/chat-N``: the assistant's answers in chats. Every chat stands alone, as the model's chat
  template writes it; the tokens of its answers are scored, the end of the turn among them, each
  answer in a window of its own with what stands before it in the chat, N tokens at most.

``-bos`` after any of them (``ppl/gptq-512-bos``) puts a BOS token in front of *every* window, for
models that lose their bearings without one (Gemma). The windows and the scored tokens are those of
the id without ``-bos`` over a stream without special tokens; only what is fed differs. A window of
``ppl/word`` that continues a document gives up its oldest token of context for it, so no window
feeds more than N tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmquant.errors import UsageError

_ID = re.compile(
    r"ppl/(gptq|strided|word-wikitext|word|chat)(?:-([1-9][0-9]*))?(?:-([1-9][0-9]*))?(-bos)?"
)
KNOWN = (
    "ppl/gptq-N, ppl/strided-N[-STRIDE], ppl/word-N, ppl/word-wikitext-N or ppl/chat-N with N the window in tokens, "
    "and -bos after it for a BOS token in every window"
)


@dataclass(frozen=True, slots=True)
class TokenWindow:
    """Positions in one token stream: ``[begin, end-1)`` is fed, ``[scored, end)`` is scored."""

    begin: int
    end: int
    scored: int

    @property
    def fed(self) -> int:
        return self.end - 1 - self.begin

    @property
    def predictions(self) -> int:
        return self.end - self.scored

    def moved(self, by: int) -> TokenWindow:
        """The same window where its document begins ``by`` tokens into a stream."""
        return TokenWindow(self.begin + by, self.end + by, self.scored + by)


class WindowProtocol(Protocol):
    """What all protocols have in common. ``window`` is the longest input they feed, in tokens."""

    @property
    def window(self) -> int: ...

    @property
    def bos(self) -> bool:
        """Whether a BOS token is fed in front of every window."""
        ...

    @property
    def perplexity_id(self) -> str: ...

    @property
    def divergence_id(self) -> str: ...

    @property
    def overlapping(self) -> bool:
        """Whether windows share tokens, so that their losses are not independent even nearly."""
        ...

    def windows(self, tokens: int) -> Sequence[TokenWindow]:
        """The windows of a stream of ``tokens`` tokens, in order; empty when there is nothing that
        it can score."""
        ...


@dataclass(frozen=True, slots=True)
class GptqProtocol:
    """Non-overlapping windows of ``window`` tokens, tail dropped.

    Raises:
        UsageError: a window of fewer than 2 tokens predicts nothing.
    """

    window: int
    bos: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError(
                f"a window of {self.window} tokens has nothing to predict; choose 2 or more"
            )

    @property
    def perplexity_id(self) -> str:
        return f"ppl/gptq-{self.window}{_suffix(self.bos)}"

    @property
    def divergence_id(self) -> str:
        """KL is taken at the same positions as the perplexity, so its id carries the window too."""
        return f"kl/top-{self.window}{_suffix(self.bos)}"

    @property
    def overlapping(self) -> bool:
        return False

    def windows(self, tokens: int) -> Sequence[TokenWindow]:
        return [
            TokenWindow(begin, begin + self.window, begin + 1)
            for begin in range(0, tokens - self.window + 1, self.window)
        ]


@dataclass(frozen=True, slots=True)
class StridedProtocol:
    """Windows of ``window`` tokens, ``stride`` apart, each token but the first scored once.

    Raises:
        UsageError: a window below 2, or a stride that is not below the window (tokens would go
            unscored).
    """

    window: int
    stride: int
    bos: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError(
                f"a window of {self.window} tokens has nothing to predict; choose 2 or more"
            )
        if not 1 <= self.stride < self.window:
            raise UsageError(
                f"ppl/strided-{self.window}-{self.stride}: a stride is 1 or more and shorter than the window; "
                f"windows side by side are ppl/gptq-{self.window}"
            )

    @property
    def perplexity_id(self) -> str:
        return f"ppl/strided-{self.window}-{self.stride}{_suffix(self.bos)}"

    @property
    def divergence_id(self) -> str:
        return f"kl/top-strided-{self.window}-{self.stride}{_suffix(self.bos)}"

    @property
    def overlapping(self) -> bool:
        return True

    def windows(self, tokens: int) -> Sequence[TokenWindow]:
        windows: list[TokenWindow] = []
        scored = 1
        for begin in range(0, tokens, self.stride):
            end = min(begin + self.window, tokens)
            if end > scored:
                windows.append(TokenWindow(begin, end, scored))
                scored = end
            if end == tokens:
                break
        return windows


@dataclass(frozen=True, slots=True)
class RollingProtocol:
    """Windows that roll over one document: ``window`` predictions at a time, and as much of what
    stands before them as fits.

    Attributes:
        family: ``word`` and ``word-wikitext`` (lm-eval's; the text of the latter goes through the
            WikiText detokenizer first) score a whole document after its prefix, ``chat`` the
            answers in a chat.

    Raises:
        UsageError: a window below 2.
    """

    family: str
    window: int
    bos: bool = False

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UsageError(
                f"a window of {self.window} tokens has no context to speak of; choose 2 or more"
            )

    @property
    def _name(self) -> str:
        return f"{self.family}-{self.window}{_suffix(self.bos)}"

    @property
    def perplexity_id(self) -> str:
        return f"ppl/{self._name}"

    @property
    def divergence_id(self) -> str:
        return f"kl/top-{self._name}"

    @property
    def overlapping(self) -> bool:
        """What a window reaches back to is context, not scored again."""
        return False

    def windows(self, tokens: int) -> Sequence[TokenWindow]:
        """Of a document of ``tokens`` tokens after a prefix, which is at position 0."""
        return self.between(1, tokens + 1)

    def between(self, start: int, end: int) -> list[TokenWindow]:
        """The windows that score ``[start, end)`` of a document; its very first token has nothing
        to be predicted from."""
        windows: list[TokenWindow] = []
        scored = max(1, start)
        while scored < end:
            last = min(scored + self.window, end)
            windows.append(TokenWindow(max(0, last - 1 - self.window), last, scored))
            scored = last
        return windows


def _suffix(bos: bool) -> str:
    return "-bos" if bos else ""


def parse_protocol(text: str, window: int, bos: bool = False) -> WindowProtocol:
    """``ppl/strided-512-128`` → its protocol; ``window`` stands in where the id has no N. A stride
    is N/2 by default. ``bos`` asks for what ``-bos`` in the id does.

    Raises:
        UsageError: an id that this version does not know, or numbers that cannot be.
    """
    match = _ID.fullmatch(text)
    if match is None or (match.group(3) and match.group(1) != "strided"):
        raise UsageError(f"protocol {text!r} is not known; give {KNOWN}")
    family, length = match.group(1), int(match.group(2) or window)
    bos = bos or match.group(4) is not None
    if family == "gptq":
        return GptqProtocol(length, bos)
    if family == "strided":
        return StridedProtocol(length, int(match.group(3) or max(1, length // 2)), bos)
    return RollingProtocol(family, length, bos)


def has_window(text: str) -> bool:
    """Whether a protocol as the user wrote it says its window."""
    match = _ID.fullmatch(text)
    return match is not None and match.group(2) is not None


def default_window(positions: int | None) -> int:
    """``min(2048, the model's positions)``: the papers' window where the model can take it."""
    return 2048 if positions is None else min(2048, positions)
