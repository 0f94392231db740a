"""What two models' answers to one prompt say about the difference between the models, as HTML.

After the first difference the two answers are different texts, and comparing them token by token
means nothing. So each answer is scored by the other model: the same text before every token, two
opinions of what comes next. Marked in an answer are the first token that differs from the other
answer, and those where the other model would have chosen another token. Everything that comes from
a model is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmquant_serve.chat.replies import Reply
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.detokenize import token_text


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models' opinions of one answer.

    Attributes:
        same: tokens before which both find the same token most likely.
        tokens: of the answer.
        nats: by how much the other model's mean log-probability of the answer is lower, per token.
    """

    same: int
    tokens: int
    nats: float


def agreement(own: Sequence[Token], other: Sequence[Token]) -> Agreement:
    """How far two models agree on an answer.

    Args:
        own: the answer with the log-probabilities of the model that gave it.
        other: the same tokens with those of the other model.
    """
    pairs = list(zip(own, other, strict=True))
    drops = [
        a.logprob - b.logprob for a, b in pairs if a.logprob is not None and b.logprob is not None
    ]
    nats = math.fsum(drops) / len(drops) if drops else 0.0
    return Agreement(sum(not _disagree(a, b) for a, b in pairs), len(pairs), nats)


def divergence(left: Sequence[Token], right: Sequence[Token]) -> int | None:
    """The index of the first token in which two answers differ; None if one begins with the
    other."""
    ids = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(ids) if a.id != b.id), None)


def marked(
    tokenizer: PreTrainedTokenizerBase,
    own: Reply,
    other: Reply,
    scored: Sequence[Token] | None = None,
) -> str:
    """An answer as HTML, marked where it first differs from ``other`` and where the other model
    would have chosen another token.

    Args:
        scored: the tokens of ``own`` with the other model's log-probabilities; None before they
            are known.
    """
    first, start, out = divergence(own.ids, other.ids), 0, []
    for piece in own.pieces:
        indices = range(start, start + len(piece.tokens))
        theirs: Sequence[Token | None] = [None if scored is None else scored[i] for i in indices]
        pairs = list(zip(piece.tokens, theirs, strict=True))
        start = indices.stop
        differs = any(b is not None and _disagree(a, b) for a, b in pairs)
        kind = "first" if first is not None and first in indices else "differs" if differs else ""
        title = "\n".join(line for a, b in pairs for line in _probabilities(tokenizer, a, b))
        text = piece.text or ("■" if piece.finish == "stop" else "")
        out.append(f'<span class="{kind}" title="{html.escape(title)}">{html.escape(text)}</span>')
    return f'<div class="ab">{"".join(out)}</div>'


def _disagree(a: Token, b: Token) -> bool:
    """Whether two models find different tokens most likely at one position."""
    return bool(a.top and b.top and a.top[0][0] != b.top[0][0])


def _probabilities(
    tokenizer: PreTrainedTokenizerBase, token: Token, other: Token | None
) -> list[str]:
    """A token and its alternatives with probabilities, ``' river' 0.412 (' house' 0.2, …)``, and
    below it the same of the other model."""
    text = repr(token_text(tokenizer, token.id))
    lines = [(text, token)] if other is None else [(text, token), ("the other model:", other)]
    return [f"{said} {_opinion(tokenizer, t)}".strip() for said, t in lines]


def _opinion(tokenizer: PreTrainedTokenizerBase, token: Token) -> str:
    if token.logprob is None:
        return ""
    others = ", ".join(
        f"{token_text(tokenizer, i)!r} {math.exp(p):.3f}" for i, p in token.top if i != token.id
    )
    return f"{math.exp(token.logprob):.3f}" + (f" ({others})" if others else "")


def verdict(
    tokenizer: PreTrainedTokenizerBase, ours: Reply, original: Reply, found: Agreement | None
) -> str:
    """What the two answers say, as a sentence and numbers.

    Args:
        ours: of the served model.
        found: how far the models agree on the original's answer; None if it is not known.
    """
    tiles = [] if found is None else _agreement_tiles(found)
    ratio = ours.speed / original.speed if original.speed else 0.0
    tiles.append(
        _tile("Speed", f"{ratio:.2f}×", f"{ours.speed:.1f} against {original.speed:.1f} tokens/s")
    )
    sentence = html.escape(_first_difference(tokenizer, ours, original))
    return f'<p class="verdict">{sentence}</p><div class="tiles">{"".join(tiles)}</div>'


def _first_difference(tokenizer: PreTrainedTokenizerBase, ours: Reply, original: Reply) -> str:
    first = divergence(ours.ids, original.ids)
    if first is None:
        shorter, longer = sorted((ours.tokens, original.tokens))
        if shorter == longer:
            return f"All {longer} tokens are the same."
        return f"The same for {shorter} tokens, where one answer ends."
    said = [
        f"{token_text(tokenizer, t.id)!r}"
        + (f" ({math.exp(t.logprob):.0%})" if t.logprob is not None else "")
        for t in (original.ids[first], ours.ids[first])
    ]
    return f"The first difference is at token {first + 1}: the original says {said[0]}, this model {said[1]}."


def _agreement_tiles(found: Agreement) -> list[str]:
    share = f"{found.same / found.tokens:.0%}" if found.tokens else "–"
    return [
        _tile(
            "Same next token",
            share,
            f"{found.same} of {found.tokens} tokens of the original's answer",
        ),
        _tile(
            "Log-probability",
            f"{-found.nats:+.3f}".replace("-", "−"),
            "nats per token of the original's answer under this model",
        ),
    ]


def _tile(title: str, number: str, detail: str) -> str:
    return f'<div class="tile"><span>{title}</span><strong>{number}</strong><small>{detail}</small></div>'
