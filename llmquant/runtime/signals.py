"""Whether somebody asked the process to stop. Python tells by raising KeyboardInterrupt, wherever
it is.

Where it is may be native code that calls Python and takes whatever it raises for a failure of its
own: torch, asked for a tensor while a signal arrives, says ``ValueError: could not determine the
shape``. So the request is noted as well, and whoever ends a run looks at the note before it
believes an error.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt


@contextmanager
def heeded() -> Iterator[None]:
    """Within it SIGINT and SIGTERM are noted and raise KeyboardInterrupt; an ignored SIGINT
    (``nohup``) stays ignored.

    Only the main thread may set signals; elsewhere they stay what they were.
    """
    _asked.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [
        n
        for n in (signal.SIGINT, signal.SIGTERM)
        if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN
    ]
    before = {n: signal.signal(n, _interrupt) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def stops(error: BaseException | None) -> bool:
    """Whether an exception is the request to stop, or what native code made of it."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, Exception) and _asked.is_set()
    )


def check() -> None:
    """Raise KeyboardInterrupt if one was asked for and got lost."""
    if _asked.is_set():
        raise KeyboardInterrupt
