"""Every message reaches the model or is refused, whatever the template; and what clients send
without meaning anything by it (null, empty, their defaults) is no reason to refuse."""

from __future__ import annotations

import itertools
import json
import typing

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import ChatCompletionMessage, completion_create_params
from serving import served, with_template

CHATS, COMPLETION = "/v1/chat/completions", "/v1/completions"
LOOP = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "any role": LOOP + "<|{{ m.role }}|>{{ m.content | trim }}\n" + END,
    "three roles": LOOP
    + "{% if m.role == 'system' %}[S]{{ m.content }}{% elif m.role == 'user' %}[U]{{ m.content }}"
    "{% elif m['role'] == \"assistant\" %}[A]{{ m.content }}{% endif %}" + END,
    "knows developer": LOOP
    + "{% if m.role in ['developer', 'user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endif %}"
    + END,
    "no system": LOOP
    + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}" + END,
    "drops system": LOOP
    + "{% if m.role == 'user' %}[U]{{ m.content }}{% elif m.role == 'assistant' %}[A]{{ m.content }}"
    "{% endif %}" + END,
    "first system only": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + LOOP
    + "{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}"
    + END,
    "parts only": LOOP
    + "<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}" + END,
    "first part, or error": LOOP + "<{{ m.role }}>{{ m.content[0]['text'] | trim }}" + END,
    "both forms": LOOP
    + "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}{% endif %}" + END,
    "system as text, others as parts": LOOP
    + "{% if m.role == 'system' %}{{ m.content }}{% else %}<{{ m.role }}>{% for p in m.content %}"
    "{% if p is mapping %}{{ p.text }}{% endif %}{% endfor %}{% endif %}" + END,
    "escapes": LOOP + "<{{ m.role }}>{{ m.content | tojson }}" + END,
    "cuts reasoning": LOOP + "<{{ m.role }}>{{ m.content.split('</think>')[-1] }}" + END,
    "divides by zero": LOOP + "{{ 1 // (messages | length - messages | length) }}" + END,
    "recurses": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "has no such item": "{{ messages[99].content + messages[98].content }}",
    "ranges too far": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "calls what is none": "{{ messages(1) }}",
    "is no jinja": "{% for m in messages %}{{ m.content",
    "uses Python": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
}
BROKEN = [
    "divides by zero", "recurses", "has no such item", "ranges too far", "calls what is none",
    "is no jinja", "uses Python",
]  # fmt: skip
SYSTEM = {"role": "system", "content": "You are Zebulon."}
DEVELOPER = {"role": "developer", "content": "You are Zebulon."}
USER = {"role": "user", "content": "Who are you?"}
ASSISTANT = {"role": "assistant", "content": "<think>hm</think>A zebra."}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}],
}
LATE = [USER, ASSISTANT, SYSTEM, USER]


@pytest.fixture
def templated(server, client, monkeypatch):
    """``templated(name)``: the client, the server's template changed for this test."""

    def use(name):
        monkeypatch.setattr(server.service.text.tokenizer, "chat_template", TEMPLATES[name])
        return client

    return use


def prompt(client, messages):
    """The answer's status, and the text the model got, or the refusal."""
    answer = client.post(
        CHATS, json={"messages": messages, "max_tokens": 1, "return_token_ids": True}
    )
    if answer.status_code != 200:
        return answer.status_code, answer.json()["error"]
    ids = answer.json()["prompt_token_ids"]
    return 200, client.post("/detokenize", json={"tokens": ids}).json()["prompt"]


REACHES = [
    ("any role", [DEVELOPER, USER]), ("any role", [SYSTEM, USER, ASSISTANT, PARTS]),
    ("three roles", [DEVELOPER, USER]), ("three roles", LATE), ("three roles", [SYSTEM, PARTS]),
    ("knows developer", [DEVELOPER, USER]), ("no system", [USER, ASSISTANT, USER]),
    ("first system only", [DEVELOPER, USER]), ("parts only", [DEVELOPER, PARTS]),
    ("parts only", [SYSTEM, USER, ASSISTANT, USER]), ("first part, or error", [SYSTEM, PARTS]),
    ("both forms", [DEVELOPER, PARTS]), ("system as text, others as parts", [SYSTEM, USER]),
    ("escapes", [SYSTEM, {"role": "user", "content": 'Who\n"are" <you>?'}]),
    ("cuts reasoning", [USER, ASSISTANT, USER]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "messages"),
    REACHES,
    ids=[f"{n}: {'-'.join(m['role'] for m in ms)}" for n, ms in REACHES],
)
def test_every_message_reaches_the_model(templated, name, messages):
    status, text = prompt(templated(name), messages)
    assert status == 200, text
    for message in messages:
        content = message["content"]
        words = content if isinstance(content, str) else "".join(p["text"] for p in content)
        if name == "escapes":
            words = words.replace("\n", "\\n").replace('"', '\\"')
        assert words.rpartition("</think>")[2] in text
    if messages[0] is DEVELOPER:
        assert ("developer" in text) == (name == "knows developer")


REFUSED = [
    ("drops system", [SYSTEM, USER], "messages.0.content", "leaves out message 0"),
    ("drops system", [DEVELOPER, USER], "messages.0.content", "leaves out message 0"),
    (
        "drops system",
        [{"role": "system", "content": "U"}, USER],
        "messages.0.content",
        "leaves out",
    ),
    ("first system only", LATE, "messages.2.content", "leaves out message 2"),
    ("knows developer", [SYSTEM, USER], "messages.0.content", "leaves out message 0"),
    ("no system", [DEVELOPER, USER], "messages", "System role not supported"),
    *[(name, [USER], "messages", "refuses this conversation") for name in BROKEN],
]


@pytest.mark.parametrize(
    ("name", "messages", "parameter", "words"),
    REFUSED,
    ids=[f"{r[0]}-{r[1][0]['content'][:3]}-{i}" for i, r in enumerate(REFUSED)],
)
def test_what_the_template_leaves_out_or_breaks_at_is_a_400(
    templated, name, messages, parameter, words
):
    client = templated(name)
    status, error = prompt(client, messages)
    assert (status, error["param"]) == (400, parameter)
    assert words in error["message"]
    assert client.post("/tokenize", json={"messages": messages}).status_code == 400


def schema_of(params):
    """Names in OpenAI's current schema, from its own client."""
    return sorted(typing.get_type_hints(params.CompletionCreateParamsBase).keys() | {"stream"})


NEUTRAL = (None, "", [], {})
BODIES = {
    CHATS: ({"messages": [USER], "max_completion_tokens": 1}, schema_of(completion_create_params)),
    COMPLETION: ({"prompt": "a", "max_tokens": 1}, schema_of(text_params)),
}


@pytest.mark.parametrize("path", BODIES)
def test_null_and_empty_are_absent_for_every_parameter(client, path):
    """All at once, each with every value: a refusal would name the first one."""
    body, names = BODIES[path]
    assert len(names) > 15
    values = [dict.fromkeys(names, value) for value in NEUTRAL]
    values += [dict(zip(names, itertools.cycle(NEUTRAL), strict=False))]
    for changes in values:
        answer = client.post(path, json=changes | body)
        assert answer.status_code == 200, answer.text


DEFAULTS = [
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    {"tools": None, "tool_choice": "none", "functions": [], "function_call": "none"},
    {"modalities": ["text"], "store": False, "service_tier": "auto", "verbosity": "medium"},
    {"stream_options": {"include_usage": False}}, {"top_logprobs": 0}, {"logprobs": False},
    {"response_format": {"type": "text"}}, {"stop": [""]}, {"logit_bias": {"5": None}},
    {"metadata": {"a": "b"}, "user": "me", "safety_identifier": "x", "prompt_cache_key": "y"},
    {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "top_p": 1, "temperature": 1},
    {"web_search_options": {}, "prediction": None, "audio": None, "reasoning_effort": None},
]  # fmt: skip


@pytest.mark.parametrize("changes", DEFAULTS, ids=lambda c: "-".join(c))
def test_defaults_of_clients_change_nothing(client, changes):
    answer = client.post(CHATS, json={"messages": [USER], "max_tokens": 1} | changes)
    assert answer.status_code == 200, answer.text


ASKING = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]), ("functions", [{"name": "f"}]),
    ("reasoning_effort", "high"), ("audio", {"voice": "x"}), ("prediction", {"type": "content"}),
    ("verbosity", "low"), ("web_search_options", {"a": 1}), ("modalities", ["audio"]),
    ("store", True), ("tool_choice", "required"), ("temprature", 0.5), ("service_tier", "flex"),
    ("response_format", {"type": "json_object"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), ASKING, ids=[n for n, _ in ASKING])
def test_what_would_change_the_answer_is_refused_by_name(client, name, value):
    answer = client.post(CHATS, json={"messages": [USER], name: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].split(".")[0] == name
    assert name in error["message"]


def test_an_answer_comes_back_as_the_openai_package_dumps_it(client):
    first = client.post(CHATS, json={"messages": [USER], "max_tokens": 3}).json()
    message = ChatCompletionMessage.model_validate(first["choices"][0]["message"])
    dumps = [
        message.model_dump(),
        message.model_dump() | {"annotations": [], "tool_calls": [], "refusal": ""},
        message.model_dump() | {"reasoning_content": "", "reasoning": None, "audio": None},
        message.model_dump(exclude_unset=True) | {"name": "", "function_call": {}},
        {"role": "assistant", "content": None, "tool_calls": None},
        {"role": "assistant"},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": [{"type": "text", "text": "x", "annotations": []}]},
    ]
    for dump in dumps:
        asked = [USER | {"type": "text", "name": None}, dump, USER]
        answer = client.post(CHATS, json={"messages": asked, "max_tokens": 1})
        assert answer.status_code == 200, (dump, answer.text)


@pytest.mark.parametrize(
    ("message", "parameter"),
    [
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user"}, "messages.0.content"),
        ({"content": "x"}, "messages.0.role"),
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "user", "content": 5}, "messages.0.content"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "messages.0.tool_calls",
        ),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages.0.refusal"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.0.content.0.type"),
        ({"role": "user", "content": "\ud800"}, "messages.0.content"),
    ],
    ids=str,
)
def test_a_wrong_message_names_its_place(client, message, parameter):
    content = json.dumps({"messages": [message]})
    answer = client.post(CHATS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == parameter
    assert parameter in answer.json()["error"]["message"]


def test_a_model_without_a_template_says_so(llama):
    with served(llama, with_template("")) as server, server.client as client:
        status, error = prompt(client, [USER])
    assert (status, error["param"]) == (400, "messages")
    assert "no chat template" in error["message"]
