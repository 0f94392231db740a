"""Several async generators as one, in the order in which their items arrive.

Each generator runs in a task of its own. A task that ends puts itself into the queue after its last
item: the reader then takes the task's result, which raises whatever the generator raised. So errors
need no handler here, and no error overtakes an item that came before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")
_AHEAD = 16  # items that may wait for the reader; the generators pause until it takes one


async def merged(
    generators: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all generators, each with the index of its generator. Closing it closes them all.

    Raises:
        Exception: the first error of a generator; the others are closed.
    """
    queue: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()
    free = asyncio.Semaphore(_AHEAD)

    async def forward(index: int, generator: AsyncGenerator[T, None]) -> None:
        async with aclosing(generator):
            async for item in generator:
                await free.acquire()
                queue.put_nowait((index, item))

    tasks = [asyncio.create_task(forward(i, g)) for i, g in enumerate(generators)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                free.release()
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
