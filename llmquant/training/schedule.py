"""Which windows a step trains on and how large it is: functions of the step's number and the seed
alone, so that a run continued at any step takes the same ones."""

from __future__ import annotations

import math

import torch

from llmquant.recipe_sections import QAT

_FLOOR = 0.05  # of the largest rate, at the end


def windows_of(step: int, count: int, batch_size: int, seed: int) -> list[int]:
    """Numbers of the windows of a step (from 0) among ``count``: each epoch has another order, and
    a step may lie in two."""
    found = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        generator = torch.Generator().manual_seed(seed + place // count)
        found.append(int(torch.randperm(count, generator=generator)[place % count]))
    return found


def rate(step: int, options: QAT) -> float:
    """The share of the largest learning rate at a step: linear warm-up, then a half cosine."""
    warm = max(1, round(options.warmup * options.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, options.steps - warm)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


def measured_at(options: QAT) -> set[int]:
    """After how many steps the held-out text is measured; the last step is among them."""
    every = [round(options.steps * i / options.checks) for i in range(1, options.checks + 1)]
    return {n for n in every if n > 0}
