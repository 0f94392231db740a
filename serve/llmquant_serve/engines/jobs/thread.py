"""JobThread: the queue of jobs and the thread that works on them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import Load, StoppedError
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.engines.jobs.job import Job


class JobThread(ABC):
    """A queue of jobs and the thread that works on them; subclasses say how.

    Attributes:
        error: what ended the thread; None while it runs, and after a regular end.
    """

    def __init__(self, name: str) -> None:
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = self._ended = False
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def _load(self) -> Load:
        """What it works on; any thread."""

    @abstractmethod
    def _running(self) -> Sequence[Job]:
        """The jobs that have left the queue and have not ended."""

    @abstractmethod
    def _free(self) -> int:
        """How many jobs may leave the queue."""

    @abstractmethod
    def _take(self, job: Job) -> None:
        """Make a job that has left the queue a running one."""

    @abstractmethod
    def _iterate(self) -> None:
        """A part of the work, short enough for a cancellation to wait for.

        Raises:
            LlmquantError: the engine cannot go on. A job's own failure is the job's.
        """

    def load(self) -> Load:
        """What it works on, nothing once it has ended; any thread."""
        return Load(0, 0, 0) if self._ended else self._load()

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

    def close(self) -> None:
        """Stop after the current step and fail the remaining jobs; returns when the thread has
        ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            with isolated("the engine's thread failed"):
                while self._wait_for_work():
                    self._admit()
                    self._iterate()
        except LlmquantError as e:
            self.error = f"the engine stopped, and the server must be restarted: {e}"
        with self._wake:
            self._closing = True
            remaining = [*self._waiting, *self._running()]
            self._waiting.clear()
            self._ended = True
        for job in remaining:
            job.deliver(StoppedError(self.error or "the engine is shutting down"))

    def _wait_for_work(self) -> bool:
        """Returns whether there is work; False ends the thread."""
        with self._wake:
            while not (self._closing or self._waiting or self._running()):
                self._wake.wait()
            return not self._closing

    def _admit(self) -> None:
        """Jobs leave the queue as long as there is room; cancelled ones always."""
        with self._wake:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            while self._waiting and self._free() > 0:
                self._take(self._waiting.popleft())
