"""Sequences: the thread that runs the jobs of an ONNX export, one token of each in turn.

Each job is a sequence of its own in onnxruntime-genai, with a KV cache of its own. There is no
batch: several at a time share the processor. A prompt beside others is read in parts of
``PROMPT_CHUNK`` tokens, so that a long one does not hold them up. Tokens are chosen here, by the
code of the local engine, so that every parameter means the same.
"""

from __future__ import annotations

import contextlib

from llmquant import OnnxWorker
from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import Load, Step, Token
from llmquant_serve.engines.jobs.job import Job
from llmquant_serve.engines.jobs.thread import JobThread
from llmquant_serve.engines.sampling import described_all

PROMPT_CHUNK = 256


class Sequences(JobThread):
    """The thread and its sequences.

    Args:
        worker: nobody else may use it from now on.
        max_running: sequences at a time.
    """

    def __init__(self, worker: OnnxWorker, max_running: int) -> None:
        super().__init__("llmquant-onnx")
        self._worker, self._max_running = worker, max_running
        self._numbers: dict[Job, int | None] = {}  # to its number in the worker, once it has one

    def _load(self) -> Load:
        jobs = list(self._numbers)
        cached = sum(job.prefilled + job.generated for job in jobs)
        return Load(len(jobs), len(self._waiting), cached)

    def close(self) -> None:
        super().close()
        self._worker.close()

    def _running(self) -> list[Job]:
        return list(self._numbers)

    def _free(self) -> int:
        return self._max_running - len(self._numbers)

    def _take(self, job: Job) -> None:
        self._numbers[job] = None

    def _iterate(self) -> None:
        for job in list(self._numbers):
            self._turn(job)

    def _turn(self, job: Job) -> None:
        """One token of a job, or a part of its prompt; a failure ends the job, and the engine only
        where the process is gone."""
        ended = True
        try:
            if not job.cancelled:
                ended = self._advance(job)
        except LlmquantError as e:
            job.fail(e)
            self._check_worker()
        finally:
            if ended:
                self._end(job)

    def _end(self, job: Job) -> None:
        number = self._numbers.pop(job)
        if number is not None:
            with contextlib.suppress(LlmquantError):  # a process that is gone holds nothing
                self._worker.forget(number)

    def _advance(self, job: Job) -> bool:
        """Returns whether the job has ended."""
        number = self._numbers[job]
        if number is None:
            number = self._worker.open(len(job.prompt) + job.sampling.max_tokens)
            self._numbers[job] = number
        if job.prefilled < len(job.prompt):
            return self._prefill(job, number)
        logits = self._worker.append(number, [job.last])
        return job.advance(int(logits.argmax()), float(logits.max()), logits)

    def _prefill(self, job: Job, number: int) -> bool:
        """Read a part of a prompt, all of it where no other job waits; returns whether the job has
        ended."""
        begin, scored = job.prefilled, job.sampling.prompt_logprobs
        end = begin + PROMPT_CHUNK if len(self._numbers) > 1 else None
        part = job.prompt[begin:end]
        logits = self._worker.append(number, part, every=scored is not None)
        job.prefilled += len(part)
        if scored is not None:
            following = list(job.prompt[begin + 1 : job.prefilled + 1])
            job.scores += described_all(following, logits[: len(following)], scored)
            logits = logits[-1]
        if job.prefilled < len(job.prompt):
            return False
        if scored is not None:
            job.deliver(Step(prompt=(Token(job.prompt[0]), *job.scores)))
        if job.sampling.max_tokens == 0:
            job.deliver(Step(finish="length"))
            return True
        return job.advance(int(logits.argmax()), float(logits.max()), logits)

    def _check_worker(self) -> None:
        """Put one token through the model, after a failure. What this raises ends the engine."""
        number = self._worker.open(2)
        self._worker.append(number, [0])
        self._worker.forget(number)
