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

CSS = """
#chat { height: 50vh; overflow-y: auto; display: flex; flex-direction: column-reverse; }
#chat .turn { display: flex; margin: .5em 0; gap: .4em; align-items: flex-start; }
#chat .turn.user { justify-content: flex-end; }
#chat .message { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 85%; padding: .5em .8em;
  border-radius: 10px; background: var(--background-fill-secondary); min-height: 1em; }
#chat .user .message { background: var(--color-accent-soft); }
#chat code { font-family: var(--font-mono); background: none; padding: 0; white-space: pre-wrap; }
#chat code.block { display: inline-block; width: 100%; background: var(--background-fill-primary);
  border-radius: 6px; }
#chat button.copy { font-size: .75em; opacity: .5; border: none; background: none; cursor: pointer; }
#chat button.copy:hover { opacity: 1; }
"""

# What is set differently: fenced code (perhaps still being written), code in a line, strong text.
_STYLED = re.compile(
    r"(?P<block>^ {0,3}(?P<fence>```+|~~~+)[^\n]*\n(?:.*?^ {0,3}(?P=fence)[`~]*[ \t]*$|.*\Z))"
    r"|(?P<code>(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`))"
    r"|(?P<strong>\*\*(?=\S)[^\n*]+(?<=\S)\*\*|^ {0,3}#{1,6} [^\n]+)",
    re.MULTILINE | re.DOTALL,
)
_TAGS = {
    "block": ('<code class="block">', "</code>"),
    "code": ("<code>", "</code>"),
    "strong": ("<strong>", "</strong>"),
}
_COPY = (
    '<button class="copy" title="Copy" '
    "onclick=\"navigator.clipboard.writeText(this.parentElement.querySelector('.message').textContent)\">Copy</button>"
)


def transcript(turns: Sequence[Mapping[str, str]]) -> str:
    """The messages of a conversation, oldest first."""
    return f'<div class="turns">{"".join(map(_turn, turns))}</div>'


def _turn(turn: Mapping[str, str]) -> str:
    side = "user" if turn["role"] == "user" else "bot"
    message = f'<div class="{side} message">{styled(turn["content"])}</div>'
    return f'<div class="turn {side}">{message}{_COPY}</div>'


def styled(text: str) -> str:
    """A text as HTML; without its tags it is the escaped text."""
    out, end = [], 0
    for match in _STYLED.finditer(text):
        before, after = _TAGS[next(kind for kind in _TAGS if match[kind] is not None)]
        out += [html.escape(text[end : match.start()]), before, html.escape(match[0]), after]
        end = match.end()
    return "".join([*out, html.escape(text[end:])])
