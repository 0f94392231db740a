"""A conversation as HTML in which every character of every message is shown, and nothing else.

The text of each message, as the browser has it, equals what was sent or received: ``<name>``,
``vector<int>``, ``&lt;``, two asterisks. Everything is escaped. Markdown is styled and not
consumed: code is set as code and strong text is bold, with the signs that say so left in place.
Nothing becomes a link or an image, so a reply cannot make the browser fetch anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence

# What is set differently: fenced code (perhaps still being written), code in a line, strong text.
_STYLED = re.compile(
    r"(?P<block>^ {0,3}(?P<fence>```+|~~~+)[^\n]*\n(?:.*?^ {0,3}(?P=fence)[`~]*[ \t]*$|.*\Z))"
    r"|(?P<code>(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<strong>\*\*(?=\S)[^\n*]+(?<=\S)\*\*|^ {0,3}#{1,6} [^\n]+)",
    re.MULTILINE | re.DOTALL,
)
# The same parts as sign, inside and sign.
_SIGNS = {
    "block": re.compile(
        r"([^\n]*\n)(.*?)((?:^ {0,3}(?:```+|~~~+)[ \t]*\Z)?)", re.MULTILINE | re.DOTALL
    ),
    "code": re.compile(r"(`+)(.*?)(`+)", re.DOTALL),
    "strong": re.compile(r"(\*\*| {0,3}#{1,6} )(.*?)((?:\*\*)?)", re.DOTALL),
}
_COPY = '<button class="copy" type="button" title="Copy this text">Copy</button>'
_EMPTY = """<div class="empty"><h2>Ask {name} something</h2>
<p>Type a message below, or begin with an example.</p></div>"""
_WAITING = '<div class="turn bot waiting" title="Reading the message"><i></i><i></i><i></i></div>'


def transcript(turns: Sequence[Mapping[str, str]], name: str, *, busy: bool = False) -> str:
    """The messages of a conversation, oldest first; without any, what to do.

    Args:
        name: of the model.
        busy: a reply is on its way.
    """
    shown = "".join(map(_turn, turns)) or _EMPTY.format(name=html.escape(name))
    waiting = _WAITING if busy and turns[-1]["role"] == "user" else ""
    return f'<div class="turns" role="log" aria-busy="{str(busy).lower()}">{shown}{waiting}</div>'


def _turn(turn: Mapping[str, str]) -> str:
    side = "user" if turn["role"] == "user" else "bot"
    message = f'<div class="{side} message">{styled(turn["content"])}</div>'
    return f'<div class="turn {side}">{message}{_COPY}</div>'


def styled(text: str) -> str:
    """A text as HTML; without its tags it is the escaped text."""
    out, end = [], 0
    for match in _STYLED.finditer(text):
        kind = next(kind for kind in _SIGNS if match[kind] is not None)
        out += [html.escape(text[end : match.start()]), _set(kind, match[0])]
        end = match.end()
    return "".join([*out, html.escape(text[end:])])


def _set(kind: str, text: str) -> str:
    """A part that is set differently, the signs at its ends fainter than what they enclose."""
    signs = _SIGNS[kind].fullmatch(text)
    assert signs is not None
    before, inner, after = (html.escape(part) for part in signs.groups())
    tag = "strong" if kind == "strong" else "code"
    attribute = ' class="block"' if kind == "block" else ""
    parts = (f'<span class="sign">{before}</span>', inner, f'<span class="sign">{after}</span>')
    return f"<{tag}{attribute}>{''.join(parts)}</{tag}>"
