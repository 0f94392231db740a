"""All choices of a request at once: their pieces in the order they come, counted and timed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, nullcontext

from llmquant_serve.api.plan import Choice, Plan
from llmquant_serve.api.responses import Usage
from llmquant_serve.drift.recorder import Watch, observed
from llmquant_serve.generation.merge import merged
from llmquant_serve.generation.pieces import Piece, write
from llmquant_serve.metrics import Clock
from llmquant_serve.service import Service


async def pieces(service: Service, plan: Plan) -> AsyncGenerator[tuple[Choice, Piece], None]:
    """Pieces of every choice of a request. Closing it stops them all.

    Raises:
        EngineError: the engine failed; the other choices are stopped.
    """
    service.metrics.prompt_tokens.inc(plan.prompt_tokens)
    if len(plan.choices) == 1:
        async with aclosing(_timed(service, plan, plan.choices[0])) as only:
            async for piece in only:
                yield plan.choices[0], piece
        return
    async with aclosing(merged([_timed(service, plan, c) for c in plan.choices])) as together:
        async for index, piece in together:
            yield plan.choices[index], piece


async def _timed(service: Service, plan: Plan, choice: Choice) -> AsyncGenerator[Piece, None]:
    """The pieces of one choice; the metrics learn how many tokens it has and when they came."""
    clock = Clock(service.metrics)
    watch = _watch(service, plan, choice)
    written = write(
        service.engine,
        service.text.tokenizer,
        choice.prompt,
        choice.sampling if watch is None else observed(choice.sampling),
        plan.stops,
        keep_special=plan.keep_special,
    )
    with watch or nullcontext():
        async with aclosing(written):
            async for piece in written:
                clock.update(piece.generated)
                if watch is not None:
                    watch.update(piece)
                yield piece
    clock.finish()


def _watch(service: Service, plan: Plan, choice: Choice) -> Watch | None:
    """What observes a choice for drift: the first of those to one prompt, since the others say the
    same again; and none where nothing is generated."""
    if service.drift is None or choice.sampling.max_tokens == 0:
        return None
    again = choice.index > 0 and plan.choices[choice.index - 1].prompt is choice.prompt
    return None if again else service.drift.watch(choice.prompt)


def usage(plan: Plan, generated: Mapping[int, int]) -> Usage:
    """Tokens of the prompts and of all choices: ``generated`` by the choice's index."""
    total = sum(generated.values())
    return Usage(
        prompt_tokens=plan.prompt_tokens,
        completion_tokens=total,
        total_tokens=plan.prompt_tokens + total,
    )
