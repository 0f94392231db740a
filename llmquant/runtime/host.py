"""What the operating system gives this process: processors, memory, a container's limits, and the
user's cache folder."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil


def user_cache(name: str) -> Path:
    """The folder ``name`` of llmquant's own in the user's cache: ``$XDG_CACHE_HOME/llmquant``, else
    ``~/.cache/llmquant``. What is in it may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llmquant" / name


def threads() -> int:
    """Processors this process may run on, less by a container's limit, which is in shares of
    time."""
    own = psutil.Process()
    allowed = len(own.cpu_affinity()) if hasattr(own, "cpu_affinity") else psutil.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota() -> float | None:
    """Processors' worth of time that the control group gives; None without a limit."""
    quota, _, period = control("cpu.max").partition(" ")
    if not quota:
        quota, period = control("cpu.cfs_quota_us", "cpu"), control("cpu.cfs_period_us", "cpu")
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None  # "max", or -1
    return int(quota) / int(period)


def memory_bytes() -> int:
    """RAM, or less by a container's limit."""
    total = int(psutil.virtual_memory().total)
    limit = control("memory.max") or control("memory.limit_in_bytes", "memory")
    return min(total, int(limit)) if limit.isdigit() else total


def available_bytes() -> int:
    """RAM that could still be had without swapping: of the machine, and of what a container may
    have less what it uses (pages of files that can be dropped do not count)."""
    free = int(psutil.virtual_memory().available)
    limit = control("memory.max") or control("memory.limit_in_bytes", "memory")
    used = control("memory.current") or control("memory.usage_in_bytes", "memory")
    if not limit.isdigit() or not used.isdigit():
        return free
    counts = control("memory.stat") or control("memory.stat", "memory")
    droppable = dict(line.split(" ", 1) for line in counts.splitlines()).get("inactive_file", "0")
    return max(0, min(free, int(limit) - int(used) + int(droppable)))


def control(name: str, version_1: str = "") -> str:
    """A file of the control group this process is in; of version 1's when ``version_1`` names the
    controller."""
    root = Path("/sys/fs/cgroup") / version_1
    for line in text("/proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if version_1 in controllers.split(","):
            # Inside a container its own group is mounted as the root, whatever the path says.
            return text(root / path.lstrip("/") / name) or text(root / name)
    return text(root / name)


def text(path: str | Path) -> str:
    """A small file's text, stripped; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
