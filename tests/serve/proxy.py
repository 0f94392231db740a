"""A reverse proxy for tests: one server under a prefix, as nginx does it with ``proxy_pass``."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_OWN = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@contextmanager
def proxied(
    url: str, prefix: str, *, strip: bool = True, headers: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The address of ``url`` behind a proxy.

    Args:
        strip: take the prefix off the path.
        headers: added to every request.
    """
    target = urlsplit(url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            if not f"{self.path}/".startswith(f"{prefix}/"):
                self.send_error(404)
                return
            path = (self.path[len(prefix) :] or "/") if strip else self.path
            length = int(self.headers.get("content-length", 0))
            sent = {k: v for k, v in self.headers.items() if k.lower() not in _OWN}
            connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
            connection.request(
                self.command, path, self.rfile.read(length) or None, sent | dict(headers or {})
            )
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _OWN:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                while piece := answer.read1(65536):
                    self.wfile.write(piece)
                    self.wfile.flush()
            except OSError:  # the browser has left
                pass
            finally:
                connection.close()
                self.close_connection = True

        do_GET = do_POST = do_HEAD = do_OPTIONS = _forward  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A browser that leaves is no error."""

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
