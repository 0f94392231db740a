"""Token ids → text, piece by piece, with stop strings that may lie across tokens.

A character of several bytes can be spread over tokens, and a decoder shows U+FFFD until it is
whole. So text is emitted only when it does not end in U+FFFD; the rest comes with the end. Decoding
restarts from a few tokens back instead of from the beginning (some tokenizers drop a leading space,
so a token cannot be decoded on its own): the cost per token is constant.

A stop string ends the text before it and is not emitted. Text that could still become one is held
back until the next text decides.
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
        self._emitted = len(self._ids)  # … and the text of the tokens before here is emitted

    def add(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self._ids.append(token)
        before, now = self._decode_emitted_and_all()
        if now == before:  # a token without text, such as a special one: no part of a character
            self._emitted = len(self._ids)
            return ""
        # More tokens than a character can have, still undecoded: these bytes are no text and never
        # will be.
        hopeless = len(self._ids) - self._emitted > _LONGEST_CHARACTER
        if len(now) <= len(before) or (now.endswith(_UNDECODED) and not hopeless):
            return ""
        self._start, self._emitted = self._emitted, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """What was held back as an unfinished character."""
        before, now = self._decode_emitted_and_all()
        self._start = self._emitted = len(self._ids)
        return now[len(before) :]

    def _decode_emitted_and_all(self) -> tuple[str, str]:
        """Text from ``_start`` to what is emitted, and to the last token."""
        emitted = self._ids[self._start : self._emitted]
        return self._decode(emitted), self._decode(self._ids[self._start :])

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
    """Passes text on until one of ``stops`` appears; ``matched`` then names it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""  # held back: it may be the beginning of a stop string
        self.matched: str | None = None

    def add(self, text: str, *, ends: bool = True) -> str:
        """The text that can be emitted now that ``text`` has arrived.

        Args:
            ends: a stop string whose end is in ``text`` stops; else it is text like any other.
        """
        held = len(self._pending)
        pending = self._pending + text
        found = [(pending.find(s, max(0, held - len(s) + 1)), s) for s in self._stops]
        matches = [(at, s) for at, s in found if at >= 0]
        if matches and ends:
            end, self.matched = min(matches)
            self._pending = ""
        else:
            end = len(pending) - max((_overlap(pending, s) for s in self._stops), default=0)
            self._pending = pending[end:]
        return pending[:end]

    def rest(self) -> str:
        """What was held back and did not become a stop string."""
        text, self._pending = self._pending, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token's text as it is inside a longer text, special tokens by name; parts of characters
    show as U+FFFD."""
    return token_texts(tokenizer, [token])[0]


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The texts of tokens, each for itself. SentencePiece-like tokenizers drop the space of a first
    token, so each is decoded after another one, whose text is then taken off."""
    before, known = _anchor(tokenizer)
    rows = [[*before, token] for token in tokens]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        decoded = backend.decode_batch(rows, skip_special_tokens=False)
    else:
        decoded = [decode(tokenizer, row, keep_special=True) for row in rows]
    return [
        text[len(known) :] if text.startswith(known) else decode(tokenizer, [t], keep_special=True)
        for t, text in zip(tokens, decoded, strict=True)
    ]


@functools.lru_cache(maxsize=8)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """A token that ends in a letter, and its text; nothing where the tokenizer cannot spell one."""
    ids = tokenizer.encode("a", add_special_tokens=False)[-1:]
    text = decode(tokenizer, ids, keep_special=True)
    return (ids, text) if text.endswith("a") else ([], "")


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> list[int] | None:
    """The bytes of one token, parts of characters included; None where the vocabulary does not show
    them."""
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
