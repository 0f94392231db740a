"""Does the answer leave the language of the prompt?

Two signs. A script that the prompt does not have: ``YEL被`` after an English question (Latin is
allowed everywhere, for names and code; but an answer to a prompt in another script must be in it
for the most part). And, between languages in Latin letters, words that dictionaries know in another
language and not in the prompt's: "Bienvenido, I am your humble servant"; or an answer of which
another language knows far more words. Code, what the prompt says itself and names (a capital inside
a sentence) do not count.

The dictionaries are simplemma's. A text that asks for another language ("translate …") has the sign
in both models, so it does not tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

import regex

from llmquant_eval.validate.answers import Measured
from llmquant_eval.validate.examples import Example
from llmquant_eval.validate.metrics.behaviour import answer_of

LANGUAGES = ("en", "es", "fr", "de", "it", "pt")
_SHORTEST = 4  # letters of a word that is looked up: shorter ones are in all dictionaries
_MAIN_SHARE, _SURE_SHARE = 0.5, 0.9
_FEWEST, _FAR_MORE = 4, 0.3  # words, and share of them
_LEAST_SHARE = 0.03
"""Of an answer's words. Of 97 paragraphs of Wikipedia (examples/tiny-llama/heldout.txt) 12 have a
foreign word, nearly all of them a quotation in a long text."""
_CODE = regex.compile(r"```.*?(?:```|\Z)|`[^`]*`|https?://\S+|\S*[_@/\\<>{}=()]\S*", regex.DOTALL)
_WORD = regex.compile(r"(?<start>\A\W*|[.!?:\n]\W*)?(?<![\w.'’-])(?<word>\p{Latin}+)(?![\w'’-])")
_SCRIPTS = (
    *("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil", "Thai"),
    *("Georgian", "Armenian", "Ethiopic", "Hangul", "Han", "Kana"),
)
_SCRIPT = regex.compile(
    "|".join(
        rf"(?P<{s}>[\p{{Hiragana}}\p{{Katakana}}])" if s == "Kana" else rf"(?P<{s}>\p{{{s}}})"
        for s in _SCRIPTS
    )
)


def language_switch(example: Example, measured: Measured) -> float:
    prompt = _prose(" ".join(str(m.get("content") or "") for m in example.messages))
    said = _prose(answer_of(measured).text)
    if _leaves_script(prompt, said):
        return 1.0
    own = _language(prompt)
    if own is None:
        return 0.0
    foreign, words = sum(1 for _ in _foreign_words(own, prompt, said)), _WORD.findall(said)
    return float(
        (foreign > 0 and foreign >= _LEAST_SHARE * len(words)) or _is_another_language(own, said)
    )


def _prose(text: str) -> str:
    return str(_CODE.sub(" ", text))


def _leaves_script(prompt: str, said: str) -> bool:
    asked, got = _scripts(prompt), _scripts(said)
    if not asked or not got:
        return False
    if got.keys() - asked.keys() - {"Latin"}:
        return True
    others = asked.keys() - {"Latin"}
    mostly = max(asked, key=lambda s: asked[s])
    if mostly == "Latin" or not others:
        return False
    return sum(got[s] for s in others) < _MAIN_SHARE * sum(got.values())


def _scripts(text: str) -> Counter[str]:
    """Letters by script."""
    return Counter(match.lastgroup for match in _SCRIPT.finditer(text) if match.lastgroup)


def _foreign_words(own: str, prompt: str, said: str) -> Iterator[str]:
    """Words of the answer that are another language's."""
    others = tuple(name for name in LANGUAGES if name != own)
    known = {word.casefold() for word in regex.findall(r"\p{L}+", prompt)}
    for match in _WORD.finditer(said):
        word, starts = match["word"], match["start"] is not None
        name = word[0].isupper() and (not starts or word.isupper())
        if len(word) < _SHORTEST or name or word.casefold() in known:
            continue
        if not _in_dictionary(word, (own,)) and _in_dictionary(word, others):
            yield word


def _is_another_language(own: str, said: str) -> bool:
    """Whether another language knows far more of the answer's words than the prompt's does."""
    words = _words(said)
    if len(words) < _FEWEST or (known := _share(words, own)) >= _SURE_SHARE:
        return False
    return any(_share(words, other) >= known + _FAR_MORE for other in LANGUAGES if other != own)


def _language(prompt: str) -> str | None:
    """The one whose dictionary knows most of the words; None where none knows half of them."""
    words, shares = _words(prompt), dict[str, float]()
    if not words:
        return None
    for name in LANGUAGES:
        shares[name] = _share(words, name)
        if shares[name] >= _SURE_SHARE:  # a dictionary takes seconds to load
            return name
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _MAIN_SHARE else None


def _words(text: str) -> list[str]:
    return list(regex.findall(r"\p{Latin}{2,}", text)[:200])


def _share(words: Sequence[str], language: str) -> float:
    return sum(_in_dictionary(word, (language,)) for word in words) / len(words)


@cache
def _in_dictionary(word: str, languages: tuple[str, ...]) -> bool:
    from simplemma import is_known

    return bool(is_known(word, languages, low_memory=True))
