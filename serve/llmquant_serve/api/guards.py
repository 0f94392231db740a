"""What every request passes before it reaches a route: the check of its key, the limit on its size,
and the count of answers. Plain ASGI, so that streams stay streams.

Every key is compared, in constant time, whichever matches. ``/health`` needs no key: load balancers
have none.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmquant_serve.errors import ApiError
from llmquant_serve.metrics import Metrics

_KEYLESS = frozenset({"/health"})


class Guard:
    """ASGI middleware around the whole application.

    Args:
        keys: accepted API keys; without any, requests need none.
        max_body: most bytes of a request body.
        paths: paths that metrics are labelled with; any other is "other".
        exempt: path prefix that is passed through unchecked: it has a login of its own.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        max_body: int,
        metrics: Metrics,
        paths: frozenset[str],
        exempt: str | None,
    ) -> None:
        self._app, self._max_body, self._metrics = app, max_body, metrics
        self._paths, self._exempt = paths, exempt
        self._keys = [k.encode() for k in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (
            self._exempt and f"{scope['path']}/".startswith(f"{self._exempt}/")
        ):
            await self._app(scope, receive, send)
            return
        counting_send = self._counting(scope["path"], send)
        try:
            self._check_key(scope)
            limited_receive = self._limited(scope, receive)
        except ApiError as e:
            await e.response()(scope, receive, counting_send)
            return
        await self._app(scope, limited_receive, counting_send)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in _KEYLESS or scope["method"] == "OPTIONS":
            return
        kind, _, key = _header(scope, b"authorization").partition(b" ")
        matches = [hmac.compare_digest(key.strip(), k) for k in self._keys]
        if kind.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401, "this server needs an API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that fails once the body has more than ``max_body`` bytes, whether its length
        was announced or not."""
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._max_body:
            raise self._too_large()
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body:
                e = self._too_large()
                # The one kind of exception that FastAPI lets through while it reads.
                raise HTTPException(e.status, e.message)
            return message

        return receive_limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request body is larger than {self._max_body} bytes", code="request_too_large"
        )

    def _counting(self, path: str, send: Send) -> Send:
        """``send`` that counts the answer in the metrics."""
        label = path if path in self._paths else "other"

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(label, str(message["status"])).inc()
            await send(message)

        return send_counted


def _header(scope: Scope, name: bytes) -> bytes:
    """The first value of a request header; empty where it has none."""
    value: bytes = next((v for k, v in scope["headers"] if k == name), b"")
    return value
