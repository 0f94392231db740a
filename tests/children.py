"""Processes that tests start."""

from __future__ import annotations

import signal


def heeds_interrupts() -> None:
    """For ``preexec_fn``: a shell that runs tests in the background has them, and what they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
