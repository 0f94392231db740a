"""Asking a server again that is busy, starting, or gone for a moment.

Answers with a status of :data:`AGAIN` and connections that fail are asked again; everything else is
an answer. A server that says when to come back (``Retry-After``, in seconds or as a date) is asked
then; otherwise the wait doubles from half a second to ten, with jitter, so that prompts under way
side by side do not come back together. Patience is for a server that answers *nothing*: it begins
with the first failure and ends with any answer, of any prompt.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from llmquant.errors import LlmquantError

AGAIN = frozenset({408, 429, 502, 503, 504})
PATIENCE = 120.0
FIRST_PATIENCE = 30.0
"""Seconds for the first contact, where nothing shows that the address is right."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0
_TOLD_EVERY = 10.0  # seconds between notes

Answer = TypeVar("Answer")


class UnavailableError(LlmquantError):
    """A server that would have to be asked again.

    Args:
        why: a sentence's end, as in "… answered 429: full".
        after: seconds that the server asks to wait, or None.
        connected: it answered, so it is running.
    """

    def __init__(self, why: str, after: float | None = None, *, connected: bool = True) -> None:
        super().__init__(why)
        self.after, self.connected = after, connected


def seconds_to_wait(header: str | None) -> float | None:
    """``Retry-After`` in seconds from now, 0 or more; None where there is none or it says nothing
    that can be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    when = when if when.tzinfo is not None else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


class Retrying:
    """The patience with one server, shared by all threads that ask it.

    Args:
        patience: seconds without any answer after which it is given up.
        tell: gets a sentence for people when it is waited, a few seconds apart at most.
    """

    def __init__(self, patience: float, tell: Callable[[str], None]) -> None:
        self.patience, self.tell = patience, tell
        self.reconnected = False
        """A connection failed and the server answered after it: it may be another process now."""
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._failing_since: float | None = None
        self._lost_at: float | None = None
        self._told = -_TOLD_EVERY

    def ask(self, request: Callable[[], Answer]) -> Answer:
        """What ``request`` returns, asked again for as long as it raises UnavailableError.

        Raises:
            LlmquantError: the patience is over; says what the server last said.
        """
        failures = 0
        while True:
            started = time.monotonic()
            try:
                answer = request()
            except UnavailableError as e:
                failures += 1
                if self._stopped.wait(self._wait(e, failures, started)):
                    raise LlmquantError(f"{e}; stopped") from e
            else:
                with self._lock:
                    self._failing_since = None
                    # An answer to what was asked before the loss is still the old process's.
                    if self._lost_at is not None and started > self._lost_at:
                        self.reconnected, self._lost_at = True, None
                return answer

    def _wait(self, error: UnavailableError, failures: int, started: float) -> float:
        now = time.monotonic()
        with self._lock:
            if not error.connected:
                self._lost_at = now
            self._failing_since = min(started, self._failing_since or started)
            left = self._failing_since + self.patience - now
            tells = now - self._told >= _TOLD_EVERY
            self._told = now if tells else self._told
        if error.after is not None and error.after > self.patience:
            seconds = math.ceil(error.after)
            raise LlmquantError(
                f"{error}; it asks to come back in {seconds:,} s. Come back then, or give --retry-for {seconds}"
            ) from error
        if left <= 0:
            asked = f"{failures:,} times in {now - self._failing_since:,.0f} s"
            raise LlmquantError(
                f"{error}; it said so {asked}. Send it less at once, or give a longer --retry-for"
                if error.connected
                else f"{error}; is the server running? It was asked {asked}; --retry-for sets how long"
            ) from error
        wait = error.after
        if wait is None or wait == 0:
            most = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(failures - 1, 10))
            wait = min(left, most * random.uniform(0.5, 1.0))
        if tells:
            self.tell(f"{error}; asking again in {wait:.1f} s")
        return wait

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Ends all waits: inside, what waits or would have to fails."""
        self._stopped.set()
        try:
            yield
        finally:
            self._stopped.clear()
