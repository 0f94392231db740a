"""The ``local`` engine: a model loaded by ``llmquant.load`` in this process, packed if the folder
is, with continuous batching.

This is the asyncio side: it hands jobs to the :class:`~llmquant_serve.engines.batcher.Batcher`
thread and receives their steps through the event loop. It owns nothing of torch.
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
from llmquant_serve.engines.batcher import Batcher, Job
from llmquant_serve.engines.sampling import Chooser


class LocalEngine:
    """See the module text.

    Args:
        model: from ``llmquant.load``; not to be used by others afterwards.
        max_streams: sequences decoded together.
        context: fewer positions than the model has, to bound memory.

    Raises:
        ArchitectureError: the model keeps a state other than keys and values.
    """

    name = "local"

    def __init__(
        self, model: PreTrainedModel, max_streams: int = 8, context: int | None = None
    ) -> None:
        _refuse_other_states(model)
        self.info = ModelInfo.of(model.config, model.generation_config, context)
        self._batcher = Batcher(model, self.info.eos, max_streams)
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
            EngineError: the engine failed or stopped.
        """
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | EngineError] = asyncio.Queue()

        def deliver(step: Step | EngineError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(steps.put_nowait, step)

        job = Job(tuple(prompt), sampling, deliver, Chooser(sampling, prompt, self.info.eos))
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
        return Health(self._batcher.failure is None, self._batcher.failure or "")

    def load(self) -> Load:
        return self._batcher.load()

    async def start(self) -> None:
        self._batcher.start()

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._batcher.close)


def _refuse_other_states(model: PreTrainedModel) -> None:
    """Rows are joined and moved as keys and values by token; recurrent states would need other
    care."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    odd = sorted(k.__name__ for k in kinds if k not in (DynamicLayer, DynamicSlidingWindowLayer))
    if odd:
        raise ArchitectureError(
            f"{type(model).__name__} keeps states that the local engine cannot batch ({', '.join(odd)}); use --engine vllm"
        )
