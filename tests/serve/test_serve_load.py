"""Under load and under attack: bounds, keys, clients that leave, clients that do not read,
shutdown."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import TEXTS

from llmquant_serve.service import Limits

PATH = "/v1/completions"
LONG = {"prompt": TEXTS[0], "max_tokens": 1900, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": TEXTS[1], "max_tokens": 3, "temperature": 0}


def test_beyond_the_queue_is_429_with_retry_after(make_server):
    with (
        make_server(Limits(max_streams=1, max_queue=1)) as server,
        server.client as client,
        ThreadPoolExecutor(6) as pool,
    ):
        streams = [client.stream("POST", PATH, json=LONG | {"stream": True}) for _ in range(2)]
        answers = [s.__enter__() for s in streams]
        refused = list(pool.map(lambda _: client.post(PATH, json=SHORT), range(4)))
        for answer in refused:
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        for answer in answers:
            answer.close()
        server.until_idle()
        assert client.post(PATH, json=SHORT).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_goes_away_frees_its_slot(make_server, stream):
    with make_server(Limits(max_streams=1)) as server, server.client as client:
        if stream:
            with client.stream("POST", PATH, json=LONG | {"stream": True}) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(PATH, json=LONG, timeout=0.5)
        assert client.post(PATH, json=SHORT).status_code == 200
        server.until_idle()
        assert server.steps < 1000, "it continued for nobody"
        assert "llmquant_aborted_total 1.0" in client.get("/metrics").text


def test_a_client_that_leaves_the_queue(make_server):
    with make_server(Limits(max_streams=1)) as server, server.client as client:
        with client.stream("POST", PATH, json=LONG | {"stream": True}) as first:
            lines = first.iter_lines()  # httpx closes the connection when this is dropped
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                client.post(PATH, json=SHORT, timeout=0.3)
            deadline = time.monotonic() + 5
            while server.service.engine.load().waiting and time.monotonic() < deadline:
                time.sleep(0.02)
            assert server.service.engine.load().waiting == 0
        server.until_idle()


def raw_request(server, body):
    """A socket with a tiny receive buffer that has sent a request."""
    host, port = server.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect((host, int(port)))
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)
    return sock


def test_a_client_that_does_not_read_stalls_nobody_and_is_dropped(make_server):
    """It asks for log-probabilities of every step, so that its answer is larger than all the
    buffers between."""
    body = httpx.Request(
        "POST", "http://x", json=LONG | {"stream": True, "logprobs": 20, "n": 3}
    ).content
    with (
        make_server(Limits(max_streams=4, stall_seconds=1.0), send_buffer=4096) as server,
        server.client as client,
    ):
        with raw_request(server, body):
            while not server.service.engine.load().running:
                time.sleep(0.01)
            answer = client.post(PATH, json=SHORT)
            assert answer.status_code == 200
            server.until_idle(60)
        assert "llmquant_aborted_total 1.0" in client.get("/metrics").text


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_a_body_that_is_too_large(make_server, chunked):
    body = b'{"prompt": "' + b"a" * 5000 + b'"}'
    with make_server(Limits(max_body=2048)) as server, server.client as client:
        content = (body[i : i + 500] for i in range(0, len(body), 500)) if chunked else body
        answer = client.post(PATH, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert "2048 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("limits", "body", "parameter"),
    [
        pytest.param(Limits(max_prompt=4), {"prompt": TEXTS[0]}, "prompt", id="prompt"),
        pytest.param(
            Limits(max_output=5), {"prompt": "a", "max_tokens": 6}, "max_tokens", id="output"
        ),
        pytest.param(
            Limits(max_streams=1, max_queue=1), {"prompt": "a", "n": 3}, "n", id="sequences"
        ),
    ],
)
def test_limits_are_400s(make_server, limits, body, parameter):
    with make_server(limits) as server, server.client as client:
        answer = client.post(PATH, json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == parameter


def test_keys(make_server):
    with make_server(keys=("first-key", "second-key")) as server, server.client as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}):
            answer = client.post(PATH, json=SHORT, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("first-key", "second-key"):
            assert (
                client.post(
                    PATH, json=SHORT, headers={"authorization": f"Bearer {key}"}
                ).status_code
                == 200
            )
        assert client.get("/metrics").status_code == 401


def test_other_pages_may_not_call_unless_allowed(make_server):
    ask = {"origin": "http://page.example", "access-control-request-method": "POST"}
    with make_server() as server, server.client as client:
        assert "access-control-allow-origin" not in client.options(PATH, headers=ask).headers
    with (
        make_server(cors_origins=("http://page.example",), keys=("k",)) as server,
        server.client as client,
    ):
        assert (
            client.options(PATH, headers=ask).headers["access-control-allow-origin"]
            == "http://page.example"
        )


def test_a_shutdown_lets_running_answers_end_and_cuts_off_long_ones(make_server):
    """uvicorn waits for 2 s here; a short answer ends by itself, a long one is cut off, and the
    engine is closed."""
    results = {}

    def ask(server, name, tokens):
        try:
            body = LONG | {"stream": True, "max_tokens": tokens}
            with httpx.stream("POST", f"{server.url}{PATH}", json=body, timeout=60) as answer:
                results[name] = [line for line in answer.iter_lines() if line]
        except httpx.HTTPError as e:
            results[name] = e

    with make_server() as server:
        threads = [
            threading.Thread(target=ask, args=(server, *a)) for a in (("long", 1900), ("short", 20))
        ]
        for count, thread in enumerate(threads, 1):
            thread.start()
            # On a busy machine the short one may have ended before anybody looked.
            while server.service.engine.load().running < count and "short" not in results:
                time.sleep(0.005)
    for thread in threads:
        thread.join(20)
    assert results["short"][-1] == "data: [DONE]"
    assert isinstance(results["long"], httpx.HTTPError) or results["long"][-1] != "data: [DONE]"
    assert not server.service.engine.health().ok
