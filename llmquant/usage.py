"""Memory of this process, for progress and the log. Linux counts the peak in KiB."""

from __future__ import annotations

import resource

import psutil


def resident() -> int:
    """Bytes in RAM now."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The most bytes this process ever had in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available() -> int:
    """Bytes that could still be had without swapping."""
    return int(psutil.virtual_memory().available)
