"""The onnx engine without ONNX: sequences take turns, one request's failure stays its own.

``tests/onnx`` runs it with the real worker.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquant.errors import LlmquantError, UsageError
from llmquant_serve.build import build_engine
from llmquant_serve.engines.base import EngineError, ModelInfo, Sampling, Step, StoppedError
from llmquant_serve.engines.onnx.engine import OnnxEngine, onnx_engine
from llmquant_serve.engines.onnx.sequences import PROMPT_CHUNK
from llmquant_serve.engines.options import ModelOptions

VOCABULARY = 16
END = 15
POISON = 13
GREEDY = Sampling(max_tokens=6, temperature=0.0)


class CountingWorker:
    """A model whose next token is the last one plus one. A prompt with POISON in its first part
    fails; ``gone`` makes everything fail. Nothing runs while a test keeps ``begin`` clear."""

    def __init__(self) -> None:
        self.sequences: dict[int, list[int]] = {}
        self.turns: list[int] = []
        self.begin = threading.Event()
        self.begin.set()
        self.gone = self.closed = False

    def open(self, length: int) -> int:
        if self.gone:
            raise LlmquantError("the process ended")
        number = len(self.turns) + len(self.sequences) + 1
        self.sequences[number] = []
        return number

    def append(self, sequence: int, tokens: Sequence[int], *, every: bool = False) -> Tensor:
        assert self.begin.wait(60)
        if self.gone or (POISON in tokens and not self.sequences[sequence]):
            raise LlmquantError("ONNX Runtime failed")
        self.sequences[sequence] += tokens
        self.turns.append(sequence)
        logits = torch.zeros(len(tokens), VOCABULARY)
        for row, token in zip(logits, tokens, strict=True):
            row[(token + 1) % VOCABULARY] = 9.0
        return logits if every else logits[-1]

    def forget(self, sequence: int) -> None:
        if self.gone:
            raise LlmquantError("the process ended")
        del self.sequences[sequence]

    def close(self) -> None:
        self.closed = True


def engine_of(worker: Any, streams: int = 2) -> OnnxEngine:
    return OnnxEngine(ModelInfo(64, VOCABULARY, frozenset([END])), worker, streams)


async def steps_of(engine: OnnxEngine, prompt: list[int], sampling: Sampling) -> list[Step]:
    return [step async for step in engine.generate(prompt, sampling)]


def tokens(steps: list[Step]) -> list[int]:
    return [t.id for step in steps for t in step.tokens]


async def together(worker: CountingWorker, *prompts: list[int]) -> list[list[Step]]:
    """The answers to requests of which each is in the queue before the first token is computed."""
    engine = engine_of(worker)
    await engine.start()
    worker.begin.clear()
    answers = [asyncio.create_task(steps_of(engine, prompt, GREEDY)) for prompt in prompts]
    await asyncio.sleep(0)
    worker.begin.set()
    found = await asyncio.gather(*answers)
    await engine.close()
    return found


def test_requests_take_turns_and_end() -> None:
    worker = CountingWorker()
    first, second = asyncio.run(together(worker, [0, 1], [4]))
    assert tokens(first) == [2, 3, 4, 5, 6, 7]
    assert first[-1].finish == "length"
    assert tokens(second) == [5, 6, 7, 8, 9, 10]
    assert set(worker.turns[:4]) == set(worker.turns)  # the second did not wait for the first
    assert worker.sequences == {}
    assert worker.closed


def test_the_end_token_ends() -> None:
    async def ask() -> list[Step]:
        engine = engine_of(CountingWorker())
        await engine.start()
        steps = await steps_of(engine, [14], GREEDY)
        await engine.close()
        return steps

    steps = asyncio.run(ask())
    assert (tokens(steps), steps[-1].finish) == ([END], "stop")


def test_a_prompt_is_scored() -> None:
    async def ask() -> list[Step]:
        engine = engine_of(CountingWorker())
        await engine.start()
        scored = Sampling(max_tokens=0, prompt_logprobs=1)
        steps = await steps_of(engine, [3, 4, 6], scored)
        await engine.close()
        return steps

    steps = asyncio.run(ask())
    prompt = steps[0].prompt
    assert prompt is not None
    assert [t.id for t in prompt] == [3, 4, 6]
    assert prompt[0].logprob is None
    assert prompt[1].logprob is not None
    assert prompt[2].logprob is not None
    assert prompt[1].logprob > -0.01 > prompt[2].logprob
    assert steps[-1].finish == "length"


def test_a_request_that_fails_leaves_the_others() -> None:
    worker = CountingWorker()

    async def ask() -> list[Step]:
        engine = engine_of(worker)
        await engine.start()
        with pytest.raises(EngineError, match="ONNX Runtime failed"):
            await steps_of(engine, [POISON], GREEDY)
        assert engine.health().ok
        steps = await steps_of(engine, [0], GREEDY)
        await engine.close()
        return steps

    assert len(tokens(asyncio.run(ask()))) == 6
    assert worker.sequences == {}


def test_an_engine_whose_process_is_gone_says_so() -> None:
    worker = CountingWorker()

    async def ask() -> None:
        engine = engine_of(worker)
        await engine.start()
        worker.gone = True
        with pytest.raises(EngineError, match="the process ended"):
            await steps_of(engine, [0], GREEDY)
        while engine.health().ok:
            await asyncio.sleep(0.01)
        assert engine.health().dead
        with pytest.raises(StoppedError, match="must be restarted"):
            await steps_of(engine, [0], GREEDY)
        await engine.close()

    asyncio.run(ask())


def test_a_reader_who_leaves_frees_the_sequence() -> None:
    worker = CountingWorker()

    async def ask() -> None:
        engine = engine_of(worker)
        await engine.start()
        stream = engine.generate([0], Sampling(max_tokens=10_000, ignore_eos=True, top_k=1))
        await anext(stream)
        await stream.aclose()
        while worker.sequences:
            await asyncio.sleep(0.01)
        await engine.close()

    asyncio.run(ask())


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    worker = CountingWorker()
    long = [0, 1] * (PROMPT_CHUNK * 2)
    first, second = asyncio.run(together(worker, [4], long))
    assert tokens(first) == [5, 6, 7, 8, 9, 10]
    assert tokens(second) == [2, 3, 4, 5, 6, 7]
    other = worker.turns[1] if worker.turns[1] != worker.turns[0] else worker.turns[2]
    between = worker.turns.index(other), worker.turns.index(other) + 8
    assert worker.turns[slice(*between)].count(other) == 4  # its four parts, one in each round


def test_a_scored_prompt_in_parts_has_all_its_scores() -> None:
    worker = CountingWorker()
    long = [0, 1] * PROMPT_CHUNK

    async def ask() -> list[Step]:
        engine = engine_of(worker)
        await engine.start()
        worker.begin.clear()
        scored = Sampling(max_tokens=0, prompt_logprobs=1)
        answers = [
            asyncio.create_task(steps_of(engine, [0], GREEDY)),
            asyncio.create_task(steps_of(engine, long, scored)),
        ]
        await asyncio.sleep(0)
        worker.begin.set()
        _, steps = await asyncio.gather(*answers)
        await engine.close()
        return steps

    prompt = asyncio.run(ask())[0].prompt
    assert prompt is not None
    assert [t.id for t in prompt] == long
    assert [t.logprob is not None and t.logprob > -0.01 for t in prompt[1:]] == [True, False] * (
        PROMPT_CHUNK - 1
    ) + [True]


def test_a_reader_who_leaves_before_his_turn_leaves_the_queue() -> None:
    worker = CountingWorker()

    async def ask() -> None:
        engine = engine_of(worker, streams=1)
        await engine.start()
        endless = Sampling(max_tokens=10_000_000, ignore_eos=True, top_k=1)
        stream = engine.generate([0], endless)
        await anext(stream)
        second = asyncio.create_task(steps_of(engine, [0], GREEDY))
        while engine.load().waiting == 0:
            await asyncio.sleep(0.01)
        second.cancel()
        while engine.load().waiting:
            await asyncio.sleep(0.01)
        assert engine.load().running == 1
        await stream.aclose()
        await engine.close()

    asyncio.run(ask())


def test_a_process_that_dies_while_it_answers_ends_the_engine_with_its_reason() -> None:
    worker = CountingWorker()

    async def ask() -> None:
        engine = engine_of(worker)
        await engine.start()
        stream = engine.generate([0], Sampling(max_tokens=10_000_000, ignore_eos=True, top_k=1))
        await anext(stream)
        worker.gone = True
        with pytest.raises(EngineError, match="ONNX Runtime failed"):
            async for _ in stream:
                pass
        while engine.health().ok:
            await asyncio.sleep(0.01)
        assert "the process ended" in engine.health().detail
        await engine.close()

    asyncio.run(ask())


def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    refusal = engine_of(CountingWorker()).why_not(Sampling(grammar={"type": "object"}))
    assert refusal is not None
    assert refusal.parameter == "response_format"
    with pytest.raises(UsageError, match="--dtype is for the local engine"):
        onnx_engine(ModelOptions(model=str(tmp_path), dtype="bfloat16"), 1)
    with pytest.raises(UsageError, match="need --engine vllm"):
        build_engine(ModelOptions(model=str(tmp_path), engine="onnx", vllm_url="http://x"), 1)
