"""Behaviour that perplexity does not see and that quantization changes: turns that do not end,
thinking that does not close, longer answers, repetition and loops, refusals.

Each is scored for every answer, whatever it says, so that two models can be compared on the same
items.
"""

from __future__ import annotations

import regex

from llmquant import is_refusal
from llmquant_eval.validate.answers import Answer, Measured
from llmquant_eval.validate.examples import Example

_GRAM = 4  # words
_LONGEST_UNIT = 200  # words of a text that a loop repeats
_REPEATS, _LOOP_WORDS = 4, 16
_LETTERS_REPEATED = regex.compile(r"(\S{1,8}?)\1{19,}\s*\Z")


def end_of_turn(_: Example, measured: Measured) -> float:
    return float(answer_of(measured).ended)


def think_closed(_: Example, measured: Measured) -> float:
    return float(answer_of(measured).thinking_closed)


def answer_tokens(_: Example, measured: Measured) -> float | None:
    """None where a server does not say."""
    tokens = answer_of(measured).tokens
    return None if tokens is None else float(tokens)


def repetition(_: Example, measured: Measured) -> float:
    """The share of runs of four words that stood in the answer before."""
    words = answer_of(measured).words
    grams = [tuple(words[i : i + _GRAM]) for i in range(len(words) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loop(_: Example, measured: Measured) -> float:
    """Whether the answer ends in one text said over and over: four times and 16 words or more, or
    20 times without a space."""
    answer = answer_of(measured)
    if _LETTERS_REPEATED.search(answer.text[-2000:]):
        return 1.0
    words = answer.words
    return float(any(_loops(words, unit) for unit in range(1, _LONGEST_UNIT + 1)))


def _loops(words: list[str], unit: int) -> bool:
    needed = max(_REPEATS * unit, _LOOP_WORDS)
    if len(words) < needed:
        return False
    tail = words[-needed:]
    return tail[unit:] == tail[:-unit]


def refusal(_: Example, measured: Measured) -> float:
    """Whether the answer begins as refusals do, in one of eight languages."""
    return float(is_refusal(answer_of(measured).final))


def answer_of(measured: Measured) -> Answer:
    assert measured.answer is not None  # metrics that need one are given one
    return measured.answer
