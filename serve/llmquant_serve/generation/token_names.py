"""TokenNames: what tokens are called where an answer needs words for them.

The identity of a token is its id. Answers in OpenAI's shapes are keyed by words, so the words must
be as different as the ids: a token is named by its text if no other token has that text, else as
the vocabulary spells it (``▁the``, ``<0x41>``), and by its id where even that is taken. A token
that is part of a character has no text; it is named by its bytes (``bytes:\\xe2``), as OpenAI does.
"""

from __future__ import annotations

import functools
from collections import Counter

from transformers import PreTrainedTokenizerBase

from llmquant_serve.generation.detokenize import token_bytes, token_texts

ID_PREFIX = "token_id:"  # as vLLM writes it


class TokenNames:
    """Distinct names of all tokens of a model, made at the first use: a second for 250k tokens.

    Args:
        size: number of the model's logits; the tokenizer may have fewer tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self._tokenizer, self._size = tokenizer, size

    def __getitem__(self, token: int) -> str:
        return self._names[token]

    @functools.cached_property
    def _names(self) -> list[str]:
        texts = token_texts(self._tokenizer, range(self._size))
        counts = Counter(texts)
        names = [t if t and counts[t] == 1 and "�" not in t else "" for t in texts]
        taken = set(names)
        for token, name in enumerate(names):
            if not name:
                names[token] = next(
                    n for n in self._candidates(token, texts[token]) if n not in taken
                )
                taken.add(names[token])
        return names

    def _candidates(self, token: int, text: str) -> list[str]:
        """Names for a token whose text will not do, the best first."""
        names = []
        if "�" in text and (data := token_bytes(self._tokenizer, token)) is not None:
            names.append("bytes:" + "".join(f"\\x{b:02x}" for b in data))
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if isinstance(piece, str) and piece:
            names.append(piece)
        return [*names, f"{ID_PREFIX}{token}"]


class IdNames:
    """Tokens named by their ids alone, for clients that ask for it."""

    def __getitem__(self, token: int) -> str:
        return f"{ID_PREFIX}{token}"
