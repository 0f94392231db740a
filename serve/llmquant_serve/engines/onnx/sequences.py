"""Sequences: the thread that runs the jobs of an ONNX export, one token of each in turn.

Each job is a sequence of its own in onnxruntime-genai, with a KV cache of its own. There is no
batch: several at a time share the processor. Tokens are chosen here, by the code of the local
engine, so that every parameter means the same.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from llmquant import OnnxWorker
from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import Load, Step, StoppedError, Token
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.engines.job import Job
from llmquant_serve.engines.sampling import described_all


@dataclass(slots=True)
class _Running:
    """A job and its sequence in the worker; ``number`` is None before its prompt was read."""

    job: Job
    number: int | None = None


class Sequences:
    """The queue of jobs and the thread that works on them.

    Args:
        worker: nobody else may use it from now on.
        max_running: sequences at a time.

    Attributes:
        error: what ended the thread; None while it runs, and after a regular end.
    """

    def __init__(self, worker: OnnxWorker, max_running: int) -> None:
        self._worker, self._max_running = worker, max_running
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []
        self._wake = threading.Condition()
        self._closing = False
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="llmquant-onnx", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; any thread.

        Raises:
            StoppedError: the engine has stopped.
        """
        with self._wake:
            if self.error or self._closing:
                raise StoppedError(self.error or "the engine is shutting down")
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End the job before its next token; any thread."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def load(self) -> Load:
        running = list(self._running)
        cached = sum(r.job.prefilled + r.job.generated for r in running)
        return Load(len(running), len(self._waiting), cached)

    def close(self) -> None:
        """Stop after the current token and fail the remaining jobs; returns when the thread has
        ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._worker.close()

    def _run(self) -> None:
        try:
            with isolated("the engine's thread failed"):
                while self._wait_for_work():
                    self._admit()
                    for running in list(self._running):
                        self._turn(running)
        except LlmquantError as e:
            self.error = f"the engine stopped, and the server must be restarted: {e}"
        with self._wake:
            self._closing = True
            remaining = [*self._waiting, *(r.job for r in self._running)]
            self._waiting.clear()
            self._running = []
        for job in remaining:
            job.deliver(StoppedError(self.error or "the engine is shutting down"))

    def _wait_for_work(self) -> bool:
        """Returns whether there is work; False ends the thread."""
        with self._wake:
            while not (self._closing or self._waiting or self._running):
                self._wake.wait()
            return not self._closing

    def _admit(self) -> None:
        with self._wake:
            while self._waiting and len(self._running) < self._max_running:
                self._running.append(_Running(self._waiting.popleft()))

    def _turn(self, running: _Running) -> None:
        """One token of a job, or its prompt; a failure ends the job, and the engine only where the
        process is gone."""
        job = running.job
        ended = True
        try:
            if not job.cancelled:
                ended = self._advance(running)
        except LlmquantError as e:
            job.fail(e)
            self._check_worker()
        if ended:
            self._running.remove(running)
            if running.number is not None:
                self._worker.forget(running.number)

    def _advance(self, running: _Running) -> bool:
        """Returns whether the job has ended."""
        job = running.job
        if running.number is None:
            running.number = self._worker.open(len(job.prompt) + job.sampling.max_tokens)
            return self._prompt(job, running.number)
        logits = self._worker.append(running.number, [job.last])
        return job.advance(int(logits.argmax()), logits)

    def _prompt(self, job: Job, number: int) -> bool:
        scored = job.sampling.prompt_logprobs
        if scored is None:
            logits = self._worker.append(number, job.prompt)
        else:
            every = self._worker.append(number, job.prompt, every=True)
            scores = described_all(list(job.prompt[1:]), every[:-1], scored)
            job.deliver(Step(prompt=(Token(job.prompt[0]), *scores)))
            logits = every[-1]
        job.prefilled = len(job.prompt)
        if job.sampling.max_tokens == 0:
            job.deliver(Step(finish="length"))
            return True
        return job.advance(int(logits.argmax()), logits)

    def _check_worker(self) -> None:
        """Put one token through the model, after a failure. What this raises ends the engine."""
        number = self._worker.open(2)
        self._worker.append(number, [0])
        self._worker.forget(number)
