"""A chat as the tokenizer's template writes it.

A template may read a turn's text as a string, or only as a list of parts; the other form it drops
or prints as Python. The string is tried first, and parts where the string's text does not come out.
``developer`` is OpenAI's newer word for ``system``; where the template does not name it, it reads
``system``, as a server of the model gives it.

A chat of which no text comes out, or whose calls of tools do not, is refused: what it would teach
is the template's frame alone. One that comes out but for its tools or one of its turns is used, and
counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmquant.data.chats import Chat
from llmquant.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_REASON = 200
_NAMES_DEVELOPER = re.compile(r"""(["'])developer\1""")
_WORD = re.compile(r"\w+")
_PARTS_PRINTED = ("'type': 'text'", '"type": "text"')


def template_faults() -> tuple[type[Exception], ...]:
    """What a template's expressions raise on turns that it does not expect."""
    from jinja2 import TemplateError

    return (
        *(TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
        *(RuntimeError, MemoryError),
    )


class NotRenderedError(ValueError):
    """Why a template does not write a chat, in words that rows are counted by."""


def render(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    incomplete: Counter[str] | None = None,
) -> str:
    """The chat as text, special tokens included.

    Args:
        incomplete: counts chats of which a part is left out, by what.

    Raises:
        SourceError: the tokenizer has no template that can be used.
        NotRenderedError: the template refuses this chat, or leaves out its text or its tool calls.
    """
    tools = json.loads(chat.tools) if chat.tools else None
    template = _template(tokenizer, tools, source)
    turns = chat.plain()
    if not _NAMES_DEVELOPER.search(template):
        turns = [t | {"role": "system"} if t["role"] == "developer" else t for t in turns]
    text = _write(tokenizer, turns, tools)
    said = [m.content.strip() for m in chat.messages if m.content.strip()]
    if _shown(said, text) < len(said):
        text = _by_parts(tokenizer, turns, tools, said, text)
    if said and not _shown(said, text):
        raise NotRenderedError("chats whose text the chat template leaves out")
    if any(name not in text for m in chat.messages for name in m.called):
        raise NotRenderedError("chats whose tool calls the chat template leaves out")
    if incomplete is not None:
        incomplete.update(_left_out(chat, said, text))
    return text


def _left_out(chat: Chat, said: Sequence[str], text: str) -> Iterator[str]:
    """What of a chat left no trace in the text. A turn did if its longest word is there: templates
    trim, escape, and cut what an assistant thought."""
    if any(name not in text for name in chat.offered):
        yield "chats whose tools the chat template leaves out"
    words = (_WORD.findall(s.rpartition("</think>")[2]) for s in said)
    if any(max(w, key=len) not in text for w in words if w):
        yield "chats of which the chat template leaves out a turn"


def _template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, source: str) -> str:
    if not tokenizer.chat_template:
        raise SourceError(
            f"{source} holds chats, but the tokenizer has no chat template; name a field of plain text"
        )
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as e:
        raise SourceError(
            f"{source} holds chats, but the tokenizer's chat template cannot be used: {e}"
        ) from e


def _write(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    tools: list[Any] | None,
) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False))
    except template_faults() as e:
        why = " ".join(str(e).split())[:_LONGEST_REASON]
        raise NotRenderedError(f"refused by the chat template: {why}") from e


def _by_parts(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[dict[str, Any]],
    tools: list[Any] | None,
    said: Sequence[str],
    text: str,
) -> str:
    """The chat written from parts, where more of it comes out than of ``text``."""
    parted = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    try:
        other = _write(tokenizer, parted, tools)
    except NotRenderedError:
        return text
    printed = any(mark in other for mark in _PARTS_PRINTED)
    return other if not printed and _shown(said, other) > _shown(said, text) else text


def _shown(said: Sequence[str], text: str) -> int:
    return sum(words in text for words in said)
