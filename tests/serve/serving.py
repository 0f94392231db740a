"""Helpers of the serving tests: the model's own answers, an engine alone, and a live server in a
thread."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from transformers import PreTrainedModel

from llmquant_serve.api.app import create_app
from llmquant_serve.api.transport.addresses import THIS_MACHINE, believing
from llmquant_serve.engines.base import Engine, Sampling, Token
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
NAME = "tiny"
TEXTS = (
    "The river runs through the town and",
    "In 1983 the team represented",
    "She opened the door, and there stood",
    "The album was released in",
    "He was born in",
    "What is the sum of 12 and 30?",
    "The castle on the hill",
    "It was the best of times, it was the worst of",
)


class StepCounter:
    """Counts the decoding steps of a local engine; an engine elsewhere has none to count.

    Attributes:
        steps: so far.
        pause: seconds to wait before each, so that a reply outlasts what a test does meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self.steps, self.pause = 0, 0.0
        if isinstance(engine, LocalEngine):
            self._decode = engine._jobs._decode
            engine._jobs._decode = self._counted

    def _counted(self) -> None:
        self.steps += 1
        time.sleep(self.pause)
        self._decode()


@dataclass
class Server:
    """A live server, its service, and the count of its decoding steps."""

    url: str
    service: Service
    counter: StepCounter

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    @property
    def steps(self) -> int:
        """Decoding steps so far: a request that was dropped must not cause more."""
        return self.counter.steps

    def until_idle(self, seconds: float = 20.0) -> None:
        """Wait for every slot and every place in the gate to be free again."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            load = self.service.engine.load()
            if load.running == load.waiting == self.service.gate.open == 0:
                return
            time.sleep(0.02)
        raise AssertionError(
            f"still busy: {self.service.engine.load()}, gate {self.service.gate.open}"
        )


def greedy(
    model: PreTrainedModel, prompt: Sequence[int], count: int, *, eos: bool = True
) -> list[int]:
    """``model.generate``'s own tokens."""
    ids = torch.tensor([list(prompt)])
    ends: dict[str, Any] = {} if eos else {"eos_token_id": None}
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **ends
        )
    return out[0, len(prompt) :].tolist()


async def collect(engine: LocalEngine, prompt: Sequence[int], sampling: Sampling) -> list[Token]:
    return [token async for step in engine.generate(prompt, sampling) for token in step.tokens]


def with_engine(model: PreTrainedModel, work: Callable[[LocalEngine], Any], **options: Any) -> Any:
    """Run ``work(engine)``, a coroutine, on a fresh engine."""

    async def main() -> Any:
        engine = LocalEngine(model, **options)
        await engine.start()
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


@contextmanager
def running(
    service: Service,
    extend: Callable[[FastAPI], None] | None = None,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[Server]:
    """The service under uvicorn, in a thread; ``extend`` adds to the application.

    ``send_buffer`` bounds what the kernel takes of an answer that nobody reads; by itself it takes
    megabytes.
    """
    counter = StepCounter(service.engine)
    app = create_app(service, **options)
    if extend is not None:
        extend(app)
    config = uvicorn.Config(
        believing(app, THIS_MACHINE),
        proxy_headers=False,
        log_level="warning",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    with socket.socket() as sock:
        if send_buffer is not None:
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer
            )  # accepted sockets inherit it
        sock.bind(("127.0.0.1", 0))
        sock.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Server(f"http://127.0.0.1:{sock.getsockname()[1]}", service, counter)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


MakeServer = Callable[..., AbstractContextManager[Server]]


@contextmanager
def served(
    model: PreTrainedModel,
    text: TextModel | None = None,
    limits: Limits | None = None,
    **options: Any,
) -> Iterator[Server]:
    """A model behind a server of its own; tiny-llama's tokenizer unless there is a ``text``."""
    limits = limits or Limits()
    engine = LocalEngine(model, limits.max_streams)
    text = text or TextModel(TINY, engine.info.vocab)
    with running(Service(engine, text, NAME, limits), **options) as server:
        yield server


@contextmanager
def serving_process(
    *arguments: str, before: str = ""
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``llmquant serve`` of tiny-llama in a process of its own, and its address.

    Args:
        before: Python to run first in that process.
    """
    paths = os.pathsep.join(str(TINY.parents[1] / p) for p in ("", "eval", "serve"))
    script = f"{before}\nfrom llmquant.cli import main; main()"
    options = ["serve", str(TINY), "--port", "0", "--device", "cpu", "--dtype", "float32"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *options, *arguments],
        env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            yield process, next(filter(None, map(_address, lines)))
        finally:
            process.kill()


def _address(line: str) -> str | None:
    """The address in the line that says that the server listens."""
    match = re.search(r"at (http://\S+)/v1, engine", line)
    return match and match[1]


def with_template(template: str, vocab: int = 4096) -> TextModel:
    """tiny-llama's tokenizer with another chat template."""
    text = TextModel(TINY, vocab)
    text.tokenizer.chat_template = template
    return text
