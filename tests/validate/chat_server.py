"""A chat server whose answers a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answering = Callable[[Mapping[str, Any]], Mapping[str, Any] | int]
"""A message for a request's body, or a status."""


class ChatServer:
    """``url`` ends in ``/v1``; ``requests`` are paths and bodies, in the order they came."""

    def __init__(self, answer: Answering) -> None:
        self.answer, self.url = answer, ""
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.finish = "stop"

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append((path, body))
        said = self.answer(body)
        if isinstance(said, int):
            return said, {"error": {"message": f"no, {said}"}}
        choice = {"index": 0, "message": said, "finish_reason": self.finish}
        if path.endswith("/v1/completions"):
            choice = {"index": 0, "text": said["content"], "finish_reason": self.finish}
        return 200, {"choices": [choice], "usage": {"completion_tokens": 3}}


@contextmanager
def chatting(answer: Answering) -> Iterator[ChatServer]:
    fake = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "m", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*fake.respond(self.path, body))

        def _send(self, status: int, answer: Any) -> None:
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
