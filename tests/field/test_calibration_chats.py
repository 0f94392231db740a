"""Chats as clients and datasets store them, calibrated on: tool calls, tools, text as parts, nulls.
What a template does not write is counted, and a template that refuses everything is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from eval_kit import Ran, llmquant_command

USER = {"role": "user", "content": "What is the weather in Paris like today, in short words?"}
SAYS = {"role": "assistant", "content": "It is mild and a little cloudy, with some wind."}
CALL = {"id": "a1b2c3d4e", "type": "function"}
PARIS = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'}
ANSWER = {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "18 degrees, cloudy"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
TOOLS = (
    "{% if tools %}{% for t in tools %}<tool>{{ t | tojson }}</tool>{% endfor %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ (c.function or c) | tojson }}</call>{% endfor %}|{% endfor %}"
)
PARTS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for p in m.content %}{% if p is mapping %}{{ p.text }}{% endif %}{% endfor %}|{% endfor %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)


def calls(**function: object) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}


OPENAI_DUMP = {**SAYS, "refusal": None, "annotations": [], "tool_calls": None, "audio": None}
TAKEN: dict[str, dict[str, Any]] = {
    "tool calls": {"messages": [USER, calls(**PARIS), ANSWER, SAYS]},
    "arguments as an object": {"messages": [USER, calls(name="get_weather", arguments={"city": 1})]},
    "no arguments": {"messages": [USER, calls(name="get_weather", arguments="")]},
    "arguments that are no JSON": {"messages": [USER, calls(name="get_weather", arguments="{x")]},
    "arguments of thousands of digits": {
        "messages": [USER, calls(name="get_weather", arguments='{"x": ' + "9" * 6000 + "}")]
    },
    "a call without content": {
        "messages": [USER, {"role": "assistant", "tool_calls": [{"function": PARIS}]}]
    },
    "a bare call": {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [PARIS]}]},
    "a function call of old": {
        "messages": [USER, {"role": "assistant", "content": None, "function_call": PARIS}]
    },
    "an empty call of old": {
        "messages": [USER, {**SAYS, "function_call": {"name": None, "arguments": None}}]
    },
    "tools beside": {"messages": [USER, SAYS], "tools": [TOOL]},
    "tools as JSON": {"messages": [USER, SAYS], "tools": json.dumps([TOOL])},
    "no tools": {"messages": [USER, SAYS], "tools": []},
    "null tools": {"messages": [USER, SAYS], "tools": None},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello to all of us"}]},
            SAYS,
        ]
    },
    "parts with nulls": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Good day, you all there", "image_url": None}, {"type": None, "text": "!"}]}, SAYS]
    },
    "a dump of the openai package": {"messages": [USER, OPENAI_DUMP]},
    "reasoning": {"messages": [USER, {**SAYS, "reasoning_content": "Paris is in France."}]},
}  # fmt: skip
DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "a turn that is not plain text",
    ),
    "a call without a name": ({"messages": [USER, calls(arguments="{}")]}, "a tool call without"),
    "tools that are words": ({"messages": [USER], "tools": "search"}, "tools that are not a list"),
    "half a character": (
        {"messages": [USER, calls(name="a", arguments={"x": "\ud800"})]},
        "not Unicode",
    ),
}


def chatting(make_model: Any, template: str) -> Path:
    folder = Path(make_model())
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def models(make_model: Any) -> dict[str, Path]:
    templates = {"plain": PLAIN, "tools": TOOLS, "parts": PARTS, "alternate": ALTERNATE}
    return {name: chatting(make_model, template) for name, template in templates.items()}


def quantize(model: Path, rows: list[dict[str, Any]], folder: Path, *options: object) -> Ran:
    text = folder / "chats.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return llmquant_command(
        "quantize", model, "-o", folder / "out", "--group-size", 32, "--calibration",
        f"jsonl:{text}#messages", "--seqlen", 16, "--packing", "sample", "--overwrite", *options,
    )  # fmt: skip


def summary(ran: Ran) -> Any:
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["calibration"]


def test_every_form_is_taken(models: dict[str, Path], tmp_path: Path) -> None:
    rows = list(TAKEN.values())
    got = summary(quantize(models["tools"], rows, tmp_path, "--nsamples", len(rows), "--json"))
    assert (got["rows_read"], got["rows_used"], got["dropped"]) == (len(rows), len(rows), {})


def test_what_is_none_is_counted(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [*TAKEN.values(), *(row for row, _ in DROPPED.values())]
    options = ("--nsamples", len(TAKEN), "--json")
    got = summary(quantize(models["tools"], rows, tmp_path, *options))
    reasons = " ".join(got["dropped"])
    assert sum(got["dropped"].values()) == len(DROPPED)
    assert all(reason in reasons for _, reason in DROPPED.values())


def texts(model: Path, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """What the calibration reads, as text."""
    import llmquant
    from llmquant.data.template import render

    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = llmquant.load_tokenizer(model)
    documents = llmquant.read_documents(f"jsonl:{path}#messages")
    return [render(row, tokenizer, "rows") for row in documents.rows if not isinstance(row, str)]


def test_arguments_are_written_once(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [TAKEN[name] for name in ("tool calls", "a bare call", "a function call of old")]
    for text in texts(models["tools"], rows, tmp_path):
        assert (
            '<call>{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}</call>'
            in text
        )


def test_tools_are_written_in_either_form(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [TAKEN[name] for name in ("tools beside", "tools as JSON", "no tools", "null tools")]
    beside, as_json, none, null = texts(models["tools"], rows, tmp_path)
    assert beside == as_json
    assert beside.startswith(f"<tool>{json.dumps(TOOL)}</tool>")
    assert none == null
    assert "<tool>" not in none


def test_nulls_of_a_table_are_no_arguments(models: dict[str, Path], tmp_path: Path) -> None:
    padded = calls(name="get_weather", arguments={"city": "Paris", "zip": None}, strict=None)
    (text,) = texts(models["tools"], [{"messages": [USER, padded]}], tmp_path)
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in text


@pytest.mark.parametrize("template", ["plain", "parts"])
def test_a_turn_is_written_in_the_form_that_the_template_reads(
    template: str, models: dict[str, Path], tmp_path: Path
) -> None:
    for text in texts(models[template], [TAKEN["parts"], {"messages": [USER, SAYS]}], tmp_path):
        assert text.startswith(("[user]Say hello to all of us|", f"[user]{USER['content']}|"))
        assert text.endswith(f"[assistant]{SAYS['content']}|")


ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "[{{ m.role }}]{{ m.content }}|{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "role"),
    [
        pytest.param(ROLES, "system", id="skipped otherwise"),
        pytest.param(ROLES.replace("['sys", "['developer', 'sys"), "developer", id="known"),
    ],
)
def test_a_developer_is_the_system_where_the_template_knows_none(
    template: str, role: str, make_model: Any, tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "developer", "content": "Be brief."}, USER, SAYS]}]
    (text,) = texts(chatting(make_model, template), rows, tmp_path)
    assert text.startswith(f"[{role}]Be brief.|[user]")


def test_a_dataset_of_the_hub_has_its_tools_too(models: dict[str, Path], tmp_path: Path) -> None:
    import datasets

    import llmquant
    from llmquant.data.template import render

    rows = [TAKEN["tools beside"], {"messages": [USER, calls(**PARIS)], "tools": [TOOL]}]
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    documents = llmquant.read_documents(f"hf:{folder}:train:messages")
    tokenizer = llmquant.load_tokenizer(models["tools"])
    first, second = (render(r, tokenizer, "x") for r in documents.rows if not isinstance(r, str))
    assert first.startswith("<tool>")
    assert '"arguments": {"city": "Paris", "days": 2}' in second
    assert "null" not in first + second


def test_calls_that_a_template_does_not_write_are_counted(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [TAKEN["tool calls"], *[{"messages": [USER, SAYS]}] * 4]
    got = summary(quantize(models["plain"], rows, tmp_path, "--nsamples", 4, "--json"))
    assert got["dropped"] == {"chats whose tool calls the chat template leaves out": 1}


@pytest.mark.parametrize("template", ["plain", "tools"])
def test_tools_that_a_template_does_not_write_are_counted_and_said(
    template: str, models: dict[str, Path], tmp_path: Path
) -> None:
    rows = [TAKEN["tools beside"], *[{"messages": [USER, SAYS]}] * 3]
    ran = quantize(models[template], rows, tmp_path, "--nsamples", 4)
    words = "1 chats whose tools the chat template leaves out"
    assert (ran.code, words in ran.said) == (0, template == "plain")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    expected = {words[2:]: 1} if template == "plain" else None
    assert manifest["calibration"].get("incomplete") == expected


def test_a_turn_that_a_template_does_not_write_is_counted(make_model: Any, tmp_path: Path) -> None:
    model = chatting(make_model, ROLES.replace("'system', ", ""))
    system = {"role": "system", "content": "Answer briefly."}
    rows = [{"messages": [system, USER, SAYS]}, *[{"messages": [USER, SAYS]}] * 3]
    ran = quantize(model, rows, tmp_path, "--nsamples", 4)
    assert ran.code == 0, ran.err
    assert "1 chats of which the chat template leaves out a turn" in ran.said


BAD_TEMPLATES = {
    "alternate": (ALTERNATE, "roles must alternate"),
    "raises": ("{{ messages[0].content + 1 }}", "refused by the chat template"),
    "divides": ("{{ 1 // 0 }}", "refused by the chat template"),
    "silent": ("<s>{{ messages | length }}</s>", "whose text the chat template leaves out"),
}


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ messages + 1 }}"],
)
def test_generate_names_a_template_that_fails(template: str, make_model: Any) -> None:
    ran = llmquant_command("generate", chatting(make_model, template), "Hello")
    assert (ran.code, "chat template cannot be used" in ran.said) == (2, True)


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_a_template_that_refuses_every_row_is_named(
    name: str, make_model: Any, tmp_path: Path
) -> None:
    template, words = BAD_TEMPLATES[name]
    rows = [{"messages": [SAYS, USER]}] * 5
    ran = quantize(chatting(make_model, template), rows, tmp_path, "--nsamples", 4)
    assert ran.code == 2
    assert "none of its 5 rows can be used (5 " in ran.said
    assert words in ran.said
    assert "more text" not in ran.said
    assert not (tmp_path / "out").exists()


def test_too_little_text_says_what_was_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [*[{"messages": [USER, SAYS]}] * 3, *[{"messages": [SAYS, USER]}] * 40]
    ran = quantize(models["alternate"], rows, tmp_path, "--nsamples", 40)
    assert ran.code == 2
    assert (
        "left out of its 43 rows: 40 refused by the chat template: roles must alternate" in ran.said
    )
