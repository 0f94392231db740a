"""The ``onnx`` engine: a folder that ``llmquant export --to onnx`` wrote, run by onnxruntime-genai
in a process of its own environment. This is the asyncio side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import llmquant
from llmquant.errors import UsageError
from llmquant_serve.engines.base import (
    EngineError,
    Health,
    Load,
    ModelInfo,
    Refusal,
    Sampling,
    Step,
)
from llmquant_serve.engines.job import Job
from llmquant_serve.engines.onnx.sequences import Sequences
from llmquant_serve.engines.options import ModelOptions


class OnnxEngine:
    """An engine in another process; see :class:`~llmquant_serve.engines.base.Engine`.

    Args:
        worker: the process; nothing else may use it afterwards.
        max_streams: sequences that are decoded in turn.
    """

    name = "onnx"

    def __init__(self, info: ModelInfo, worker: llmquant.OnnxWorker, max_streams: int) -> None:
        self.info = info
        self._sequences = Sequences(worker, max_streams)
        self._closed = False

    def why_not(self, sampling: Sampling) -> Refusal | None:
        if sampling.grammar is not None:
            return Refusal(
                "response_format", "the onnx engine cannot constrain its output; use --engine vllm"
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
        self._sequences.submit(job)
        try:
            while True:
                step = await steps.get()
                if isinstance(step, EngineError):
                    raise step
                yield step
                if step.finish is not None:
                    return
        finally:
            self._sequences.cancel(job)

    def health(self) -> Health:
        if self._closed:
            return Health(False, "the engine is shutting down")
        error = self._sequences.error
        return Health(error is None, error or "", dead=error is not None)

    def load(self) -> Load:
        return self._sequences.load()

    async def start(self) -> None:
        self._sequences.start()

    async def close(self) -> None:
        self._closed = True
        await asyncio.to_thread(self._sequences.close)


def onnx_engine(options: ModelOptions, max_streams: int) -> OnnxEngine:
    """The engine of the command line's options.

    Raises:
        UsageError: an option that is not for it, or no environment with ONNX Runtime.
        CheckpointError: the folder is no export.
    """
    given = {"--dtype": options.dtype, "--device": options.device, "--kernel": options.kernel}
    if strange := [name for name, value in given.items() if value != "auto"]:
        raise UsageError(
            f"{strange[0]} is for the local engine; an ONNX export was made for one dtype and device"
        )
    path = llmquant.resolve(options.model)
    info = ModelInfo.of(
        llmquant.read_config(path), llmquant.read_generation_config(path), options.context
    )
    return OnnxEngine(info, llmquant.OnnxWorker(path, options.threads), max_streams)
