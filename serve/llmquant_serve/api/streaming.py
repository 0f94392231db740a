"""Answers that outlive their handler: server-sent events, and answers in one that stop when nobody
waits for them.

Three things end a stream early, and each closes the generator below, which frees the engine's slot:
the client disconnects; it takes nothing for ``stall_seconds``; the server shuts down and has waited
long enough. A reader that is merely slow holds up nobody, since only its own connection waits.
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
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Gone(Exception):  # noqa: N818 - it is no error of ours
    """The client has left."""


class EventStream(Response):
    """Sends what ``events`` yields; ``held`` is left when all is over.

    Args:
        events: complete events, ``data: …\\n\\n``.
        held: what the handler has entered, a place in the gate.
        aborted: called when the client left or stalled.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: ExitStack,
        stall_seconds: float,
        aborted: Callable[[], None],
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events, self._held, self._stall, self._aborted = events, held, stall_seconds, aborted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            async with aclosing(self._events):
                try:
                    await unless_gone(self._send(send), receive)
                except (Gone, TimeoutError, OSError):
                    self._aborted()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(self._stall):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of ``work``, which is cancelled if the client disconnects first.

    Raises:
        Gone: it did.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def answered(
    request: Request, work: Coroutine[Any, Any, T], aborted: Callable[[], None]
) -> T:
    """The same for a handler that answers in one."""
    try:
        return await unless_gone(work, request.receive)
    except Gone:
        aborted()
        raise
