"""Does the answer leave the language of the prompt?

Two signs. A script that the prompt does not have: ``YEL被`` after an English question (Latin is
allowed everywhere, for names and code; but an answer to a prompt in another script must be in it
for the most part). And, between languages in Latin letters, a word that dictionaries know in
another language and not in the prompt's: "Bienvenido, I am your humble servant". Code, what the
prompt says itself and names (a capital inside a sentence) do not count.

The dictionaries are simplemma's. A text that asks for another language ("translate …") has the sign
in both models, so it does not tell them apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache

import regex

from llmquant_eval.validate.answers import Measured
from llmquant_eval.validate.examples import Example
from llmquant_eval.validate.metrics.behaviour import answer_of

LANGUAGES = ("en", "es", "fr", "de", "it", "pt")
_SHORTEST = 4  # letters of a word that is looked up: shorter ones are in all dictionaries
_MAIN_SHARE, _SURE_SHARE = 0.5, 0.9
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
    foreign, words = sum(1 for _ in _foreign_words(prompt, said)), len(_WORD.findall(said))
    return float(foreign > 0 and foreign >= _LEAST_SHARE * words)


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


def _foreign_words(prompt: str, said: str) -> Iterator[str]:
    """Words of the answer that are another language's."""
    own = _language(prompt)
    if own is None:
        return
    others = tuple(name for name in LANGUAGES if name != own)
    known = {word.casefold() for word in regex.findall(r"\p{L}+", prompt)}
    for match in _WORD.finditer(said):
        word, starts = match["word"], match["start"] is not None
        name = word[0].isupper() and (not starts or word.isupper())
        if len(word) < _SHORTEST or name or word.casefold() in known:
            continue
        if not _in_dictionary(word, (own,)) and _in_dictionary(word, others):
            yield word


def _language(prompt: str) -> str | None:
    """Of the words that are long enough to tell; None for another one, or too few words."""
    words = regex.findall(r"\p{Latin}{2,}", prompt)[:200]
    if not words:
        return None
    shares: dict[str, float] = {}
    for name in LANGUAGES:
        shares[name] = sum(_in_dictionary(w, (name,)) for w in words) / len(words)
        if shares[name] >= _SURE_SHARE:  # a dictionary takes seconds to load
            return name
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= _MAIN_SHARE else None


@cache
def _in_dictionary(word: str, languages: tuple[str, ...]) -> bool:
    from simplemma import is_known

    return bool(is_known(word, languages))
