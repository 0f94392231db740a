"""A server shaped like vLLM's OpenAI endpoint whose log-probabilities are a real model's, for
tests.

``dialect``: ``ids`` answers ``prompt_logprobs`` as vLLM does, ``echo`` refuses that field and
answers ``echo`` with ``logprobs`` as OpenAI did, ``none`` ignores both, as llama.cpp's server does.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch


class FakeServer:
    """Answers of one model; ``spoil`` may change an answer before it is sent."""

    def __init__(self, folder: Path, dialect: str, context: int | None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name, self.dialect, self.context = folder.name, dialect, context
        self.requests: list[dict[str, Any]] = []
        self.spoil: Any = lambda answer: answer
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
def serving(folder: Path, dialect: str = "ids", context: int | None = None) -> Iterator[FakeServer]:
    """A running server; its ``url`` ends in ``/v1``."""
    fake = FakeServer(folder, dialect, context)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, fake.models())

        def do_POST(self) -> None:
            self._answer(
                *fake.complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            )

        def _answer(self, status: int, answer: Any) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
