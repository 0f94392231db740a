"""What a client sees before and beside the answer: refusals that it can read and act on, streams
that are never silent, addresses spelled otherwise, and a server that stops in order."""

from __future__ import annotations

import gzip
import json
import re
import signal
import threading
import time

import httpx
import openai
import pytest
from serving import NAME, TEXTS, served, serving_process

from llmquant_serve.service import Limits

COMPLETION, CHATS = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": TEXTS[0], "max_tokens": 1900, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": TEXTS[1], "max_tokens": 2}
PAGE = "http://page.example"


@pytest.fixture(scope="module")
def server(llama):
    with served(llama, keys=("k",), cors_origins=(PAGE,), limits=Limits(max_body=20_000)) as live:
        yield live


@pytest.fixture
def client(server):
    with server.client as http:
        http.headers["authorization"] = "Bearer k"
        yield http


JSON = {"content-type": "application/json"}
BODY = json.dumps(SHORT).encode()
REFUSALS = [
    ("no key", {"authorization": ""}, BODY, 401),
    ("too large", {}, b'{"prompt": "' + b"a" * 30_000 + b'"}', 413),
    ("a wrong value", {}, b'{"prompt": "a", "n": 0}', 400),
    ("no JSON", {}, b"{", 400),
    ("another kind", {"content-type": "text/plain"}, BODY, 400),
    ("no such model", {}, b'{"prompt": "a", "model": "other"}', 404),
]  # fmt: skip


@pytest.mark.parametrize(
    ("headers", "body", "status"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_a_page_can_read_why_it_was_refused(client, headers, body, status):
    """Without the header a browser shows "Failed to fetch" and nothing else."""
    asked = JSON | {"origin": PAGE} | headers
    answer = client.post(COMPLETION, content=body, headers=asked)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.json()["error"]["message"]


def test_a_full_server_is_readable_too(llama):
    with (
        served(llama, cors_origins=(PAGE,), limits=Limits(max_streams=1, max_queue=0)) as full,
        full.client as client,
        client.stream("POST", COMPLETION, json=LONG | {"stream": True}) as first,
    ):
        lines = first.iter_lines()  # httpx closes the connection when this is dropped
        next(lines)
        answer = client.post(COMPLETION, json=SHORT, headers={"origin": PAGE})
        assert answer.status_code == 429
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "retry-after" in answer.headers["access-control-expose-headers"].lower()


def chat(content):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1}


NAMED = [
    ("curl -d", {"content-type": "application/x-www-form-urlencoded"}, BODY, "Content-Type",
     ["application/x-www-form-urlencoded", "application/json"]),
    ("no kind", {"content-type": ""}, BODY, "Content-Type", ["missing", "application/json"]),
    ("a form", {"content-type": "multipart/form-data; boundary=x"}, BODY, "Content-Type", ["multipart"]),
    ("gzip", JSON | {"content-encoding": "gzip"}, gzip.compress(BODY), "Content-Encoding", ["gzip"]),
    ("zstd", JSON | {"content-encoding": "zstd"}, BODY, "Content-Encoding", ["zstd"]),
]  # fmt: skip
VALUES = [
    (COMPLETION, SHORT | {"stop": ["x"] * 17}, "stop", ["17", "at most 16"]),
    (COMPLETION, {"prompt": ["a"] * 129}, "prompt", ["129", "1 to 128"]),
    (COMPLETION, {"prompt": [[1]] * 129}, "prompt", ["129", "1 to 128"]),
    (COMPLETION, {"prompt": []}, "prompt", ["[]", "a text"]),
    (COMPLETION, {"prompt": ["a", 5]}, "prompt.1", ["5"]),
    (COMPLETION, {}, "prompt", ["missing"]),
    (COMPLETION, {"prompt": "a", "stop": "x" * 1001}, "stop", ["1001", "1000"]),
    (COMPLETION, SHORT | {"logprobs": 21}, "logprobs", ["21", "0 to 20"]),
    (COMPLETION, SHORT | {"logprobs": True}, "logprobs", ["true", "0 to 20"]),
    (COMPLETION, SHORT | {"temperature": "hot"}, "temperature", ['"hot"', "0 to 2"]),
    (COMPLETION, SHORT | {"stream": "yes"}, "stream", ['"yes"', "true or false"]),
    (COMPLETION, SHORT | {"best_of": 3}, "best_of", ["3", "1"]),
    (CHATS, chat([{"type": "image_url", "image_url": {"url": "x"}}]), "messages.0.content.0.type",
     ["image_url", '"text"', "images"]),
    (CHATS, chat([{"type": "text", "text": "a"}, {"type": "input_audio", "input_audio": {}}]),
     "messages.0.content.1.type", ["input_audio", '"text"']),
    (CHATS, chat("a") | {"top_logprobs": 3}, "top_logprobs", ["3", "logprobs: true"]),
    (CHATS, chat("a") | {"response_format": {"type": "yaml"}}, "response_format.type", ["yaml", "json_object"]),
    (COMPLETION, SHORT | {"suffix": "b"}, "suffix", ['"b"', "infilling"]),
    (CHATS, {"messages": "a"}, "messages", ['"a"', "a list"]),
    (CHATS, {"messages": ["a"]}, "messages.0", ['"a"', "an object"]),
    ("/tokenize", {"prompt": 5}, "prompt", ["5", "a text"]),
    ("/detokenize", {"tokens": ["a"]}, "tokens.0", ['"a"', "an integer"]),
    ("/detokenize", {}, "tokens", ["missing"]),
]  # fmt: skip


def check(answer, parameter, words):
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == parameter
    for word in (parameter, *words):
        assert word in error["message"], error["message"]
    assert not re.search(r"Input should|valid string|constrained|dictionary", error["message"])


@pytest.mark.parametrize(
    ("headers", "body", "parameter", "words"), [n[1:] for n in NAMED], ids=[n[0] for n in NAMED]
)
def test_a_refusal_names_the_header(client, headers, body, parameter, words):
    check(client.post(COMPLETION, content=body, headers=headers), parameter, words)


@pytest.mark.parametrize(
    ("path", "body", "parameter", "words"), VALUES, ids=[f"{v[2]} {v[3][0]}" for v in VALUES]
)
def test_a_refusal_says_what_it_was_and_what_is_allowed(client, path, body, parameter, words):
    check(client.post(path, json=body), parameter, words)


TOO_LONG = [
    (COMPLETION, {"prompt": [5] * 3000}, "prompt"),
    (COMPLETION, {"prompt": [[5], [5] * 3000]}, "prompt.1"),
    (CHATS, chat("word " * 3000), "messages"),
    (CHATS, chat("word " * 3000) | {"max_tokens": None, "max_completion_tokens": 2}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "parameter"), TOO_LONG, ids=["ids", "of two", "chat", "newer limit"]
)
def test_a_prompt_that_is_too_long_is_named(client, path, body, parameter):
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == parameter


def test_a_name_of_any_length_is_not_repeated(client):
    error = client.post(COMPLETION, json=SHORT | {"k" * 5000: 1}).json()["error"]
    assert len(error["message"]) < 200
    assert "unrecognized parameter: kkk" in error["message"]


HALF = [
    rb'{"prompt": "a", "stop": "\ud800"}', rb'{"prompt": "a", "stop": ["\udfff"]}',
    rb'{"prompt": "a", "model": "\ud800"}', rb'{"prompt": "a", "stream": "\ud800"}',
    rb'{"prompt": "a", "\ud800": 1}', rb'{"prompt": {"\ud800": "\ud800"}}',
    rb'{"prompt": "a", "logit_bias": {"\ud800": 1}}', rb'{"prompt": ["a", "\ud800"]}',
    rb'{"prompt": "a", "response_format": {"type": "\ud800"}}',
    rb'{"prompt": "a", "stream_options": {"\ud800": 1}}',
]  # fmt: skip


@pytest.mark.parametrize("body", HALF, ids=bytes.decode)
def test_half_of_a_character_is_refused_wherever_it_is(client, body):
    """JSON can spell it, and UTF-8 cannot: an answer that quotes it was an error of the server."""
    answer = client.post(COMPLETION, content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert "\\ud" in message or "not valid Unicode" in message


def test_half_of_a_character_in_a_path_or_a_role(client):
    role = rb'{"messages": [{"role": "\ud800", "content": "a"}]}'
    answer = client.post(CHATS, content=role, headers=JSON)
    check(answer, "messages.0.role", ["\\ud800"])
    assert client.get("/v1/models/%ed%a0%80").status_code == 404


UNREADABLE = [
    (b'{"n": ' + b"9" * 5000 + b"}", "4300 digits"), (b"[" * 9000, "recursion"),
    (b'{"prompt": "\xff"}', "can't decode byte 0xff"), (b"", "the body is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), UNREADABLE, ids=[words for _, words in UNREADABLE])
def test_a_body_that_cannot_be_read_says_why(client, body, words):
    answer = client.post(COMPLETION, content=body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_json")
    assert words in error["message"]


ADDRESSES = [
    ("PUT", COMPLETION, 405, "/v1/completions takes POST, not PUT"),
    ("GET", COMPLETION, 405, "/v1/completions takes POST, not GET"),
    ("POST", "/health", 405, "/health takes GET, not POST"),
    ("POST", "/v1/embeddings", 404, "this server has no /v1/embeddings"),
    ("GET", "/nowhere", 404, "this server has no /nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status", "words"), ADDRESSES)
def test_a_wrong_address_says_what_there_is(client, method, path, status, words):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_tokenize_takes_an_empty_list_for_absent(client):
    both = {"prompt": "a", "messages": []}
    assert (
        client.post("/tokenize", json=both).json()
        == client.post("/tokenize", json={"prompt": "a"}).json()
    )
    assert client.post("/tokenize", json={"messages": []}).status_code == 400


@pytest.mark.parametrize("body", [b"[]", b'"x"', b"5", b"null", b"[[1]]"], ids=str)
def test_a_body_that_is_no_object(client, body):
    answer = client.post(COMPLETION, content=body, headers=JSON)
    assert answer.status_code == 400
    assert "JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{NAME}", "/metrics"])
def test_head_is_get_without_a_body(client, path):
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head(COMPLETION).status_code == 405
    assert client.head("/nowhere").status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1//models/", f"/v1/models/{NAME}/"]
)
def test_slashes_that_mean_nothing(client, path):
    answer = client.get(f"{client.base_url.scheme}://{client.base_url.netloc.decode()}{path}")
    assert answer.status_code == 200
    assert answer.json()["object"] in ("list", "model")
    assert client.post("/v1/completions/", json=SHORT).status_code == 200
    assert client.post("/v1//chat/completions", json=chat("a")).status_code == 200


def test_a_waiting_stream_says_that_it_waits(llama):
    limits = Limits(max_streams=1, keep_alive_seconds=0.1)
    with served(llama, limits=limits) as server, server.client as client:
        with client.stream("POST", COMPLETION, json=LONG | {"stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            with client.stream("POST", CHATS, json=chat("a") | {"stream": True}) as second:
                waiting = second.iter_lines()
                said = [next(waiting) for _ in range(6)]
                kept = [line for line in said if line.startswith(":")]
                assert len(kept) >= 2
                first.close()
                rest = [line for line in waiting if line]
                assert rest[-1] == "data: [DONE]"
        server.until_idle()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as api:
            parts = list(api.completions.create(model=NAME, prompt="a", max_tokens=3, stream=True))
        assert parts[-1].choices[0].finish_reason


def test_without_keep_alive_a_stream_waits_silently(llama):
    with (
        served(llama, limits=Limits(keep_alive_seconds=0)) as server,
        server.client as client,
        client.stream("POST", COMPLETION, json=SHORT | {"stream": True}) as answer,
    ):
        assert not [line for line in answer.iter_lines() if line.startswith(":")]


def test_after_the_drain_limit_answers_are_503_and_one_line_is_logged():
    answers = {}

    def ask(url, name, stream):
        body = LONG | {"stream": stream}
        answers[name] = httpx.post(f"{url}{COMPLETION}", json=body, timeout=60)

    with serving_process("--drain-timeout", "1") as (running, url):
        threads = [
            threading.Thread(target=ask, args=(url, name, name == "stream"))
            for name in ("whole", "other", "stream")
        ]
        for thread in threads:
            thread.start()
        while httpx.get(f"{url}/health").json()["running"] < 3:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        log = running.stderr.read()
        assert running.wait(30) == 0, log
    for name in ("whole", "other"):
        assert answers[name].status_code == 503, answers[name].text
        assert answers[name].json()["error"]["code"] == "engine_unavailable"
    assert "shutting down" in answers["stream"].text.strip().splitlines()[-1]
    assert "[DONE]" not in answers["stream"].text
    assert "Traceback" not in log
    assert log.count("cut off after --drain-timeout 1 s") == 1
    assert "ERROR" not in log
