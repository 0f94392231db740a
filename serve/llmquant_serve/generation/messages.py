"""Chat turns as clients send them, and what every part of a request has in common.

Null and empty mean absent: clients send every field that they know, and answers come back as they
were dumped (``tool_calls: null``, ``annotations: []``, ``refusal: ""``). So such values are taken
out before anything is checked. What is left and unknown is an error that names it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_EMPTY: tuple[object, ...] = (None, "", [], {})


class Strict(BaseModel):
    """A part of a request: unknown fields, other types and infinities are errors; fields that are
    null or empty are absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    # Fields whose emptiness says something, and values of others that change nothing.
    required: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if not cls._is_neutral(k, v)}

    @classmethod
    def _is_neutral(cls, name: str, value: object) -> bool:
        absent = cls.neutral.get(name, ()) + (() if name in cls.required else _EMPTY)
        return any(type(value) is type(n) and value == n for n in absent)


class TextPart(Strict):
    required = frozenset({"type", "text"})
    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn. Images, sound and tool calls are not understood.

    An assistant's turn may have no content. ``type`` is what some clients add to every turn.
    """

    required = frozenset({"role", "content"})
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description='a text or a list of parts of type "text"')
    name: str | None = None
    type: Literal["text", "message"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _silent_assistant(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "assistant":
            silent = data.get("content") in (None, [])
            return data | {"content": ""} if silent else data
        return data
