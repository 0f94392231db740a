"""All choices of a request at once: their pieces in the order they come, counted and timed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from llmquant_serve.api.plan import Choice, Plan
from llmquant_serve.generation.pieces import Piece, write
from llmquant_serve.metrics import Clock
from llmquant_serve.service import Service

_AHEAD = 16  # pieces that wait between the choices of one request and its connection


async def pieces(service: Service, plan: Plan) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """Pieces of every choice of a request. Closing it stops them all.

    Raises:
        EngineError: the engine failed; the other choices are stopped.
    """
    service.metrics.prompt_tokens.inc(plan.prompt_tokens)
    if len(plan.choices) == 1:
        async with aclosing(_one(service, plan, plan.choices[0])) as only:
            async for piece in only:
                yield plan.choices[0], piece
        return
    queue: asyncio.Queue[tuple[Choice, Piece] | BaseException] = asyncio.Queue(_AHEAD)
    tasks = [asyncio.create_task(_feed(service, plan, choice, queue)) for choice in plan.choices]
    left = len(tasks)
    try:
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            left -= item[1].finish is not None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(
    service: Service,
    plan: Plan,
    choice: Choice,
    queue: asyncio.Queue[tuple[Choice, Piece] | BaseException],
) -> None:
    try:
        async with aclosing(_one(service, plan, choice)) as found:
            async for piece in found:
                await queue.put((choice, piece))
    except Exception as e:  # noqa: BLE001 - handed to the consumer, which raises it
        await queue.put(e)


async def _one(service: Service, plan: Plan, choice: Choice) -> AsyncGenerator[Piece, None]:
    clock = Clock(service.metrics)
    written = write(
        service.engine,
        service.text.tokenizer,
        choice.prompt,
        choice.sampling,
        plan.stops,
        keep_special=plan.keep_special,
    )
    async with aclosing(written) as found:
        async for piece in found:
            clock.saw(piece.made)
            yield piece
    clock.done()
