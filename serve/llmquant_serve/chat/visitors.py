"""Runs: what each visitor of the chat page has running, so that Stop, Clear and leaving end it at
once.

The work runs in tasks of ours and the page only reads from them: a page framework may forget a
generator without closing it, and a reply that nobody reads must not keep its slot.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")
_PACE_SECONDS = 0.1  # a page that is redrawn for every token has no time left for a click


class Runs(Generic[T]):
    """Running generators by visitor."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[None]]] = defaultdict(set)

    async def follow(self, visitor: str, work: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What ``work`` yields, at most ten times a second and then the latest. Ends early when
        stopped; raises what ``work`` raises. What the visitor had running before is stopped."""
        self.stop(visitor)
        news: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
        task = asyncio.create_task(_forward(work, news))
        self._tasks[visitor].add(task)
        task.add_done_callback(lambda done: self._forget(visitor, done))
        task.add_done_callback(news.put_nowait)  # the end, after the last item
        try:
            while True:
                arrived = [await news.get()]
                if task.cancelling():
                    # Stopped: what came meanwhile must not overwrite what the page shows by now.
                    return
                while not news.empty():
                    arrived.append(news.get_nowait())
                items = [item for item in arrived if not isinstance(item, asyncio.Task)]
                if items:
                    yield items[-1]
                if len(items) < len(arrived):
                    if not task.cancelled():
                        task.result()
                    return
                await asyncio.sleep(_PACE_SECONDS)
        finally:
            task.cancel()

    def stop(self, visitor: str) -> None:
        """End everything that a visitor has running."""
        for task in list(self._tasks.get(visitor, ())):
            task.cancel()

    def running(self, visitor: str) -> bool:
        """Whether a visitor has something running that nothing has stopped."""
        return any(not task.cancelling() for task in self._tasks.get(visitor, ()))

    def _forget(self, visitor: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # asyncio reports errors that nobody asked for; a visitor may be gone
        self._tasks[visitor].discard(task)
        if not self._tasks[visitor]:
            del self._tasks[visitor]


async def _forward(
    work: AsyncGenerator[T, None], news: asyncio.Queue[T | asyncio.Task[None]]
) -> None:
    async with aclosing(work):
        async for item in work:
            news.put_nowait(item)
