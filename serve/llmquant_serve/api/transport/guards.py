"""What every request passes before it reaches a route, the chat page's too: its address, the origin
of the page that sent it, its key, its kind and size, and the count of answers. Plain ASGI, so that
streams stay streams.

Every key is compared, in constant time, whichever matches. ``/health`` needs no key: load balancers
have none. The chat page has a login of its own; of what its framework can do, only what the page
needs is let through, and no upload is.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmquant_serve.api.error_handlers import engine_error
from llmquant_serve.api.requests import BODIES
from llmquant_serve.api.transport.addresses import Addresses
from llmquant_serve.engines.base import EngineError
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.errors import ApiError, bad_request
from llmquant_serve.metrics import Metrics

_KEYLESS = frozenset({"/health"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# What the chat page posts: a login, an event, its end.
_PAGE_POSTS = (
    "/login",
    "/gradio_api/queue/join",
    "/gradio_api/run/predict",
    "/gradio_api/cancel",
    "/gradio_api/reset",
)
_PAGE_WRITES = ("/gradio_api/deep_link",)  # by GET


class Guard:
    """ASGI middleware around the whole application.

    Args:
        keys: accepted API keys; without any, requests need none.
        max_body: most bytes of a request body.
        paths: paths that metrics are labelled with; any other is "other".
        stopping: whether a shutdown is cutting off what still runs.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        addresses: Addresses,
        keys: Sequence[str],
        max_body: int,
        metrics: Metrics,
        paths: frozenset[str],
        stopping: Callable[[], bool],
    ) -> None:
        self._app, self._max_body, self._metrics = app, max_body, metrics
        self._addresses, self._paths, self._stopping = addresses, paths, stopping
        self._keys = [k.encode() for k in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope, path = self._addresses.resolved(scope)
        on_page = self._addresses.on_page(path)
        answer = _Answer(send, self._metrics, path if path in self._paths else "other")
        try:
            self._check_origin(scope)
            if on_page:
                self._check_page(scope, path)
            else:
                self._check_key(scope, path)
                if path in BODIES:
                    _check_kind(scope)
                if scope["method"] == "HEAD":  # the server leaves the body out by itself
                    scope = {**scope, "method": "GET"}
            limited_receive = self._limited(scope, receive)
            with isolated("this request failed while being answered"):
                await self._app(scope, limited_receive, answer.send)
        except ApiError as e:
            await answer.refuse(e, scope, receive)
        except EngineError as e:
            await answer.refuse(engine_error(e), scope, receive)
        except asyncio.CancelledError:
            if not self._stopping():
                raise
            await answer.end()

    def _check_origin(self, scope: Scope) -> None:
        if scope["method"] in _SAFE:
            return
        origin = self._addresses.foreign_origin(scope)
        if origin is not None:
            raise ApiError(
                403,
                f"the request comes from a page of another origin ({origin}); this server takes it "
                "only from its own page, unless --cors-origin names the other one",
                parameter="Origin",
                code="origin_not_allowed",
            )

    def _check_page(self, scope: Scope, path: str) -> None:
        """Refuse what the page's framework has a route for and the page does not need."""
        inner = path.removeprefix(self._addresses.page or "").rstrip("/")
        allowed = inner not in _PAGE_WRITES if scope["method"] in _SAFE else inner in _PAGE_POSTS
        if not allowed:
            raise ApiError(404, f"the chat page has no {scope['method']} {path}", code="not_found")

    def _check_key(self, scope: Scope, path: str) -> None:
        if not self._keys or path in _KEYLESS or scope["method"] == "OPTIONS":
            return
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1")
        matches = [hmac.compare_digest(sent, k) for k in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "this server needs an API key: send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that fails once the body has more than ``max_body`` bytes, whether its length
        was announced or not."""
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > self._max_body:
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
            413,
            f"the request body is larger than {self._max_body} bytes, which is what this server takes",
            code="request_too_large",
        )


def _check_kind(scope: Scope) -> None:
    """Refuse a body that cannot be read as JSON, before its bytes are taken for some.

    A browser sends other kinds to any server without asking it first; so a body of another kind is
    not read as JSON, even if it is.
    """
    if scope["method"] != "POST":
        return
    headers = Headers(scope=scope)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise bad_request(
            f"Content-Encoding is {encoding!r}; send the body as it is, not compressed",
            "Content-Encoding",
            "unsupported_encoding",
        )
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise bad_request(
            f"Content-Type is {kind!r}; it must be 'application/json' (curl: -H 'Content-Type: application/json')"
            if kind
            else "Content-Type is missing; it must be 'application/json'",
            "Content-Type",
            "unsupported_content_type",
        )


class _Answer:
    """The answer to one request, counted in the metrics."""

    def __init__(self, send: Send, metrics: Metrics, label: str) -> None:
        self._send, self._metrics, self._label = send, metrics, label
        self._started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._metrics.requests.labels(self._label, str(message["status"])).inc()
        await self._send(message)

    async def end(self) -> None:
        """End an answer where it is."""
        if self._started:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Send an error, if nothing was sent before."""
        if not self._started:
            await error.response()(scope, receive, self.send)
