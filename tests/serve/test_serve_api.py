"""The API as its clients see it: the openai package, and requests that are wrong."""

from __future__ import annotations

import json

import openai
import pytest
from serving import NAME, TEXTS, greedy

from llmquant_serve.generation.detokenize import decode


@pytest.fixture
def api(server):
    """The real client, which checks every answer against OpenAI's types."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def old(server):
    """The same client, unchecked: of text completions its types forbid the nulls that OpenAI itself
    sends.

    (In streamed parts, ``finish_reason`` before the end; with ``echo``, the log-probability of the
    first token.)
    """
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tell me about the history of the river."},
]


def chat_ids(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS[:4])
def test_greedy_completions_are_those_of_generate_streamed_or_not(api, old, model, tokenizer, text):
    asked = {
        "model": NAME,
        "prompt": text,
        "max_tokens": 32,
        "temperature": 0,
        "extra_body": {"return_token_ids": True},
    }
    expected = greedy(model, tokenizer.encode(text), 32)
    whole = api.completions.create(**asked)
    assert whole.choices[0].token_ids == expected
    assert whole.choices[0].text == decode(tokenizer, expected)
    assert whole.usage.prompt_tokens == len(tokenizer.encode(text))
    assert whole.usage.completion_tokens == len(expected)
    parts = list(old.completions.create(**asked, stream=True))
    assert [i for p in parts for i in p.choices[0].token_ids] == expected
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_greedy_chats_are_those_of_generate_streamed_or_not(api, model, tokenizer):
    asked = {"model": NAME, "messages": CHAT, "max_completion_tokens": 48, "temperature": 0}
    prompt = chat_ids(tokenizer, CHAT)
    expected = greedy(model, prompt, 48)
    whole = api.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    assert whole.choices[0].token_ids == expected
    assert whole.choices[0].message.content == decode(tokenizer, expected)
    assert whole.prompt_token_ids == prompt
    stream = api.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert (
        "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    )
    assert [p.choices[0].finish_reason for p in parts if p.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(p.usage is None for p in parts)


def test_completion_logprobs_with_echo(old, tokenizer):
    asked = {
        "model": NAME,
        "prompt": TEXTS[0],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": 3,
        "echo": True,
    }
    whole = old.completions.create(**asked)
    logs, text = whole.choices[0].logprobs, whole.choices[0].text
    count = len(tokenizer.encode(TEXTS[0]))
    assert text.startswith(TEXTS[0])
    assert (
        len(logs.tokens)
        == len(logs.token_logprobs)
        == len(logs.top_logprobs)
        == len(logs.text_offset)
        == count + 6
    )
    assert (logs.token_logprobs[0], logs.top_logprobs[0]) == (None, None)
    for token, p, top, at in list(
        zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, logs.text_offset, strict=True)
    )[1:]:
        assert top[token] == p
        assert text.startswith(token, at)
        assert 3 <= len(top) <= 4
    parts = list(old.completions.create(**asked, stream=True))
    assert "".join(p.choices[0].text for p in parts) == text
    assert [x for p in parts for x in p.choices[0].logprobs.tokens] == logs.tokens
    assert [x for p in parts for x in p.choices[0].logprobs.text_offset] == logs.text_offset
    streamed = [x for p in parts for x in p.choices[0].logprobs.token_logprobs]
    assert streamed == logs.token_logprobs


def test_the_prompt_alone_can_be_scored(old, tokenizer):
    scored = old.completions.create(
        model=NAME, prompt=tokenizer.encode(TEXTS[1]), max_tokens=0, logprobs=0, echo=True
    ).choices[0]
    assert scored.text == TEXTS[1]
    assert len(scored.logprobs.tokens) == len(tokenizer.encode(TEXTS[1]))


def test_chat_logprobs(api):
    asked = {
        "model": NAME,
        "messages": CHAT,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = api.chat.completions.create(**asked).choices[0]
    assert len(whole.logprobs.content) == 8
    for entry in whole.logprobs.content:
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: the chosen one is the first
        assert len(entry.top_logprobs) == 2
    text = b"".join(bytes(e.bytes) for e in whole.logprobs.content)
    assert text.decode(errors="ignore").startswith(whole.message.content.rstrip("�"))
    parts = api.chat.completions.create(**asked, stream=True)
    streamed = [e for p in parts if p.choices[0].logprobs for e in p.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in whole.logprobs.content]


def test_several_prompts_and_several_answers(api, old, model, tokenizer):
    asked = {
        "model": NAME,
        "prompt": list(TEXTS[:3]),
        "max_tokens": 4,
        "n": 2,
        "seed": 3,
        "temperature": 1.0,
    }
    whole = api.completions.create(**asked)
    assert [c.index for c in whole.choices] == list(range(6))
    assert whole.usage.prompt_tokens == sum(len(tokenizer.encode(t)) for t in TEXTS[:3])
    assert whole.choices[0].text != whole.choices[1].text
    streamed = dict.fromkeys(range(6), "")
    for part in old.completions.create(**asked, stream=True):
        streamed[part.choices[0].index] += part.choices[0].text
    assert all(streamed.values())


def test_seeds_repeat(api):
    def text(seed):
        answer = api.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=12, temperature=1.2, seed=seed
        )
        return answer.choices[0].message.content

    assert text(11) == text(11) != text(12)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_stop_strings(old, stream):
    asked = {"model": NAME, "prompt": TEXTS[0], "max_tokens": 40, "temperature": 0}
    full = old.completions.create(**asked).choices[0].text
    stop = full[11:15]
    answer = old.completions.create(**asked, stop=["no such text", stop], stream=stream)
    choices = [p.choices[0] for p in answer] if stream else [answer.choices[0]]
    assert "".join(c.text for c in choices) == full[: full.index(stop)]
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


def test_bias_and_penalties_reach_the_model(api, tokenizer):
    word = tokenizer.encode(" the", add_special_tokens=False)[0]
    asked = {"model": NAME, "prompt": TEXTS[0], "max_tokens": 5, "temperature": 0}
    assert (
        api.completions.create(**asked, logit_bias={str(word): 100}).choices[0].text == " the" * 5
    )
    biased = {
        "logit_bias": {str(word): 30},
        "frequency_penalty": 2.0,
        "extra_body": {"repetition_penalty": 3.0},
    }
    assert api.completions.create(**asked, **biased).choices[0].text != " the" * 5


def test_models(api):
    assert [m.id for m in api.models.list().data] == [NAME]
    assert api.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        api.models.retrieve("other/model")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_tokenize_and_back(client, tokenizer):
    answer = client.post("/tokenize", json={"prompt": "Grüße 🙂", "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode("Grüße 🙂")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    bare = client.post(
        "/tokenize", json={"prompt": "Grüße 🙂", "add_special_tokens": False}
    ).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": bare}).json() == {"prompt": "Grüße 🙂"}
    assert client.post("/tokenize", json={"messages": CHAT}).json()["tokens"] == chat_ids(
        tokenizer, CHAT
    )


def test_health_and_metrics(client, server):
    server.until_idle()
    assert client.get("/health").json() == {
        "status": "ok",
        "engine": "local",
        "model": NAME,
        "detail": "",
        "restarts": 0,
        "running": 0,
        "waiting": 0,
    }

    def metrics():
        lines = client.get("/metrics").text.splitlines()
        return {
            k: float(v)
            for k, _, v in (line.rpartition(" ") for line in lines if not line.startswith("#"))
        }

    before = metrics()
    client.post(
        "/v1/completions",
        json={"prompt": "The river", "max_tokens": 7, "temperature": 0, "ignore_eos": True},
    )
    after = metrics()
    grown = {k: after[k] - before.get(k, 0.0) for k in after}
    assert grown["llmquant_generated_tokens_total"] == 7
    assert grown["llmquant_prompt_tokens_total"] == 3
    assert grown['llmquant_requests_total{path="/v1/completions",status="200"}'] == 1
    assert (
        grown["llmquant_time_to_first_token_seconds_count"]
        == grown["llmquant_time_per_output_token_seconds_count"]
        == 1
    )
    assert (after["llmquant_sequences_running"], after["llmquant_engine_up"]) == (0, 1)


COMPLETION, CHATS = "/v1/completions", "/v1/chat/completions"
P, M = {"prompt": "a"}, {"messages": CHAT}
WRONG = [
    pytest.param(COMPLETION, {}, "prompt", id="no prompt"),
    pytest.param(COMPLETION, {"prompt": []}, "prompt", id="empty list"),
    pytest.param(COMPLETION, {"prompt": [4096]}, "prompt", id="token out of range"),
    pytest.param(COMPLETION, {"prompt": [-1]}, "prompt", id="negative token"),
    pytest.param(COMPLETION, {"prompt": "", "add_special_tokens": False}, "prompt", id="no tokens"),
    pytest.param(COMPLETION, {"prompt": [5] * 2048}, None, id="prompt too long"),
    pytest.param(COMPLETION, P | {"max_tokens": 4000}, "max_tokens", id="output too long"),
    pytest.param(COMPLETION, P | {"max_tokens": 0}, "max_tokens", id="nothing to do"),
    pytest.param(COMPLETION, P | {"temperature": -0.1}, "temperature", id="temperature below 0"),
    pytest.param(COMPLETION, P | {"temperature": "1"}, "temperature", id="temperature a string"),
    pytest.param(COMPLETION, P | {"top_p": 1.1}, "top_p", id="top_p above 1"),
    pytest.param(COMPLETION, P | {"n": 0}, "n", id="n 0"),
    pytest.param(COMPLETION, P | {"n": 100}, "n", id="n beyond the gate"),
    pytest.param(COMPLETION, P | {"best_of": 3}, "best_of", id="best_of"),
    pytest.param(COMPLETION, P | {"suffix": "b"}, "suffix", id="suffix"),
    pytest.param(COMPLETION, P | {"logprobs": 21}, "logprobs", id="too many logprobs"),
    pytest.param(COMPLETION, P | {"logit_bias": {"x": 1}}, "logit_bias", id="bias of no token"),
    pytest.param(COMPLETION, P | {"logit_bias": {"4096": 1}}, "logit_bias", id="bias out of range"),
    pytest.param(COMPLETION, P | {"stop": 5}, "stop", id="stop a number"),
    pytest.param(
        COMPLETION,
        P | {"stream_options": {"include_usage": True}},
        "stream_options",
        id="options without stream",
    ),
    pytest.param(COMPLETION, P | {"min_tokens": 50}, "min_tokens", id="minimum above maximum"),
    pytest.param(COMPLETION, P | {"prompt_logprobs": 1}, "prompt_logprobs", id="unknown parameter"),
    pytest.param(CHATS, {"messages": []}, "messages", id="no messages"),
    pytest.param(
        CHATS,
        {"messages": [{"role": "robot", "content": "a"}]},
        "messages.0.role",
        id="unknown role",
    ),
    pytest.param(
        CHATS, M | {"response_format": {"type": "json_object"}}, "response_format", id="json"
    ),
    pytest.param(CHATS, M | {"tools": [{"type": "function"}]}, "tools", id="tools"),
    pytest.param(CHATS, M | {"top_logprobs": 2}, "top_logprobs", id="top_logprobs alone"),
    pytest.param(
        CHATS, M | {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens", id="two maxima"
    ),
    pytest.param(CHATS, M | {"store": True}, "store", id="store"),
    pytest.param(
        CHATS,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
        "messages.0.content",
        id="an image",
    ),
]


@pytest.mark.parametrize(("path", "body", "parameter"), WRONG)
def test_what_is_wrong_is_a_400_that_names_it(client, path, body, parameter):
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if parameter is not None:
        assert (error["param"] or "").startswith(parameter), error


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"{", 400, id="not JSON"),
        pytest.param(b"[]", 400, id="not an object"),
        pytest.param(b"\xff\xfe", 400, id="not UTF-8"),
        pytest.param(b'{"prompt": "a", "temperature": NaN}', 400, id="NaN"),
        pytest.param(b'{"prompt": "\\ud800"}', 400, id="half a surrogate"),
        pytest.param(b'{"prompt": "a", "seed": 1e400}', 400, id="infinity"),
        pytest.param(
            b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, id="a huge number"
        ),
        pytest.param(b"[" * 100_000, 400, id="deep nesting"),
    ],
)
def test_bodies_that_are_none(client, body, status):
    answer = client.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", COMPLETION, 405), ("POST", "/health", 405)],
)
def test_wrong_addresses_are_errors_of_the_same_shape(client, method, path, status):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_streamed_line_is_an_event(client):
    with client.stream("POST", CHATS, json=M | {"stream": True, "max_tokens": 3}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(
        json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk"
        for line in lines[:-1]
    )
