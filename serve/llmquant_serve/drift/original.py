"""A fraction of the answers is scored by the original, while nobody waits for it.

The original reads prompt and answer in one pass. The mean absolute difference of the tokens'
log-probabilities depends little on what was asked, so it tells a worse model from other prompts.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence

from llmquant import DriftObservation
from llmquant_serve.drift.recorder import Recorder
from llmquant_serve.engines.base import Engine, EngineError, Sampling, Token

_MOST_WAITING = 4  # beyond that answers are left out: the original must not fall behind


class Original:
    """See :class:`llmquant_serve.drift.recorder.Scorer`.

    Args:
        fraction: of the answers that are scored.
    """

    def __init__(self, engine: Engine, fraction: float) -> None:
        self._engine, self._fraction = engine, fraction
        self._drawn = random.Random()
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, prompt: Sequence[int], answer: Sequence[Token], record: Recorder) -> None:
        """Score an answer if it is drawn."""
        fits = len(prompt) + len(answer) < self._engine.info.context
        known = answer and all(token.logprob is not None for token in answer)
        if not (fits and known) or len(self._tasks) >= _MOST_WAITING:
            return
        if self._drawn.random() < self._fraction:
            task = asyncio.create_task(self._score(prompt, answer, record))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _score(
        self, prompt: Sequence[int], answer: Sequence[Token], record: Recorder
    ) -> None:
        ids = [*prompt, *(token.id for token in answer)]
        scored: tuple[Token, ...] = ()
        try:
            async for step in self._engine.generate(ids, Sampling(max_tokens=0, prompt_logprobs=0)):
                scored = step.prompt or scored
        except EngineError:
            return  # its health is shown elsewhere
        theirs = scored[len(prompt) :]
        apart = [
            abs(ours.logprob - other.logprob)
            for ours, other in zip(answer, theirs, strict=True)
            if ours.logprob is not None and other.logprob is not None
        ]
        if apart and math.isfinite(gap := sum(apart) / len(apart)):
            record.record(DriftObservation(gap=gap))
