"""Log-probabilities in OpenAI's two shapes: parallel lists for completions, objects for chats.

A token that is part of a character has no text of its own; completions then name it by its bytes
(``bytes:\\xe2``), as OpenAI does, so that different tokens have different names. JSON has no
infinity: a probability of zero is written as -9999.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from llmquant_serve.api.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.detokenize import Detokenizer, token_bytes, token_text

LOWEST = -9999.0


def completion_logprobs(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Token], offsets: Sequence[int]
) -> CompletionLogprobs:
    """Log-probabilities of tokens that begin at ``offsets`` in the choice's text; the chosen token
    is always among the alternatives."""
    return CompletionLogprobs(
        tokens=[_name(tokenizer, t.id) for t in tokens],
        token_logprobs=[None if t.logprob is None else max(t.logprob, LOWEST) for t in tokens],
        top_logprobs=[_alternatives(tokenizer, t) for t in tokens],
        text_offset=list(offsets),
    )


def _alternatives(tokenizer: PreTrainedTokenizerBase, token: Token) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return {_name(tokenizer, i): max(p, LOWEST) for i, p in (*token.top, (token.id, token.logprob))}


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What completions call a token: its text, or its bytes if it is part of a character."""
    text = token_text(tokenizer, token)
    data = token_bytes(tokenizer, token) if "�" in text else None
    return text if data is None else "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def chat_logprobs(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[Token]) -> ChatLogprobs:
    """Log-probabilities of the tokens of a message, end token included."""
    return ChatLogprobs(content=[_entry(tokenizer, t) for t in tokens], refusal=None)


def _entry(tokenizer: PreTrainedTokenizerBase, token: Token) -> TokenLogprob:
    chosen = _alternative(tokenizer, token.id, token.logprob or 0.0)
    top = [_alternative(tokenizer, i, p) for i, p in token.top]
    return TokenLogprob(**chosen.model_dump(), top_logprobs=top)


def _alternative(tokenizer: PreTrainedTokenizerBase, token: int, logprob: float) -> TopLogprob:
    text = token_text(tokenizer, token)
    return TopLogprob(token=text, logprob=max(logprob, LOWEST), bytes=token_bytes(tokenizer, token))


def prompt_offsets(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, keep_special: bool
) -> list[int]:
    """Where each token of an echoed prompt begins in its text."""
    text, length, offsets = Detokenizer(tokenizer, keep_special=keep_special), 0, list[int]()
    for i in ids:
        offsets.append(length)
        length += len(text.add(i))
    return offsets
