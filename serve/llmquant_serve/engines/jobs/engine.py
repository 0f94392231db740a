"""JobEngine: the asyncio side of an engine whose work a thread of this process does. It hands jobs
to the thread and receives their steps through the event loop. It touches no tensor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from llmquant_serve.engines.base import (
    EngineError,
    Health,
    Load,
    ModelInfo,
    Refusal,
    Sampling,
    Step,
)
from llmquant_serve.engines.jobs.job import Job
from llmquant_serve.engines.jobs.thread import JobThread


class JobEngine:
    """See :class:`~llmquant_serve.engines.base.Engine`."""

    def __init__(self, name: str, info: ModelInfo, thread: JobThread) -> None:
        self.name = name
        self.info = info
        self._jobs = thread
        self._closed = False

    def why_not(self, sampling: Sampling) -> Refusal | None:
        if sampling.grammar is not None:
            return Refusal(
                "response_format",
                f"the {self.name} engine cannot constrain its output; use --engine vllm",
            )
        return None

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Step, None]:
        """Yield steps until one has ``finish``; see :class:`~llmquant_serve.engines.base.Engine`.

        Raises:
            StoppedError: the engine has stopped.
            EngineError: the request failed in the engine.
        """
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | EngineError] = asyncio.Queue()

        def deliver(step: Step | EngineError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(steps.put_nowait, step)

        job = Job(tuple(prompt), sampling, deliver, self.info.eos)
        self._jobs.submit(job)
        try:
            while True:
                step = await steps.get()
                if isinstance(step, EngineError):
                    raise step
                yield step
                if step.finish is not None:
                    return
        finally:
            self._jobs.cancel(job)

    def health(self) -> Health:
        if self._closed:
            return Health(False, "the engine is shutting down")
        error = self._jobs.error
        return Health(error is None, error or "", dead=error is not None)

    def load(self) -> Load:
        return self._jobs.load()

    async def start(self) -> None:
        self._jobs.start()

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._jobs.close)
