"""The user's data: JSON Lines, one prompt a line, with what a good answer to it is.

A row has ``prompt`` (a text, or turns) or ``messages`` (OpenAI's chat format); all else is
optional and says which metrics it gets. Null and empty values are absent. Everything that can be
wrong with a row is said before a model is loaded, with the line.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmquant.errors import UsageError

KEYS = frozenset(
    {"id", "group", "prompt", "messages", "system", "tools", "answer", "answers", "choices"}
    | {"regex", "schema", "tool_call", "tool_calls", "refuse"}
)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's name and the arguments it is called with."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class Example:
    """One row.

    Attributes:
        line: its number in the file, from 1.
        row: as it is in the file, for scorers of the user's own.
        prompt: for people, and what a model without a chat template continues (``plain``).
        messages: the conversation up to the answer, in OpenAI's form.
        answers: that are right; ``said`` is the answer in the data's own conversation.
        right: the place of the right choice.
        validator: of the JSON schema that the answer must fit.
        calls: of tools that are right.
    """

    line: int
    id: str
    group: str | None
    row: Mapping[str, Any]
    prompt: str
    plain: bool
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    answers: tuple[str, ...] = ()
    said: str | None = None
    choices: tuple[str, ...] = ()
    right: int | None = None
    patterns: tuple[Any, ...] = ()
    validator: Any = None
    calls: tuple[Call, ...] = ()
    refuse: bool = False
    tool_validators: Mapping[str, Any] = field(default_factory=dict)

    @property
    def json_answer(self) -> bool:
        """Whether the answer is to be JSON."""
        return self.validator is not None or any(a.startswith(("{", "[")) for a in self.answers)


def example_of(row: Mapping[str, Any], line: int, where: str, system: str | None) -> Example:
    """A row, understood.

    Args:
        where: how errors begin; names the file and the line.
        system: a system message for rows that have none.

    Raises:
        UsageError: a value that cannot be right; names the line and the key.
    """
    given = {k: v for k, v in row.items() if v is not None and v not in ("", [], {})}
    read = _Row(given, where)
    prompt, plain = read.conversation(system)
    messages, said, ending = prompt
    calls = read.calls(ending)
    tools = read.tools()
    choices, right = read.choices()
    group = given.get("group")
    return Example(
        line=line,
        id=str(given.get("id", line)),
        group=None if group is None else str(group),
        row=row,
        prompt=_for_people(messages),
        plain=plain,
        messages=messages,
        tools=tools,
        answers=() if choices else read.answers(),
        said=said,
        choices=choices,
        right=right,
        patterns=read.patterns(),
        validator=None if "schema" not in given else read.schema(given["schema"], "schema"),
        calls=calls,
        refuse=read.flag("refuse"),
        tool_validators=read.tool_validators(tools),
    )


Turns = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row's values by key, each read or refused."""

    given: Mapping[str, Any]
    where: str

    def _wrong(self, why: str) -> UsageError:
        return UsageError(f"{self.where}: {why}")

    def conversation(
        self, system: str | None
    ) -> tuple[tuple[Turns, str | None, Sequence[Any]], bool]:
        """The turns up to the answer, the answer that follows them and its calls; and whether the
        prompt is plain text."""
        prompt, turns = self.given.get("prompt"), self.given.get("messages")
        if prompt is not None and turns is not None:
            raise self._wrong("has prompt and messages; leave one of them out")
        if prompt is None and turns is None:
            raise self._wrong("has no prompt and no messages; give one of them")
        plain = isinstance(prompt, str)
        if plain:
            turns = [{"role": "user", "content": prompt}]
        messages = self._messages(prompt, "prompt") if turns is None else self._messages(turns)
        said, calls = None, ()
        if messages[-1]["role"] == "assistant":
            said, calls = messages[-1].get("content") or None, messages[-1].get("tool_calls", ())
            messages = messages[:-1]
        if not any(str(m.get("content") or "").strip() for m in messages):
            raise self._wrong("the prompt is empty")
        system = self._text("system") or system
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = ({"role": "system", "content": system}, *messages)
        return (messages, said, calls), plain

    def _messages(self, turns: Any, key: str = "messages") -> Turns:
        from llmquant import NotAChatError, parse_chat

        if not isinstance(turns, list):
            raise self._wrong(f"{key} is {_kind(turns)}; give a text or a list of turns")
        try:
            return tuple(parse_chat(turns).plain())
        except NotAChatError as e:
            raise self._wrong(f"{key}: {e}; a turn has a role and a content of text") from e

    def tools(self) -> Turns:
        from llmquant import NotAChatError, parse_chat

        if "tools" not in self.given:
            return ()
        try:
            chat = parse_chat([{"role": "user", "content": ""}], self.given["tools"])
        except NotAChatError as e:
            raise self._wrong(f"tools: {e}") from e
        return tuple(json.loads(chat.tools)) if chat.tools else ()

    def tool_validators(self, tools: Turns) -> dict[str, Any]:
        """Tool name → what checks its arguments."""
        functions = [tool.get("function", tool) for tool in tools]
        for place, function in enumerate(functions):
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise self._wrong(f"tools: number {place + 1} has no name")
        return {
            f["name"]: self.schema(f.get("parameters") or {}, f"tools: parameters of {f['name']}")
            for f in functions
        }

    def calls(self, ending: Sequence[Any]) -> tuple[Call, ...]:
        """The right calls of tools, from ``tool_call`` or the end of the conversation."""
        from llmquant import NotAChatError

        value = self.given.get("tool_call", self.given.get("tool_calls", list(ending)))
        try:
            return parsed_calls(value if isinstance(value, list) else [value])
        except NotAChatError as e:
            raise self._wrong(f'tool_call: {e}; give {{"name": …, "arguments": {{…}}}}') from e

    def answers(self) -> tuple[str, ...]:
        one, several = self.given.get("answer"), self.given.get("answers", [])
        if not isinstance(several, list):
            raise self._wrong(f"answers is {_kind(several)}, not a list; one answer is `answer`")
        values = [*(one if isinstance(one, list) else [one]), *several]
        return tuple(_as_text(v) for v in values if v is not None and v != "")

    def choices(self) -> tuple[tuple[str, ...], int | None]:
        """The texts to choose from, and the place of the right one."""
        value = self.given.get("choices")
        if value is None:
            return (), None
        if not isinstance(value, list) or len(value) < 2:
            raise self._wrong("choices must be a list of two texts or more")
        choices = tuple(map(_as_text, value))
        answer = self.given.get("answer")
        if answer is None:
            raise self._wrong(
                "choices without answer; give the text of the right choice, or its place from 0"
            )
        if _as_text(answer) in choices:
            return choices, choices.index(_as_text(answer))
        letters = string.ascii_uppercase[: len(choices)]
        if isinstance(answer, str) and len(answer) == 1 and answer in letters:
            return choices, letters.index(answer)
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
            return choices, answer
        raise self._wrong(
            f"answer {_as_text(answer)[:80]!r} is none of the {len(choices)} choices; "
            "give the text of the right one, or its place from 0"
        )

    def patterns(self) -> tuple[Any, ...]:
        import regex

        value = self.given.get("regex", [])
        compiled = []
        for pattern in value if isinstance(value, list) else [value]:
            try:
                compiled.append(regex.compile(pattern))
            except (regex.error, TypeError) as e:
                raise self._wrong(f"regex {str(pattern)[:80]!r} cannot be used: {e}") from e
        return tuple(compiled)

    def schema(self, value: Any, key: str) -> Any:
        import jsonschema_rs

        try:
            schema = json.loads(value) if isinstance(value, str) else value
            return jsonschema_rs.validator_for(schema, retriever=_nothing_is_fetched)
        except (ValueError, TypeError, RecursionError) as e:
            why = str(e).splitlines()[0]
            raise self._wrong(f"{key} is no JSON schema that can be used: {why}") from e

    def flag(self, key: str) -> bool:
        value = self.given.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(f"{key} is {_kind(value)}; write true or false")
        return value

    def _text(self, key: str) -> str | None:
        value = self.given.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(f"{key} is {_kind(value)}, not a text")
        return value


def parsed_calls(calls: Sequence[Any]) -> tuple[Call, ...]:
    """Calls in OpenAI's form or bare, their arguments as what they say.

    Raises:
        NotAChatError: one has no name.
    """
    from llmquant import parse_chat

    if not calls:
        return ()
    turn = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    parsed = parse_chat([turn]).plain()[0]["tool_calls"]
    functions = [call.get("function", call) for call in parsed]
    return tuple(Call(f["name"], f.get("arguments", {})) for f in functions)


def _nothing_is_fetched(uri: str) -> Any:
    raise ValueError(f"it refers to {uri}, and nothing is fetched; put that part into the schema")


def _for_people(messages: Turns) -> str:
    """A single question as it is, a conversation with its roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in messages)


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_KINDS: Sequence[tuple[type, str]] = (
    (bool, "true or false"),
    (int, "a number"),
    (float, "a number"),
    (str, "a text"),
    (list, "a list"),
)


def _kind(value: object) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "an object")
