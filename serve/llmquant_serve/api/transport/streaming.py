"""Answers that end when their client disconnects: server-sent events, and whole answers.

Three things end a stream early, and each closes the generator of its events, which frees the
engine's slot: the client disconnects; it reads nothing for ``stall_seconds``; the server shuts down
and has waited long enough. A client that is merely slow delays nobody, since only its own
connection waits.

A stream may have nothing to send for a long time, while its request queues. Proxies and clients cut
silent connections, so it then sends comments, which every reader of events skips.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
COMMENT = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class DisconnectedError(Exception):
    """The client has disconnected before its answer was complete."""


class EventStream(Response):
    """Sends what ``events`` yields.

    Args:
        events: complete events, ``data: …\\n\\n``.
        admission: the handler's place in the gate; closed when the stream has ended.
        stall_seconds: how long a client may read nothing.
        keep_alive_seconds: a comment is sent after so long without an event; 0 sends none.
        aborted: called when the client disconnected or stalled.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        admission: ExitStack,
        stall_seconds: float,
        keep_alive_seconds: float,
        aborted: Callable[[], None],
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._admission = events, admission
        self._stall_seconds, self._aborted = stall_seconds, aborted
        self._keep_alive_seconds = keep_alive_seconds or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._admission:
            async with aclosing(self._events):
                try:
                    await _while_connected(self._send(send), receive)
                except (DisconnectedError, TimeoutError, OSError):
                    self._aborted()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._with_comments()) as events:
            async for event in events:
                async with asyncio.timeout(self._stall_seconds):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_comments(self) -> AsyncGenerator[bytes, None]:
        """The events, and a comment wherever none came for ``keep_alive_seconds``."""
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._events))
                done, _ = await asyncio.wait({coming}, timeout=self._keep_alive_seconds)
                if not done:
                    yield COMMENT
                    continue
                try:
                    event = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                yield event
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)


async def while_connected(
    request: Request, work: Coroutine[Any, Any, T], aborted: Callable[[], None]
) -> T:
    """The result of ``work``, which is cancelled if the client disconnects first.

    Args:
        aborted: called when it did.

    Raises:
        DisconnectedError: it did.
    """
    try:
        return await _while_connected(work, request.receive)
    except DisconnectedError:
        aborted()
        raise


async def _while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DisconnectedError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    """Returns when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
