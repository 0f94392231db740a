"""Ctrl-C, and SIGTERM, which schedulers send before they kill: a run stops, says what it leaves, and exits with 130."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llmquant.interruption import heeded, stops


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it either signal ends the process with what the run says of it, on stderr."""
    with heeded():
        try:
            yield
        except BaseException as e:
            if not stops(e):
                raise
            told = e.args[0] if isinstance(e, KeyboardInterrupt) and e.args else "nothing was left half-written"
            sys.stderr.write(f"interrupted; {told}\n")
            raise SystemExit(130) from None
