"""The ``local`` engine: a model loaded by ``llmquant.load`` in this process, packed if the folder
is, with continuous batching.

This is the asyncio side: it hands jobs to the :class:`~llmquant_serve.engines.batcher.Batcher`
thread and receives their steps through the event loop. It touches no tensor.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmquant.errors import ArchitectureError
from llmquant_serve.engines.base import (
    EngineError,
    Health,
    Load,
    ModelInfo,
    Refusal,
    Sampling,
    Step,
)
from llmquant_serve.engines.batcher import Batcher
from llmquant_serve.engines.job import Job


class LocalEngine:
    """An engine in this process; see :class:`~llmquant_serve.engines.base.Engine`.

    Args:
        model: from ``llmquant.load``; nothing else may use it afterwards.
        max_streams: sequences decoded together.
        context: an upper limit on the model's context, to bound memory.

    Raises:
        ArchitectureError: the model keeps a state other than keys and values.
    """

    name = "local"

    def __init__(
        self, model: PreTrainedModel, max_streams: int = 8, context: int | None = None
    ) -> None:
        _check_states(model)
        self.info = ModelInfo.of(model.config, model.generation_config, context)
        self._batcher = Batcher(model, max_streams)
        self._closed = False

    def why_not(self, sampling: Sampling) -> Refusal | None:
        if sampling.grammar is not None:
            return Refusal(
                "response_format", "the local engine cannot constrain its output; use --engine vllm"
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
        self._batcher.submit(job)
        try:
            while True:
                step = await steps.get()
                if isinstance(step, EngineError):
                    raise step
                yield step
                if step.finish is not None:
                    return
        finally:
            self._batcher.cancel(job)

    def health(self) -> Health:
        if self._closed:
            return Health(False, "the engine is shutting down")
        error = self._batcher.error
        return Health(error is None, error or "", dead=error is not None)

    def load(self) -> Load:
        return self._batcher.load()

    async def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._batcher.close)


def _check_states(model: PreTrainedModel) -> None:
    """Rows join and move as keys and values per token, which recurrent states do not have."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    batched = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted(kind.__name__ for kind in kinds if kind not in batched)
    if others:
        raise ArchitectureError(
            f"{type(model).__name__} keeps states that the local engine cannot batch ({', '.join(others)}); use --engine vllm"
        )
