"""The recorder: observes answers as they end, writes the log, watches the monitor, tells of alarms.

An answer that nobody waited for to its end is not compared: it would look short. It is counted.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

from llmquant import DriftAlarm, DriftObservation, DriftReport, observe_request
from llmquant_serve.drift.hooks import Hooks, Teller
from llmquant_serve.drift.log import DriftLog, Entry
from llmquant_serve.engines.base import Sampling, Token
from llmquant_serve.generation.pieces import Piece

_SAVE_EVERY = 50  # entries


class Scorer(Protocol):
    """Scores some answers with the original; see :mod:`llmquant_serve.drift.original`."""

    def offer(self, prompt: Sequence[int], answer: Sequence[Token], record: Recorder) -> None: ...

    async def close(self) -> None: ...


class Recorder:
    """Everything that a server does about drift. Its methods may be called from any thread.

    Attributes:
        unfinished: answers that were not waited for, or failed, since the server started.
        scorer: scores some of the answers with the original.
    """

    def __init__(self, log: DriftLog, hooks: Hooks, scorer: Scorer | None = None) -> None:
        self._log, self._monitor = log, log.monitor
        self.scorer, self.unfinished = scorer, 0
        self._lock = threading.RLock()
        self._failing = self._closed = False
        self._teller = Teller(hooks)
        for alarm in self._monitor.alarms:
            if not alarm.told:
                self._tell(alarm)

    def watch(self, prompt: Sequence[int]) -> Watch:
        return Watch(self, prompt)

    def leave_out(self) -> None:
        """One more answer that is not compared."""
        with self._lock:
            self.unfinished += 1

    def record(self, seen: DriftObservation) -> None:
        """One more observation; nothing comes after :meth:`close`."""
        entry = Entry(**dict(seen), time=round(time.time(), 3))
        with self._lock:
            if self._closed:
                return
            self._kept(lambda: self._log.append(entry))
            raised = self._monitor.add(entry)
            if raised or self._monitor.entries % _SAVE_EVERY == 0:
                self._kept(self._log.save)
            for alarm in raised:
                self._tell(alarm)

    def report(self) -> DriftReport:
        with self._lock:
            return self._monitor.report(self.unfinished)

    async def close(self) -> None:
        """Returns when all are told, or hooks take too long, and all is written."""
        if self.scorer is not None:
            await self.scorer.close()
        await asyncio.to_thread(self._teller.close)
        with self._lock:
            self._closed = True
            self._kept(self._log.save)
            self._log.close()

    def _tell(self, alarm: DriftAlarm) -> None:
        report = self._monitor.report()
        before = "" if alarm.before is None else f", before {alarm.before:.4g}"
        sys.stderr.write(
            f"drift: {alarm.statistic} at request {alarm.request} (now {alarm.recent:.4g}{before}); {report.says}\n"
        )
        sys.stderr.flush()
        message = {
            "kind": "drift-alarm",
            "time": time.time(),
            "model": report.model,
            "requests": report.requests,
            "cause": report.cause,
            "says": report.says,
            "alarm": alarm.model_dump(mode="json", exclude={"told"}),
        }
        self._teller.tell(message, lambda: self._told(alarm.statistic))

    def _told(self, statistic: str) -> None:
        with self._lock:
            self._monitor.mark_told(statistic)
            if not self._closed:
                self._kept(self._log.save)

    def _kept(self, write: Callable[[], None]) -> None:
        """Write; a full disk costs the log and not the answer."""
        try:
            write()
        except OSError as e:
            if not self._failing:
                sys.stderr.write(
                    f"warning: the drift log {self._log.path} cannot be written: {e}; "
                    "requests are still compared, but a restart will not know of them\n"
                )
            self._failing = True
        else:
            self._failing = False


class Watch:
    """One answer, from its first piece to its last; a context that ends with it."""

    def __init__(self, recorder: Recorder, prompt: Sequence[int]) -> None:
        self._recorder, self._prompt = recorder, prompt
        self._tokens: list[Token] = []
        self._texts: list[str] = []
        self._finish: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._finish is None:
            self._recorder.leave_out()
            return
        self._recorder.record(
            observe_request(
                self._prompt,
                [t.id for t in self._tokens],
                "".join(self._texts),
                ended=self._finish == "stop",
                logprobs=[t.logprob for t in self._tokens if t.logprob is not None],
                entropies=[t.entropy for t in self._tokens if t.entropy is not None],
            )
        )
        if self._recorder.scorer is not None:
            self._recorder.scorer.offer(self._prompt, self._tokens, self._recorder)

    def update(self, piece: Piece) -> None:
        self._tokens += piece.tokens
        self._texts.append(piece.text)
        self._finish = piece.finish


def observed(sampling: Sampling) -> Sampling:
    """The same with the log-probabilities that are to be observed."""
    logprobs = 0 if sampling.logprobs is None else sampling.logprobs
    return replace(sampling, logprobs=logprobs, entropy=True)
