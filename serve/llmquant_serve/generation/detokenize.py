"""Token ids → text, piece by piece, with stop strings that may lie across tokens.

A character of several bytes can be spread over tokens, and a decoder shows U+FFFD until it is
whole. So a piece is given out only when the text so far does not end in one; what is left then
comes with the end. Decoding restarts from a few tokens back instead of from the beginning (some
tokenizers drop a leading space, so a token cannot be decoded on its own): the cost per token is
constant.

A stop string ends the text before it and is not given out. Text that could still become one is held
back until it is decided.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_CONTEXT = 5  # tokens of the prompt that decide whether the first new one begins with a space
_UNDECODED = "�"
_LONGEST_CHARACTER = 4  # tokens that can hold parts of one character, when every token is one byte


class Detokenizer:
    """Text of a growing list of token ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int] = (),
        *,
        keep_special: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._keep_special = keep_special
        self._ids = list(prompt[-_CONTEXT:])
        self._start = 0  # decoding starts here …
        self._told = len(self._ids)  # … and what is before here has been given out

    def add(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self._ids.append(token)
        before, now = self._both()
        # More tokens than a character can have, still undecoded: these bytes are no text and never
        # will be.
        hopeless = len(self._ids) - self._told > _LONGEST_CHARACTER
        if len(now) <= len(before) or (now.endswith(_UNDECODED) and not hopeless):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back as an unfinished character."""
        before, now = self._both()
        self._start = self._told = len(self._ids)
        return now[len(before) :]

    def _both(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._told]), self._decode(
            self._ids[self._start :]
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids, keep_special=self._keep_special)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, keep_special: bool = False
) -> str:
    """The text of token ids, without the clean-up that old tokenizers apply to spaces."""
    if not ids:
        return ""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


class StopStrings:
    """Passes text on until one of ``stops`` appears; ``found`` then names it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """What can be given out, now that ``text`` has come."""
        self._held += text
        hits = [(self._held.index(s), s) for s in self._stops if s in self._held]
        if hits:
            at, self.found = min(hits)
            passed, self._held = self._held[:at], ""
            return passed
        keep = max((_overlap(self._held, s) for s in self._stops), default=0)
        passed, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return passed

    def rest(self) -> str:
        """What was held back and did not become a stop string."""
        passed, self._held = self._held, ""
        return passed


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as text, special tokens by name; parts of characters show as U+FFFD."""
    return decode(tokenizer, [token], keep_special=True)


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int] | None:
    """The bytes of one token, parts of characters included; None where the vocabulary does not
    tell."""
    text = token_text(tokenizer, token)
    if _UNDECODED not in text:
        return list(text.encode())
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return None
    if named := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return [int(named[1], 16)]
    table = _byte_characters()
    return [table[c] for c in piece] if all(c in table for c in piece) else None


@functools.cache
def _byte_characters() -> dict[str, int]:
    """The printable stand-ins of bytes in byte-level vocabularies (GPT-2's table): character →
    byte."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
