"""What every request passes before it reaches a route: its key, its size, its count. Plain ASGI, so
that streams stay streams.

Keys are compared in constant time and all of them are, whichever matches. ``/health`` needs no key:
load balancers have none.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmquant_serve.errors import ApiError
from llmquant_serve.metrics import Metrics

_OPEN = frozenset({"/health"})


class Guard:
    """ASGI middleware; see the module text.

    Args:
        keys: accepted API keys; none means that everybody is welcome.
        max_body: bytes of a request body.
        exempt: path prefix with a login of its own.
        paths: paths that metrics are labelled with; any other is "other".
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
        self._app, self._max_body, self._metrics, self._paths, self._exempt = (
            app,
            max_body,
            metrics,
            paths,
            exempt,
        )
        self._keys = [k.encode() for k in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (
            self._exempt and f"{scope['path']}/".startswith(f"{self._exempt}/")
        ):
            await self._app(scope, receive, send)
            return
        counted = self._counted(scope["path"], send)
        try:
            self._check_key(scope)
            limited = self._limited(scope, receive)
        except ApiError as e:
            await e.response()(scope, receive, counted)
            return
        await self._app(scope, limited, counted)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return
        kind, _, key = _header(scope, b"authorization").partition(b" ")
        known = [hmac.compare_digest(key.strip(), k) for k in self._keys]
        if kind.lower() != b"bearer" or not any(known):
            raise ApiError(
                401, "this server needs an API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that fails once more than ``max_body`` bytes came, announced or not."""
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._max_body:
            raise self._too_big()
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._max_body:
                e = self._too_big()
                raise HTTPException(
                    e.status, e.message
                )  # the one kind that FastAPI lets through while it reads
            return message

        return counted

    def _too_big(self) -> ApiError:
        return ApiError(
            413, f"the request body is larger than {self._max_body} bytes", code="request_too_large"
        )

    def _counted(self, path: str, send: Send) -> Send:
        label = path if path in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(label, str(message["status"])).inc()
            await send(message)

        return counting


def _header(scope: Scope, name: bytes) -> bytes:
    found: bytes = next((v for k, v in scope["headers"] if k == name), b"")
    return found
