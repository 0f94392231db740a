"""Candidates timed in turn, so that what is compared saw the same machine. ``bench/`` uses it
too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch

from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, portable


def in_turn(
    candidates: Mapping[str, Callable[[], object]],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Best seconds of each by ``clock``, the candidates taking turns until each had its share of
    the time."""
    best = dict.fromkeys(candidates, float("inf"))
    for work in candidates.values():
        work()
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end:
        for name, work in candidates.items():
            started = clock()
            work()
            best[name] = min(best[name], clock() - started)
    return best


def walking(copies: Sequence[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """Each call takes the next copy, so that weights come from memory and not from a cache."""
    ring = cycle(copies)
    return lambda: call(next(ring))


def random_weight(shape: tuple[int, int], spec: QuantSpec) -> QuantizedWeight:
    """Random codes ``(out, in)`` on portable scales."""
    groups = (shape[0], spec.groups(shape[1]))
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8)
    zeros = torch.full(groups, spec.middle, dtype=torch.uint8)
    if not spec.symmetric:
        zeros = torch.randint(0, spec.levels, groups, dtype=torch.uint8)
    return QuantizedWeight(codes, portable(torch.rand(groups) * 0.01 + 0.001), zeros, spec)
