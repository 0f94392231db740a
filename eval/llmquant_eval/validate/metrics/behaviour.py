"""Behaviour that perplexity does not see and that quantization changes: turns that do not end,
thinking that does not close, longer answers, repetition and loops, refusals.

Each is scored for every answer, whatever it says, so that two models can be compared on the same
items.
"""

from __future__ import annotations

import regex

from llmquant_eval.validate.answers import Answer, Measured
from llmquant_eval.validate.examples import Example

_GRAM = 4  # words
_LONGEST_UNIT = 200  # words of a text that a loop repeats
_REPEATS, _LOOP_WORDS = 4, 16
_LETTERS_REPEATED = regex.compile(r"(\S{1,8}?)\1{19,}\s*\Z")
_REFUSES = regex.compile(
    r"""\A\W*(
        (i['’]?m|i[ ]am|we['’]?re)[ ](very[ ]|really[ ]|so[ ])?(sorry|afraid)\b.{0,60}\b(can(['’]?t|not)|unable|won['’]?t)
      | (sorry|apologies)\b.{0,60}\b(can(['’]?t|not)|unable|won['’]?t)
      | i[ ](can(['’]?t|not)|won['’]?t|am[ ]unable[ ]to|am[ ]not[ ]able[ ]to|do[ ]not|don['’]?t)
        [ ]?(help|assist|provide|fulfil|comply|answer|do[ ]that|support|engage|feel[ ]comfortable|create|discuss)
      | i['’]?m[ ](unable|not[ ]able)[ ]to
      | as[ ]an[ ](ai|artificial[ ]intelligence|language[ ]model)\b.{0,80}\b(can(['’]?t|not)|unable|don['’]?t|do[ ]not|not[ ]able)
      | lo[ ]siento\b.{0,60}\bno[ ]puedo | je[ ]suis[ ]désolé.{0,60}\bne[ ](peux|puis)
      | (es[ ])?tut[ ]mir[ ]leid\b.{0,80}\b(kann|darf)[ ] | mi[ ]dispiace\b.{0,60}\bnon[ ]posso
      | (sinto[ ]muito|desculpe)\b.{0,60}\bnão[ ]posso
      | (很抱歉|抱歉|对不起).{0,30}(不能|无法) | 申し訳.{0,40}(できません|できかねます)
    )""",
    regex.IGNORECASE | regex.VERBOSE | regex.DOTALL,
)


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
    return float(_REFUSES.search(answer_of(measured).final) is not None)


def answer_of(measured: Measured) -> Answer:
    assert measured.answer is not None  # metrics that need one are given one
    return measured.answer
