"""Answers for programs: JSON, JSON that fits a schema, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import regex

from llmquant import NotAChatError
from llmquant_eval.validate.answers import Answer, Measured
from llmquant_eval.validate.examples import Call, Example, parsed_calls
from llmquant_eval.validate.metrics.right import final, same_json, unfenced

# Where a model's text says that a call follows: Hermes and Qwen, Mistral, Llama.
_MARKS = regex.compile(
    r"<tool_call>(?P<body>.*?)(?:</tool_call>|\Z)|(?:\[TOOL_CALLS\]|<\|python_tag\|>)(?P<body>.*)",
    regex.DOTALL,
)
_NOTHING: Any = object()


def json_valid(_: Example, measured: Measured) -> float:
    """Whether the whole answer is JSON; one Markdown fence around it is allowed."""
    return float(_parsed(unfenced(final(measured))) is not _NOTHING)


def schema_valid(example: Example, measured: Measured) -> float:
    value = _parsed(unfenced(final(measured)))
    return float(value is not _NOTHING and example.validator.is_valid(value))


def tool_call(example: Example, measured: Measured) -> float:
    """Whether the calls are the right ones: the same names and arguments, in whatever order."""
    calls = _calls(measured)
    if calls is None or len(calls) != len(example.calls):
        return 0.0
    left = list(example.calls)
    for call in calls:
        place = next((i for i, right in enumerate(left) if _same_call(call, right)), None)
        if place is None:
            return 0.0
        del left[place]
    return 1.0


def _same_call(one: Call, other: Call) -> bool:
    return one.name == other.name and same_json(one.arguments, other.arguments)


def tool_call_valid(example: Example, measured: Measured) -> float:
    """Whether every call is JSON, of a tool that was offered, with arguments that fit it. Where the
    data has the right call, there must be one."""
    calls = _calls(measured)
    if calls is None or (example.calls and not calls):
        return 0.0
    known = example.tool_validators
    if not known:
        return 1.0
    return float(all(c.name in known and known[c.name].is_valid(c.arguments) for c in calls))


def _calls(measured: Measured) -> tuple[Call, ...] | None:
    """The answer's calls; None where one cannot be read."""
    assert measured.answer is not None  # metrics that need one are given one
    try:
        given = measured.answer.calls or list(_written(measured.answer))
        calls = parsed_calls(given)
    except (ValueError, RecursionError, NotAChatError):
        return None
    return calls if all(isinstance(c.arguments, dict) for c in calls) else None


def _written(answer: Answer) -> Iterator[dict[str, Any]]:
    """Calls in a model's own text: after the marks of its family, or as the whole answer.

    Raises:
        ValueError: a mark, and no JSON of a call after it.
    """
    text = answer.marked if answer.marked is not None else answer.text
    text = text.rpartition("</think>")[2]
    bodies = [match["body"].strip() for match in _MARKS.finditer(text)]
    for body in bodies:
        yield from _objects(json.loads(body))
    whole = _parsed(unfenced(answer.final))
    if not bodies and isinstance(whole, dict | list):
        try:
            yield from list(_objects(whole))
        except ValueError:  # JSON that is an answer and not a call
            return


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Calls in OpenAI's names; Llama's models say ``parameters``."""
    for item in value if isinstance(value, list) else [value]:
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("no call")
        if "arguments" not in function and "parameters" not in function:
            raise ValueError("no call")
        arguments = function.get("arguments", function.get("parameters"))
        yield {"name": function["name"], "arguments": arguments}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return _NOTHING


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
