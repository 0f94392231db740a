"""Widths of what a block's linears read, from their names and shapes: what memory is counted by."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from llmquant.models.architectures import Architecture


def widths_of(block: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """Widths of a block's distinct inputs, widest first: q, k and v share one, as do gate and
    up."""
    widths = sorted(
        {(name.rpartition(".")[0], shape[1]) for name, shape in block.items()}, key=lambda n: -n[1]
    )
    return tuple(width for _, width in widths) or (0,)


def replayed_widths(block: Mapping[str, tuple[int, int]], architecture: Architecture) -> int:
    """Columns that replay keeps of a block: for each part without experts, at most its widest
    input."""
    expert = set() if architecture.experts is None else set(architecture.experts.scaled())
    widest: dict[str, int] = {}
    for name, shape in block.items():
        part, _, inside = name.partition(".")
        if any(fnmatchcase(name, pattern) for pattern in expert):
            widest[part] = -1
        elif inside and widest.get(part) != -1:
            widest[part] = max(widest.get(part, 0), shape[1])
    return sum(width for width in widest.values() if width > 0)


def expert_widths(
    block: Mapping[str, tuple[int, int]], architecture: Architecture
) -> tuple[tuple[int, ...], ...]:
    """Of each of an expert's inputs, its width in every expert of a block."""
    if architecture.experts is None:
        return ()
    up, down = architecture.experts.scaled()
    found = (
        tuple(shape[1] for name, shape in block.items() if fnmatchcase(name, linear))
        for linear in (up, down)
    )
    return tuple(widths for widths in found if widths)
