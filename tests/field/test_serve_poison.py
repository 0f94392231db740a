"""One request that cannot be computed fails alone: whatever it was, its neighbours get their own
answers, and the next request gets one. An engine that is really dead ends the process."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from serving import TEXTS, TINY, greedy, serving_process
from transformers import AutoTokenizer

from llmquant_serve.api import logprobs
from llmquant_serve.engines.batching import batcher, row_cache
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.engines.jobs import job
from llmquant_serve.engines.sampling import Chooser
from llmquant_serve.generation import detokenize, pieces

COMPLETION = "/v1/completions"
GOOD = {"prompt": TEXTS[0], "max_tokens": 24, "temperature": 0, "return_token_ids": True}
POISON = "In 1983 the team represented"
LONG = GOOD | {"max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def expected(llama):
    """The model's own tokens for ``GOOD``."""
    ids = AutoTokenizer.from_pretrained(TINY).encode(TEXTS[0])
    return greedy(llama, ids, GOOD["max_tokens"])


def tokens(answer):
    return answer.json()["choices"][0]["token_ids"]


SMALL = [0.0, 5e-324, 1.4e-45, 1.2e-38, 1.2e-7, 9.9e-6]


@pytest.mark.parametrize("temperature", SMALL, ids=str)
@pytest.mark.parametrize("bias", [0, -100], ids=["logits of both signs", "all logits negative"])
def test_a_tiny_temperature_is_greedy(client, expected, temperature, bias):
    body = GOOD | {"temperature": temperature}
    if bias:
        body["logit_bias"] = {str(i): bias for i in range(4096)}
    answer = client.post(COMPLETION, json=body)
    assert answer.status_code == 200, answer.text
    assert tokens(answer) == expected
    assert client.get("/health").status_code == 200


EXTREME = [
    pytest.param({"temperature": 1e-5}, id="the smallest drawn temperature"),
    pytest.param({"temperature": 2, "top_p": 5e-324}, id="top_p denormal"),
    pytest.param({"temperature": 1, "min_p": 1}, id="min_p 1"),
    pytest.param({"temperature": 1, "top_k": 2**31 - 1}, id="top_k huge"),
    pytest.param({"temperature": 1, "top_k": -1}, id="top_k -1"),
    pytest.param(
        {"temperature": 1e-5, "repetition_penalty": 10, "frequency_penalty": 2}, id="penalties"
    ),
    pytest.param({"temperature": 1e-5, "repetition_penalty": 0.01}, id="repetition 0.01"),
    pytest.param({"logit_bias": {str(i): -100 for i in range(4096)}}, id="all biased down"),
    pytest.param({"logit_bias": {"5": 100, "05": -100}}, id="a key twice"),
    pytest.param({"seed": 2**63 - 1, "n": 3}, id="the last seed"),
    pytest.param({"seed": -(2**63)}, id="the first seed"),
    pytest.param({"prompt": [0]}, id="one token"),
    pytest.param({"prompt": [4095] * 5}, id="the last token"),
    pytest.param({"prompt": "\x00\ufffd\u200b"}, id="strange characters"),
    pytest.param({"stop": ["\ufffd", "\x00"]}, id="strange stops"),
    pytest.param({"min_tokens": 4, "stop_token_ids": list(range(64))}, id="ends held back"),
]


@pytest.mark.parametrize("changes", EXTREME)
def test_an_extreme_request_gets_an_answer(client, changes):
    answer = client.post(COMPLETION, json=GOOD | {"max_tokens": 4, "temperature": 1} | changes)
    assert answer.status_code == 200, answer.text
    assert all(c["finish_reason"] for c in answer.json()["choices"])


OUT_OF_RANGE = [
    ("temperature", -1e-45, "from 0 to 2"), ("temperature", 2.5, "from 0 to 2"),
    ("top_p", 1.0001, "from 0 to 1"), ("seed", 2**63, "9223372036854775807"),
    ("seed", 10**30, "9223372036854775807"), ("repetition_penalty", 1e-300, "from 0.01 to 10"),
    ("frequency_penalty", 1e308, "from -2 to 2"), ("presence_penalty", -3, "from -2 to 2"),
    ("logit_bias", {"1": 101}, "from -100 to 100"), ("logit_bias", {"4096": 1}, "0 to 4095"),
    ("logit_bias", {"9" * 5000: 1}, "0 to 4095"), ("prompt", [4096], "0 to 4095"),
    ("prompt", [2**31], "2147483647"), ("stop_token_ids", [4096], "0 to 4095"),
    ("n", 0, "from 1 to 128"), ("max_tokens", -1, "from 0"), ("min_p", 2, "from 0 to 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    OUT_OF_RANGE,
    ids=[f"{n} {str(v)[:20]}" for n, v, _ in OUT_OF_RANGE],
)
def test_a_value_out_of_range_is_a_400_that_says_the_range(client, name, value, allowed):
    answer = client.post(COMPLETION, json=GOOD | {name: value})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"].startswith(name)
    assert allowed in error["message"]


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("NaN", "temperature"),
        ("Infinity", "logit_bias"),
        ("-Infinity", "top_p"),
        ("1e999", "min_p"),
    ],
)
def test_what_is_no_number_is_a_400(client, spelled, name):
    value = f'{{"5": {spelled}}}' if name == "logit_bias" else spelled
    content = f'{{"prompt": "a", "{name}": {value}}}'
    answer = client.post(COMPLETION, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "param" in answer.json()["error"]


def poisoned(kind, monkeypatch):
    """Make one prompt, or its seed, break a part of the work for it."""

    def broken(original, is_poison):
        def call(self, *args, **kwargs):
            if is_poison(self, *args):
                raise ZeroDivisionError("poison")
            return original(self, *args, **kwargs)

        return call

    def of_job(part, *_):
        return part.sampling.seed == 666

    def always(*_):  # only the poisoned request asks for log-probabilities
        return True

    match kind:
        case "sampling":
            monkeypatch.setattr(Chooser, "_draw", broken(Chooser._draw, of_job))
        case "penalties and bias":
            monkeypatch.setattr(Chooser, "_adjusted", broken(Chooser._adjusted, of_job))
        case "counting":
            monkeypatch.setattr(Chooser, "update", broken(Chooser.update, of_job))
        case "log-probabilities":
            real = job.described

            def described(token, logits, count, **how):
                if count == 7:
                    raise IndexError("poison")
                return real(token, logits, count, **how)

            monkeypatch.setattr(job, "described", described)
        case "names of tokens":
            monkeypatch.setattr(logprobs, "_alternatives", broken(logprobs._alternatives, always))
        case "detokenization":
            real_add = detokenize.Detokenizer.add

            class Broken(detokenize.Detokenizer):
                def add(self, token):
                    if self._keep_special:
                        raise OverflowError("poison")
                    return real_add(self, token)

            monkeypatch.setattr(pieces, "Detokenizer", Broken)
        case "the prompt":
            real_chunk = batcher.Batcher._prefill_chunk
            monkeypatch.setattr(
                batcher.Batcher,
                "_prefill_chunk",
                broken(real_chunk, lambda _, job, *__: of_job(job)),
            )
        case "not a number":
            real_advance = job.Job.advance

            def advance(self, best, largest, logits):
                if of_job(self):
                    largest, logits = torch.nan, torch.full_like(logits, torch.nan)
                return real_advance(self, best, largest, logits)

            monkeypatch.setattr(job.Job, "advance", advance)
    return GOOD | {
        "prompt": POISON, "seed": 666, "temperature": 1, "logprobs": 7, "skip_special_tokens": False,
        "logit_bias": {"5": 1}, "frequency_penalty": 1,
    }  # fmt: skip


KINDS = [
    "sampling", "penalties and bias", "counting", "log-probabilities", "names of tokens",
    "detokenization", "the prompt", "not a number",
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_poisoned_request_fails_alone(
    server, client, expected, monkeypatch, caplog, kind, stream
):
    bad = poisoned(kind, monkeypatch) | {"stream": stream}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda b: client.post(COMPLETION, json=b), [GOOD, bad, GOOD]))
    failed = answers.pop(1)
    for good in (*answers, client.post(COMPLETION, json=GOOD)):
        assert good.status_code == 200
        assert tokens(good) == expected
    assert failed.status_code == (200 if stream else 500)
    assert '"type":"server_error"' in failed.text.replace(": ", ":")
    assert "[DONE]" not in failed.text
    assert client.get("/health").status_code == 200
    server.until_idle()
    if kind != "not a number":
        assert "this request failed while" in caplog.text


def test_a_failed_step_ends_those_in_it_and_the_engine_goes_on(client, expected, monkeypatch):
    """Decoding is the work of all rows. The model itself is checked after it and can go on."""
    real, broken = batcher.Batcher._step, threading.Event()

    def step(self):
        if len(self._rows) > 1 and not broken.is_set():
            broken.set()
            raise RuntimeError("poison")
        return real(self)

    monkeypatch.setattr(batcher.Batcher, "_step", step)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: client.post(COMPLETION, json=LONG), range(2)))
    assert [a.status_code for a in answers] == [500, 500]
    assert tokens(client.post(COMPLETION, json=GOOD)) == expected


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cache_that_was_half_moved_is_not_read(server, client, expected, monkeypatch, after):
    """There is no memory to make room for a long prompt, after a part of the layers was moved. What
    was running would go on with the wrong keys, and a 200."""
    real, moves = row_cache._moved, itertools.count()

    def moved(*args):
        if next(moves) == after:
            raise MemoryError("poison")
        return real(*args)

    monkeypatch.setattr(row_cache, "_moved", moved)
    with ThreadPoolExecutor(1) as pool:
        begun = server.steps
        running = pool.submit(client.post, COMPLETION, json=LONG)
        while server.steps < begun + 3:
            time.sleep(0.01)
        joining = client.post(COMPLETION, json=GOOD | {"prompt": [5] * 300})
    assert [a.status_code for a in (joining, running.result())] == [500, 500]
    assert tokens(client.post(COMPLETION, json=GOOD)) == expected


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_ends_more_than_a_request_is_let_through(end):
    with pytest.raises(end), isolated("this request failed"):
        raise end


DEAD = """
from llmquant_serve.engines.batching import batcher
real = batcher.Batcher._prefill_chunk
def broken(self, job, budget):
    self._model = None  # nothing can be computed any more
    return real(self, job, budget)
batcher.Batcher._prefill_chunk = broken
"""


def test_a_dead_engine_ends_the_process():
    """Whatever started it can then start it again; a server that only answers 503 cannot be
    told from one that is slow."""
    with serving_process(before=DEAD) as (process, url):
        answer = httpx.post(f"{url}{COMPLETION}", json=GOOD)
        log = process.stderr.read()
        assert answer.status_code in (500, 503)
        assert process.wait(30) == 1, log
        assert "the engine stopped, and the server must be restarted" in log
