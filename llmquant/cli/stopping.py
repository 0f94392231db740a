"""Ctrl-C, and SIGTERM, which schedulers send before they kill: a run stops, says what it leaves, and exits with 130."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM raises KeyboardInterrupt, and that ends the process with what it says, on stderr.

    Only the main thread may set signals; elsewhere SIGTERM stays what it was.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _interrupt) if main else None
    try:
        yield
    except KeyboardInterrupt as e:
        sys.stderr.write(f"interrupted; {e if e.args else 'nothing was left half-written'}\n")
        raise SystemExit(130) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
