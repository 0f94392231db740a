"""Runs: what each visitor of the chat page has under way, so that Stop, Clear and leaving end it at
once.

Work runs in tasks of ours and the page only looks on: a page framework may forget a generator
without closing it, and a reply that nobody reads must not keep its slot.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

T = TypeVar("T")
_PACE_SECONDS = 0.1  # a page that is redrawn for every token has no time left for a click


class Runs(Generic[T]):
    """Running generators by visitor."""

    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[None]]] = defaultdict(set)

    async def follow(self, visitor: str, work: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """What ``work`` yields, at most ten times a second and then the latest; ends early when
        stopped."""
        news: asyncio.Queue[T | Exception | None] = asyncio.Queue()
        task = asyncio.create_task(_feed(work, news))
        self._tasks[visitor].add(task)
        task.add_done_callback(lambda done: self._forget(visitor, done))
        try:
            ended = False
            while not ended:
                found = [await news.get()]
                if task.cancelling():
                    # stopped: what came meanwhile must not overwrite what the page shows by now
                    return
                while not news.empty():
                    found.append(news.get_nowait())
                failures = [item for item in found if isinstance(item, Exception)]
                fresh = [
                    item for item in found if item is not None and not isinstance(item, Exception)
                ]
                if fresh:
                    yield fresh[-1]
                if failures:
                    raise failures[0]
                ended = None in found
                if not ended:
                    await asyncio.sleep(_PACE_SECONDS)
        finally:
            task.cancel()

    def stop(self, visitor: str) -> None:
        """End everything that a visitor has under way."""
        for task in list(self._tasks.get(visitor, ())):
            task.cancel()

    def _forget(self, visitor: str, task: asyncio.Task[None]) -> None:
        self._tasks[visitor].discard(task)
        if not self._tasks[visitor]:
            del self._tasks[visitor]


async def _feed(
    work: AsyncGenerator[T, None], news: asyncio.Queue[T | Exception | None] | _Side[T]
) -> None:
    try:
        async with aclosing(work):
            async for item in work:
                news.put_nowait(item)
    except Exception as e:  # noqa: BLE001 - handed to the page, which raises it
        news.put_nowait(e)
    finally:
        news.put_nowait(None)


async def together(
    works: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[list[T | None], None]:
    """Several generators side by side: the latest of each, whenever one has something new."""
    news: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_feed(work, _Side(news, i))) for i, work in enumerate(works)]
    now: list[T | None] = [None] * len(works)
    left = len(works)
    try:
        while left:
            side, item = await news.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
                continue
            now[side] = item
            yield list(now)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Side(Generic[T]):
    """The place of one generator's news in a common queue."""

    def __init__(self, news: asyncio.Queue[tuple[int, T | Exception | None]], side: int) -> None:
        self._news, self._side = news, side

    def put_nowait(self, item: T | Exception | None) -> None:
        self._news.put_nowait((self._side, item))
