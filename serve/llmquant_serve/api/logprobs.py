"""Log-probabilities in OpenAI's two shapes: parallel lists for completions, objects for chats.

Both name tokens by words, which :class:`~llmquant_serve.generation.token_names.TokenNames` makes
distinct. JSON has no infinity: a probability of zero is written as -9999.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from llmquant_serve.api.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.detokenize import Detokenizer, token_bytes

LOWEST = -9999.0


class Names(Protocol):
    """Names of tokens by id."""

    def __getitem__(self, token: int) -> str: ...


def completion_logprobs(
    names: Names, tokens: Sequence[Token], offsets: Sequence[int]
) -> CompletionLogprobs:
    """Log-probabilities of tokens that begin at ``offsets`` in the choice's text; the chosen token
    is always among the alternatives."""
    return CompletionLogprobs(
        tokens=[names[t.id] for t in tokens],
        token_logprobs=[None if t.logprob is None else max(t.logprob, LOWEST) for t in tokens],
        top_logprobs=[_alternatives(names, t) for t in tokens],
        text_offset=list(offsets),
    )


def _alternatives(names: Names, token: Token) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return {names[i]: max(p, LOWEST) for i, p in (*token.top, (token.id, token.logprob))}


def chat_logprobs(
    tokenizer: PreTrainedTokenizerBase, names: Names, tokens: Iterable[Token]
) -> ChatLogprobs:
    """Log-probabilities of the tokens of a message, end token included."""

    def alternative(token: int, logprob: float) -> TopLogprob:
        data = token_bytes(tokenizer, token)
        return TopLogprob(token=names[token], logprob=max(logprob, LOWEST), bytes=data)

    def entry(token: Token) -> TokenLogprob:
        chosen = alternative(token.id, token.logprob or 0.0)
        top = [alternative(i, p) for i, p in token.top]
        return TokenLogprob(**chosen.model_dump(), top_logprobs=top)

    return ChatLogprobs(content=[entry(t) for t in tokens], refusal=None)


def prompt_offsets(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, keep_special: bool
) -> list[int]:
    """Where each token of an echoed prompt begins in its text."""
    text, length, offsets = Detokenizer(tokenizer, keep_special=keep_special), 0, list[int]()
    for i in ids:
        offsets.append(length)
        length += len(text.add(i))
    return offsets
