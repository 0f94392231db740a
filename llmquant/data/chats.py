"""Chats as they are stored, made ready for a chat template.

A turn has a role and a text. The text may come as parts (``[{"type": "text", "text": …}]``), as
OpenAI's clients send it; parts are joined. Turns of models that call tools have more, and a
template writes that too: ``tool_calls`` (or the older ``function_call``), ``tool_call_id`` and
``name`` of a tool's answer, ``reasoning_content``; and a chat may name its ``tools`` beside its
turns. Arguments that are a string of JSON become what they say, because templates write them with
``tojson`` and would quote them twice. Null and empty mean absent: a table of Arrow fills every key
that another row has with null.

What no text model reads (pictures, sound) is no chat here; the caller counts it by reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_KEPT = ("tool_call_id", "reasoning_content")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat. ``more``: its further fields as a JSON object, empty for none."""

    role: str
    content: str
    more: str = ""

    def plain(self) -> dict[str, Any]:
        """As a template reads it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        return turn | json.loads(self.more) if self.more else turn

    @property
    def empty(self) -> bool:
        """Whether the turn says and calls nothing."""
        return not (self.content.strip() or self.more)

    @property
    def called(self) -> list[str]:
        """Names of the functions that the turn calls."""
        calls = self.plain().get("tool_calls", []) if self.more else []
        return [name for call in calls if isinstance(name := _function(call).get("name"), str)]


@dataclass(frozen=True, slots=True)
class Chat:
    """Turns, and the tools that the model was offered, as a JSON list; empty for none."""

    messages: tuple[Message, ...]
    tools: str = ""

    def plain(self) -> list[dict[str, Any]]:
        """The turns as a template reads them."""
        return [message.plain() for message in self.messages]

    @property
    def offered(self) -> list[str]:
        """Names of the tools."""
        tools = json.loads(self.tools) if self.tools else []
        return [name for tool in tools if isinstance(name := _function(tool).get("name"), str)]

    def as_json(self) -> object:
        """What identifies the chat: its turns, with its tools where it has any."""
        if not self.tools:
            return self.plain()
        return {"messages": self.plain(), "tools": json.loads(self.tools)}

    @property
    def empty(self) -> bool:
        """Whether no turn says or calls anything."""
        return all(m.empty for m in self.messages)

    def __len__(self) -> int:
        """Characters."""
        return len(self.tools) + sum(len(m.content) + len(m.more) for m in self.messages)


class NotAChatError(ValueError):
    """Why a value is no chat, in a few words that rows are counted by."""


def parse_chat(turns: Sequence[object], tools: object = None) -> Chat:
    """A chat of a record's values.

    Raises:
        NotAChatError: it has no turns, or one that is neither text nor calls.
    """
    if not turns:
        raise NotAChatError("no messages")
    messages = tuple(map(_message, turns))
    offered = _json_list(tools, "tools that are not a list of objects")
    chat = Chat(messages, _dumped(offered) if offered else "")
    if not is_unicode(json.dumps(chat.as_json(), ensure_ascii=False)):
        raise NotAChatError("not Unicode")
    return chat


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can escape but no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _message(turn: object) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise NotAChatError("neither text nor chat")
    more: dict[str, object] = {}
    calls = [_call(call) for call in _calls(turn)]
    if calls:
        more["tool_calls"] = calls
    if "content" not in turn and not calls:
        raise NotAChatError("neither text nor chat")
    for name in (*_KEPT, *(("name",) if turn["role"] in ("tool", "function") else ())):
        if isinstance(value := turn.get(name), str) and value:
            more[name] = value
    return Message(turn["role"], _text(turn.get("content")), _dumped(more) if more else "")


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NotAChatError("a turn that is not plain text")
    return "".join(map(_part, content))


def _part(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    kind = (part.get("type") or "text") if isinstance(part, dict) else "text"
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise NotAChatError("a turn that is not plain text")
    return text


def _calls(turn: Mapping[str, object]) -> list[dict[str, Any]]:
    calls = _json_list(turn.get("tool_calls"), "tool calls that are not a list of objects")
    older = turn.get("function_call")
    older = _without_nulls(older) if isinstance(older, dict) else None
    return [{"type": "function", "function": older}] if older and not calls else calls


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as what they say."""
    function = _function(call)
    if not isinstance(function.get("name"), str):
        raise NotAChatError("a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            parsed = arguments  # a model's own words may be no JSON
        function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {**call, "function": function} if isinstance(call.get("function"), dict) else function


def _function(call: Mapping[str, Any]) -> dict[str, Any]:
    """``{"function": {…}}`` as OpenAI has it, or the bare ``{"name", "arguments"}``."""
    inner = call.get("function")
    return inner if isinstance(inner, dict) else dict(call)


def _json_list(value: object, otherwise: str) -> list[dict[str, Any]]:
    """A list of objects without nulls, given as one or as a string of JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise NotAChatError(otherwise) from e
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise NotAChatError(otherwise)
    return [_without_nulls(item) for item in value]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _dumped(value: object) -> str:
    """JSON with the keys in their order, which a template writes."""
    return json.dumps(value, ensure_ascii=True)
