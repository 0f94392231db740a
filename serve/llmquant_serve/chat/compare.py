"""Two replies side by side as HTML: every token with its probability on hover, and the tokens in
which the two differ.

After the first difference the two models read different texts, so later differences follow from it.
So it alone is marked strongly, the others faintly. Everything that comes from a model is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from llmquant_serve.engines.base import Token
from llmquant_serve.generation.detokenize import token_text
from llmquant_serve.generation.pieces import Piece

CSS = """
.ab { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; min-height: 6em; }
.ab span { border-radius: 3px; }
.ab .differs { background: rgba(245, 158, 11, .22); }
.ab .first { background: rgba(239, 68, 68, .35); outline: 2px solid rgb(239, 68, 68); }
.ab span:hover { outline: 1px solid currentColor; }
"""


def divergence(left: Sequence[Piece], right: Sequence[Piece]) -> int | None:
    """The index of the first token in which two replies differ; None if one begins with the
    other."""
    ids = zip(_tokens(left), _tokens(right), strict=False)
    return next((i for i, (a, b) in enumerate(ids) if a.id != b.id), None)


def marked(tokenizer: PreTrainedTokenizerBase, own: Sequence[Piece], other: Sequence[Piece]) -> str:
    """A reply as HTML, marked where it differs from ``other``."""
    first, other_tokens, start, out = divergence(own, other), _tokens(other), 0, []
    for piece in own:
        indices = range(start, start + len(piece.tokens))
        pairs = zip(piece.tokens, other_tokens[start : indices.stop], strict=False)
        differs = any(a.id != b.id for a, b in pairs)
        start = indices.stop
        kind = "first" if first is not None and first in indices else "differs" if differs else ""
        title = "\n".join(_probabilities(tokenizer, t) for t in piece.tokens)
        text = piece.text or ("⏹" if piece.finish == "stop" else "")
        out.append(f'<span class="{kind}" title="{html.escape(title)}">{html.escape(text)}</span>')
    return f'<div class="ab">{"".join(out)}</div>'


def _tokens(pieces: Sequence[Piece]) -> list[Token]:
    return [token for piece in pieces for token in piece.tokens]


def _probabilities(tokenizer: PreTrainedTokenizerBase, token: Token) -> str:
    """A token and its alternatives, with probabilities: ``" river" 0.412 (" house" 0.2, …)``."""
    text = repr(token_text(tokenizer, token.id))
    if token.logprob is None:
        return text
    others = ", ".join(
        f"{token_text(tokenizer, i)!r} {math.exp(p):.3f}" for i, p in token.top if i != token.id
    )
    return f"{text} {math.exp(token.logprob):.3f}" + (f" ({others})" if others else "")
