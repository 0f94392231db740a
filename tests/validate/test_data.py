"""The user's file: what is understood, what is neutral, what is refused, and that the line is
named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from validate_kit import example, write_rows

from llmquant.errors import SourceError, UsageError
from llmquant_eval.texts.json_lines import LONGEST
from llmquant_eval.validate.data import read_data
from llmquant_eval.validate.examples import Call

OK = {"prompt": "hello"}
TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        pytest.param({"answer": "x"}, "has no prompt and no messages", id="no prompt"),
        pytest.param({"prompt": None, "messages": []}, "has no prompt and no", id="null prompt"),
        pytest.param({"prompt": "a", "messages": [TURN]}, "prompt and messages", id="both"),
        pytest.param({"prompt": "  "}, "the prompt is empty", id="blank prompt"),
        pytest.param({"prompt": 5}, "prompt is a number; give", id="prompt of another type"),
        pytest.param({"messages": "hi"}, "messages is a text", id="messages of another type"),
        pytest.param({"messages": [{"role": "user"}]}, "messages: neither text", id="no content"),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a turn that is not plain text",
            id="a picture",
        ),
        pytest.param(OK | {"choices": ["a", "b"]}, "choices without answer", id="no answer key"),
        pytest.param(OK | {"choices": ["a"], "answer": 0}, "two texts or more", id="one choice"),
        pytest.param(
            OK | {"choices": ["a", "b"], "answer": 2}, "answer '2' is none of the 2", id="index"
        ),
        pytest.param(
            OK | {"choices": ["a", "b"], "answer": True}, "'true' is none", id="a truth for index"
        ),
        pytest.param(OK | {"answers": "a"}, "answers is a text, not a list", id="answers"),
        pytest.param(OK | {"regex": "("}, "regex '(' cannot be used", id="pattern"),
        pytest.param(OK | {"regex": 5}, "regex '5' cannot be used", id="pattern of another type"),
        pytest.param(OK | {"schema": {"type": "objekt"}}, "schema is no JSON schema", id="schema"),
        pytest.param(
            OK | {"schema": {"$ref": "http://127.0.0.1:9/s.json"}},
            "nothing is fetched",
            id="schema elsewhere",
        ),
        pytest.param(OK | {"tool_call": {"arguments": {}}}, "tool_call: a tool call", id="call"),
        pytest.param(OK | {"tools": [{"type": "function"}]}, "tools: number 1 has", id="tool"),
        pytest.param(OK | {"tools": 5}, "tools: tools that are not a list", id="tools"),
        pytest.param(OK | {"refuse": "yes"}, "refuse is a text", id="flag"),
        pytest.param(OK | {"system": 5}, "system is a number", id="system"),
        pytest.param("[1, 2]", "is a list; the file must be JSON Lines", id="a list"),
        pytest.param("5", "is no object", id="a number"),
        pytest.param('{"prompt": "a"', "is not JSON", id="cut"),
        pytest.param('{"prompt": "\\ud800"}', "not Unicode", id="half a character"),
        pytest.param(
            '{"prompt": "a", "id": "\\ud800"}', "not Unicode", id="half a character in an id"
        ),
        pytest.param("[" * 100_000, "is not JSON", id="brackets"),
        pytest.param({"id": 1, "prompt": "again"}, "id '1' is that of line 1", id="same id"),
        pytest.param({"prompt": "x", "answer": float("nan")}, "NaN is no JSON", id="NaN"),
        pytest.param(
            {"prompt": "x" * 10_000_000}, "longer than 4 MB; is it one object", id="10 MB"
        ),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(row: object, says: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "prod.jsonl", {"id": 1, **OK}, "", row)
    with pytest.raises(UsageError) as refused:
        read_data(str(file), None, None)
    assert str(refused.value).startswith(f"{file}, line 3")
    assert says in str(refused.value)


def test_a_line_of_the_longest_length_is_read(tmp_path: Path) -> None:
    frame = len('{"prompt": ""}\n')
    file = write_rows(tmp_path / "prod.jsonl", {"prompt": "x" * (LONGEST - frame)})
    assert len(read_data(str(file), None, None).examples) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"\n \r\n\n", "is empty", id="blank lines"),
        pytest.param(b"\xef\xbb\xbf", "is empty", id="a mark alone"),
        pytest.param(b'{"prompt": "\xff"}', "line 1 is not UTF-8", id="another encoding"),
        pytest.param(None, "is not a file", id="no file"),
    ],
)
def test_a_file_with_nothing_in_it_is_refused(
    content: bytes | None, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "prod.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((SourceError, UsageError), match=says):
        read_data(str(file), None, None)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}', id="byte-order mark"),
        pytest.param(b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n', id="CRLF"),
        pytest.param(b'{"prompt": "a"}\n{"prompt": "b"}\n\n\n', id="blank lines at the end"),
        pytest.param(b'{ "prompt" : "a" }\n{"prompt":"b"}', id="spaces"),
    ],
)
def test_line_ends_and_marks_change_nothing(content: bytes, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", {"prompt": "a"}, {"prompt": "b"})
    other = tmp_path / "other.jsonl"
    other.write_bytes(content)
    ours, theirs = (read_data(str(f), None, None) for f in (plain, other))
    assert ours.examples == theirs.examples
    assert ours.sha256 == theirs.sha256


def test_null_and_empty_values_are_absent() -> None:
    keys = ("system", "tools", "answer", "answers", "choices", "regex", "schema", "tool_call")
    plain = example()
    for nothing in (None, "", [], {}):
        found = example(group=None, refuse=None, **dict.fromkeys(keys, nothing))
        assert (found.messages, found.answers, found.calls) == (plain.messages, (), ())
        assert (found.group, found.choices, found.patterns) == (None, (), ())
        assert (found.validator, found.refuse) == (None, False)


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        pytest.param(["x", "y"], "y", 1, id="text"),
        pytest.param(["x", "y"], 0, 0, id="place"),
        pytest.param(["x", "y"], "B", 1, id="letter"),
        pytest.param(["B", "A"], "A", 1, id="a text before a letter"),
        pytest.param([2, 1], 1, 1, id="a number that is a text before a place"),
    ],
)
def test_the_right_choice(choices: list[Any], answer: object, right: int) -> None:
    assert example(choices=choices, answer=answer).right == right


@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"name": "f", "arguments": {"a": 1}}, id="bare"),
        pytest.param([{"name": "f", "arguments": '{"a": 1}'}], id="arguments as text"),
        pytest.param({"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}, id="OpenAI"),
    ],
)  # fmt: skip
def test_calls_are_understood_in_every_form(call: object) -> None:
    assert example(tool_call=call).calls == (Call("f", {"a": 1}),)
    assert example(tool_calls=call).calls == (Call("f", {"a": 1}),)


def test_a_conversation_that_ends_with_the_answer_gives_it() -> None:
    turns = [TURN, {"role": "assistant", "content": "hello"}]
    found = example(prompt=None, messages=turns)
    assert (len(found.messages), found.said, found.answers) == (1, "hello", ())
    call = {"function": {"name": "f", "arguments": "{}"}}
    calling = [TURN, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert example(prompt=None, messages=calling).calls == (Call("f", {}),)


def test_a_system_message_is_put_before_prompts_without_one() -> None:
    from llmquant_eval.validate.examples import example_of

    own = [{"role": "system", "content": "own"}, TURN]
    for row, first in (
        ({"prompt": "a"}, "general"),
        ({"prompt": "a", "system": "row's"}, "row's"),
        ({"messages": own}, "own"),
    ):
        assert example_of(row, 1, "x", "general").messages[0]["content"] == first


def test_limit_and_unknown_keys(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": "a", "mine": i, f"k{i}": 0} for i in range(4)]
    file = write_rows(tmp_path / "prod.jsonl", *rows)
    first = read_data(str(file), 2, None)
    assert [e.id for e in first.examples] == ["0", "1"]
    assert first.unknown == ("mine", "k0", "k1")
    assert first.sha256 != read_data(str(file), None, None).sha256
    with pytest.raises(UsageError, match="--limit 0"):
        read_data(str(file), 0, None)
