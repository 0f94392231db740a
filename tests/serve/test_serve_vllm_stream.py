"""The ``vllm`` engine against scripted answers: steps, refusals, failures; no vLLM is needed."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from llmquant_serve.engines.base import EngineError, ModelInfo, RefusedError, Sampling, Step, Token
from llmquant_serve.engines.vllm import VllmEngine

LOGPROBS = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:9": -0.5, "token_id:7": -0.5}]}


def part(ids, finish=None, logprobs=None):
    return {"choices": [{"token_ids": ids, "finish_reason": finish, "logprobs": logprobs}]}


def events(*parts):
    return "".join(f"data: {json.dumps(p)}\n\n" for p in parts) + "data: [DONE]\n\n"


def steps_of(text, status=200):
    async def main():
        engine = VllmEngine(ModelInfo(64, 100, frozenset()), None, "http://vllm", None, "served")
        answer = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
        engine._client = httpx.AsyncClient(transport=answer)
        try:
            return [step async for step in engine.generate([1, 2], Sampling(max_tokens=4))]
        finally:
            assert engine.load().running == 0
            await engine._client.aclose()

    return asyncio.run(main())


def test_a_stream_is_steps():
    text = events(part([5, 6]), part([7], "stop", LOGPROBS))
    chosen_first = Token(7, -0.5, ((7, -0.5), (9, -0.5)))
    assert steps_of(text) == [Step((Token(5), Token(6))), Step((chosen_first,), "stop")]


@pytest.mark.parametrize(
    ("text", "status", "error", "message"),
    [
        pytest.param("no such model", 400, RefusedError, "refuses the request", id="refused"),
        pytest.param("out of memory", 500, EngineError, "answered 500: out of", id="failed"),
        pytest.param(events({"error": {"message": "dead"}}), 200, EngineError, "dead", id="event"),
        pytest.param(events(part([5], "abort")), 200, EngineError, "'abort'", id="aborted"),
        pytest.param(events(part([5])), 200, EngineError, "before the answer", id="cut off"),
    ],
)
def test_what_goes_wrong_is_an_error(text, status, error, message):
    with pytest.raises(error, match=message):
        steps_of(text, status)
