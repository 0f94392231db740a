"""Seconds of work on a device: of a CUDA GPU as a graph that is replayed, so that what Python and
launches cost is left out, as it is where a server replays its decode step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

COLD = 192 << 20
"""Bytes of weights that are walked through: more than any GPU's second-level cache."""
_ROUNDS = 5


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, as it is called: the best of a few."""
    best = float("inf")
    for _ in range(_ROUNDS):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def replayed(calls: Sequence[Callable[[], Tensor]], device: torch.device, least: float) -> float:
    """Of one of ``calls``, each of which reads weights of its own, in turn.

    Args:
        calls: were called before, so that nothing is compiled or tuned here.
        least: seconds to measure for.
    """

    def every() -> None:
        for call in calls:
            call()

    work: Callable[[], object] = every
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        work = graph.replay
    once = seconds(work, device)
    end = time.perf_counter() + least
    while time.perf_counter() < end:
        once = min(once, seconds(work, device))
    return once / len(calls)


def copies(nbytes: int, cold: int) -> int:
    """How many copies of a weight exceed ``cold`` bytes."""
    return cold // nbytes + 1
