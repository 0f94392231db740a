"""Right or wrong by what the data says: the right answer, a pattern, the right choice."""

from __future__ import annotations

import json
import unicodedata

import regex

from llmquant.errors import LlmquantError
from llmquant_eval.validate.answers import Measured
from llmquant_eval.validate.examples import Example

_PATIENCE = 5.0  # seconds for one pattern on one answer: some take years


def exact_match(example: Example, measured: Measured) -> float:
    """Whether the answer is one of the right ones, white space aside; JSON by what it says."""
    said = final(measured)
    return float(any(_same(said, right) for right in example.answers))


def contains_answer(example: Example, measured: Measured) -> float:
    """Whether a right answer stands in the answer as words of its own, in whatever case."""
    said = _plain(final(measured)).casefold()
    return float(any(_stands_in(_plain(r).casefold(), said) for r in example.answers))


def matches(example: Example, measured: Measured) -> float:
    """Whether every pattern is found in the answer.

    Raises:
        LlmquantError: one takes too long.
    """
    said = final(measured)
    for pattern in example.patterns:
        try:
            if not pattern.search(said, timeout=_PATIENCE):
                return 0.0
        except TimeoutError as e:
            raise LlmquantError(
                f"regex {pattern.pattern!r} took more than {_PATIENCE:g} s on the answer; make it simpler"
            ) from e
    return 1.0


def chosen(example: Example, measured: Measured) -> int:
    """The choice with the highest log-probability per byte: lm-eval's ``acc_norm``."""
    sizes = [max(1, len(choice.encode())) for choice in example.choices]
    scores = [s.logprob / size for s, size in zip(measured.scored, sizes, strict=True)]
    return max(range(len(scores)), key=scores.__getitem__)


def choice_accuracy(example: Example, measured: Measured) -> float:
    return float(chosen(example, measured) == example.right)


def answer_logprob(example: Example, measured: Measured) -> float:
    """Mean log-probability per token of the given answer; the likeliest one of several."""
    return max(s.logprob / max(1, s.tokens) for s in measured.scored)


def final(measured: Measured) -> str:
    """The answer, without what was thought."""
    assert measured.answer is not None  # metrics that need one are given one
    return measured.answer.final


def _same(said: str, right: str) -> bool:
    if _plain(said) == _plain(right):
        return True
    if not right.startswith(("{", "[")):
        return False
    try:
        return same_json(json.loads(unfenced(said)), json.loads(right))
    except (ValueError, RecursionError):
        return False


def same_json(one: object, other: object) -> bool:
    """Whether two values are the same in JSON, where true is no 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _stands_in(words: str, text: str) -> bool:
    return regex.search(rf"(?<!\w){regex.escape(words)}(?!\w)", text) is not None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def unfenced(text: str) -> str:
    """What stands in a Markdown fence that is the whole text, else the text."""
    fenced = regex.fullmatch(r"\s*```[\w-]*\s*\n(.*?)\n?\s*```\s*", text, regex.DOTALL)
    return str(fenced[1]) if fenced else text
