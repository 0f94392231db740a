"""A server shaped like vLLM's OpenAI endpoint whose log-probabilities are a real model's, for
tests.

``dialect``: ``ids`` answers ``prompt_logprobs`` as vLLM does, ``echo`` refuses that field and
answers ``echo`` with ``logprobs`` as OpenAI did, ``none`` ignores both, as llama.cpp's server does.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

Fault = Callable[[BaseHTTPRequestHandler], None]
"""Takes the place of an answer."""


def status(code: int, **headers: str) -> Fault:
    """Another status, with headers as ``retry_after="1"``."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = json.dumps({"error": {"message": f"no, {code}"}}).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-").title(), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends without an answer."""
    handler.connection.close()


def cut(handler: BaseHTTPRequestHandler) -> None:
    """The connection ends in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"object": "text_comp')


def cut_without_length(handler: BaseHTTPRequestHandler) -> None:
    """The same where only the end of the connection ends an answer."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"object": "text_comp')


@functools.cache
def _loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


class FakeServer:
    """Answers of one model; ``spoil`` may change an answer before it is sent.

    ``faults`` are taken one by one in place of answers to prompts, beginning with prompt number
    ``good``; ``dies`` repeats the last one for good.
    """

    def __init__(self, folder: Path, dialect: str, context: int | None) -> None:
        self.model, self.tokenizer = _loaded(folder)
        self.name, self.dialect, self.context = folder.name, dialect, context
        self.requests: list[dict[str, Any]] = []
        self.spoil: Any = lambda answer: answer
        self.faults: list[Fault] = []
        self.good, self.dies = 0, False
        self.asked: list[float] = []  # when, prompts only
        self.lock = threading.Lock()
        self.url = ""

    def models(self) -> dict[str, Any]:
        entry = {
            "id": self.name,
            "object": "model",
            "owned_by": "vllm",
            "max_model_len": self.context,
        }
        return {"object": "list", "data": [entry]}

    def fault(self) -> Fault | None:
        """What to do instead of answering the prompt that has come."""
        with self.lock:
            self.asked.append(time.monotonic())
            if len(self.asked) <= self.good or not self.faults:
                return None
            return self.faults[0] if self.dies and len(self.faults) == 1 else self.faults.pop(0)

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and answer of one completion."""
        with self.lock:
            self.requests.append(body)
            ids = body["prompt"]
            if self.dialect == "echo" and "prompt_logprobs" in body:
                return 400, {"error": {"message": "unknown field prompt_logprobs"}}
            if self.context is not None and len(ids) + body["max_tokens"] > self.context:
                return 400, {
                    "error": {"message": f"maximum context length is {self.context} tokens"}
                }
            with torch.no_grad():
                log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            choice: dict[str, Any] = {
                "index": 0,
                "text": self._text(ids, body),
                "finish_reason": "length",
                "logprobs": None,
            }
            if self.dialect == "ids" and "prompt_logprobs" in body:
                choice["prompt_logprobs"] = self._by_id(ids, log_p)
            if self.dialect == "echo" and body.get("echo"):
                choice["logprobs"] = self._echoed(ids, log_p)
            return 200, self.spoil(
                {"object": "text_completion", "model": self.name, "choices": [choice]}
            )

    def _text(self, ids: list[int], body: dict[str, Any]) -> str:
        new = self.model.generate(
            torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False
        )[0][len(ids) :]
        return str(self.tokenizer.decode(new))

    def _by_id(self, ids: list[int], log_p: torch.Tensor) -> list[dict[str, Any] | None]:
        entries: list[dict[str, Any] | None] = [None]
        for row, token in zip(log_p[:-1], ids[1:], strict=True):
            best = int(row.argmax())
            rank = int((row > row[token]).sum()) + 1
            entry = {str(token): {"logprob": float(row[token]), "rank": rank, "decoded_token": "?"}}
            entries.append(
                entry | {str(best): {"logprob": float(row[best]), "rank": 1, "decoded_token": "?"}}
            )
        return entries

    def _echoed(self, ids: list[int], log_p: torch.Tensor) -> dict[str, Any]:
        tokens = [self.tokenizer.decode([i]) for i in ids]
        values = [
            None,
            *(float(row[token]) for row, token in zip(log_p[:-1], ids[1:], strict=True)),
        ]
        tops = [
            None,
            *({self.tokenizer.decode([int(row.argmax())]): float(row.max())} for row in log_p[:-1]),
        ]
        # The generated token comes last; what it is does not matter.
        return {
            "tokens": [*tokens, "x"],
            "token_logprobs": [*values, -1.0],
            "top_logprobs": [*tops, {"x": -1.0}],
            "text_offset": list(range(len(ids) + 1)),
        }


@contextmanager
def serving(
    folder: Path, dialect: str = "ids", context: int | None = None, port: int = 0
) -> Iterator[FakeServer]:
    """A running server; its ``url`` ends in ``/v1``. Port 0 is a free one."""
    fake = FakeServer(folder, dialect, context)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, fake.models())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = fake.fault()
            if fault is not None:
                fault(self)
            else:
                self._answer(*fake.complete(body))

        def _answer(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
