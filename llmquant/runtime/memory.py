"""Memory of this process.

The peak is ``VmHWM`` of ``/proc/self/status`` where there is one. ``ru_maxrss`` looks like the same
thing and is not: on Linux a child starts with its parent's peak (``execve`` folds the old address
space into it), so a small run started by a big process would look big.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """Resident set now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Highest resident set since the process was started."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: ru_maxrss has no such inheritance there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# What torch and the libraries that it calls say in a plain RuntimeError: CUDA itself, cuBLAS and
# cuSOLVER for their own work space, the allocator of a CPU.
_FULL = ("out of memory", "STATUS_ALLOC_FAILED", "allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a device or here. torch's
    ``OutOfMemoryError`` is a RuntimeError too."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in _FULL)
    )
