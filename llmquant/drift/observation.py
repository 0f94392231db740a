"""What is kept of one request: lengths, counts of hashed tokens, means and flags; never a text.

A token's bucket is a hash of its id, which about 150 tokens of a vocabulary of 150,000 share. So
the counts say what the words of a prompt are like and not which they were. A text cannot be read
from them; whether they fit a text that somebody has can be told. Before serving and while serving
the same functions make the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llmquant.drift.refusals import is_refusal
from llmquant.records import Record

BUCKETS = 1024
_MULTIPLIER, _BITS = 2654435761, 32  # Knuth's multiplicative hash: neighbouring ids part
_SHIFT = _BITS - (BUCKETS.bit_length() - 1)

Count = Annotated[int, Field(ge=0, le=2**53)]
"""Of what a file says: negative ones have no root, and larger ones no float."""
Number = Annotated[float, Field(allow_inf_nan=False)]


class DriftObservation(Record):
    """One request, or a part of it; what was not measured is None.

    Attributes:
        prompt_length, answer_length: in tokens.
        prompt_words, answer_words: bucket of tokens → how many tokens.
        logprob: mean log-probability of the answer's tokens in nats, as the model itself has it.
        entropy: mean entropy of the distributions that they were taken from, in nats.
        ended: the model ended its turn; it was not cut off.
        refused: the answer begins as refusals do.
        json_valid: of an answer that begins as JSON does, whether it is JSON.
        gap: mean absolute difference between the answer's log-probabilities of the served model and
            of the original.
    """

    prompt_length: Count | None = None
    prompt_words: dict[int, Count] | None = None
    answer_length: Count | None = None
    answer_words: dict[int, Count] | None = None
    logprob: Number | None = None
    entropy: Number | None = None
    ended: bool | None = None
    refused: bool | None = None
    json_valid: bool | None = None
    gap: float | None = Field(None, allow_inf_nan=False, ge=0)

    @model_validator(mode="after")
    def _check_buckets(self) -> Self:
        for words in (self.prompt_words, self.answer_words):
            for bucket, count in (words or {}).items():
                if not (0 <= bucket < BUCKETS and count > 0):
                    raise ValueError(f"bucket {bucket} has the count {count}")
        return self


def observe_request(
    prompt: Sequence[int],
    answer: Sequence[int],
    text: str,
    *,
    ended: bool,
    logprobs: Sequence[float] = (),
    entropies: Sequence[float] = (),
) -> DriftObservation:
    """What is kept of a request and its whole answer.

    Args:
        prompt, answer: token ids, the one that ends the turn included.
        text: the answer.
        logprobs, entropies: of the answer's tokens; empty where they are not known.
    """
    final = _without_thoughts(text)
    return DriftObservation(
        prompt_length=len(prompt),
        prompt_words=_sketch(prompt),
        answer_length=len(answer),
        answer_words=_sketch(answer),
        logprob=_mean(logprobs),
        entropy=_mean(entropies),
        ended=ended,
        refused=is_refusal(final),
        json_valid=_json_valid(final),
    )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of the vocabulary: buckets are comparable only where ids mean the same tokens."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _sketch(ids: Sequence[int]) -> dict[int, int]:
    return dict(Counter((i * _MULTIPLIER % 2**_BITS) >> _SHIFT for i in ids))


def _mean(numbers: Sequence[float]) -> float | None:
    """None of none, and of what is infinite: a drawn token may have had no probability."""
    mean = sum(numbers) / len(numbers) if numbers else math.nan
    return mean if math.isfinite(mean) else None


def _without_thoughts(text: str) -> str:
    """Empty where thinking does not end."""
    return "" if "<think>" in text.rpartition("</think>")[2] else text.rpartition("</think>")[2]


def _json_valid(text: str) -> bool | None:
    text = text.strip().removeprefix("```json").removesuffix("```").strip()
    if not text.startswith(("{", "[")):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
