"""lm-eval's WikiText detokenizer: undoing the spaces that WikiText's tokenization put around
punctuation and numbers.

The substitutions, and their order, are those of lm-eval's ``wikitext`` task (after Megatron-LM),
quirks included: the pattern with slashes never matches, and ``" N "`` becomes ``" 1 "``. A test
holds this table against lm-eval's own function.
"""

from __future__ import annotations

import re

_STEPS: tuple[tuple[str, str] | tuple[re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def wikitext_detokenize(text: str) -> str:
    """The text with ordinary spacing around punctuation and numbers."""
    for pattern, replacement in _STEPS:
        text = (
            text.replace(pattern, replacement)
            if isinstance(pattern, str)
            else pattern.sub(replacement, text)
        )
    return text
