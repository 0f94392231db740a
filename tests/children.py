"""Signals in processes that tests start, and in the tests' own.

A shell has commands that it starts in the background ignore Ctrl-C (SIGINT), and whatever they
start inherits that. A run of ours then goes on ignoring it, as it should; a test of what Ctrl-C
does must therefore say that it is heeded, wherever the tests run.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from signal import Handlers


def heeds_interrupts() -> None:
    """For ``preexec_fn``: the child finds SIGINT as a terminal leaves it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignores_interrupts() -> None:
    """For ``preexec_fn``: the child finds SIGINT as in a shell's background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interrupts(ignored: bool) -> Iterator[None]:
    """In this process SIGINT is ignored, as in the background, or raises KeyboardInterrupt, as
    Python has it in a terminal."""
    before = signal.signal(
        signal.SIGINT, Handlers.SIG_IGN if ignored else signal.default_int_handler
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
