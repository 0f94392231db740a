"""How many rows and columns of an FP8 weight share a scale.

A grid of scales says how many blocks there are and not how large they are: 96 rows in two blocks
may be 64 + 32 or 48 + 48. So a label that says the size is believed where it gives the grid. Where
none does, the size is the power of two that gives the grids of all weights of the checkpoint: every
size in use is one, and two of them never give the same grid. Whatever a size cannot change needs
none: one scale, or one for each row or column.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.errors import CheckpointError

Sizes = tuple[int, int]
ONE: Sizes = (0, 0)
"""Rows and columns that share a scale, where all do."""
_TEXT = re.compile(r"(\d+)\s*[x,]\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Grid:
    """A weight and its scales: their names and shapes."""

    name: str
    shape: tuple[int, ...]
    scale: str
    grid: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(length, blocks) of rows and of columns; one scale a row is a column of scales."""
        rows, columns = self.shape[-2:]
        grid = (*self.grid, 1) if len(self.grid) == 1 else self.grid
        return (rows, grid[-2]), (columns, grid[-1])

    @property
    def is_blocks(self) -> bool:
        """Whether the size of a block changes what the weight means."""
        return not self.is_one and any(1 < g < n for n, g in self.pairs)

    @property
    def is_one(self) -> bool:
        return all(n == 1 for n in self.grid)

    @property
    def fits(self) -> bool:
        """Whether some size gives this grid."""
        if self.is_one:
            return True
        if len(self.shape) < 2 or len(self.grid) not in (1, len(self.shape)):
            return False
        if len(self.grid) == 1:
            return len(self.shape) == 2 and self.grid[0] == self.shape[0]
        sizes = (_sizes(n, g) for n, g in self.pairs)
        return self.grid[:-2] == self.shape[:-2] and all(low <= high for low, high in sizes)


def stated(label: Mapping[str, Any]) -> tuple[Sizes, ...]:
    """Sizes that a label names: two numbers, a text such as ``128x128``, or the columns of a row's
    groups."""
    groups = label.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [
        g["weights"] for g in groups if isinstance(g, dict) and isinstance(g.get("weights"), dict)
    ]
    inside = [w.get("block_structure") for w in weights]
    inside += [[1, w.get("group_size")] for w in weights if w.get("strategy") == "group"]
    found = [label.get("weight_block_size"), *inside]
    return tuple(dict.fromkeys(s for s in map(_parsed, found) if s is not None))


def sizes_of(path: Path, grids: Iterable[Grid], label: Mapping[str, Any]) -> dict[str, Sizes]:
    """Rows and columns of a block, or ``ONE``, of each weight.

    Args:
        path: of the checkpoint, for messages.
        grids: of all its FP8 weights.
        label: its quantization; may be empty.

    Raises:
        CheckpointError: scales that give no blocks, or no blocks of one size.
    """
    known, named = list(grids), stated(label)
    wrong = next((g for g in known if not g.fits), None)
    blocks = [g for g in known if g.fits and g.is_blocks]
    if named and wrong is None:
        wrong = next((g for g in blocks if not any(_gives(g, s) for s in named)), None)
    if wrong is not None:
        size = f" of {' or '.join(f'{r} x {c}' for r, c in named)}" if named else ""
        raise CheckpointError(
            f"{path}: {wrong.scale} is {list(wrong.grid)}, which gives no blocks{size} of {wrong.name}, {list(wrong.shape)}"
        )
    common = _common(path, blocks) if blocks and not named else None
    found = {}
    for grid in known:
        said: list[Sizes | None] = [s for s in named if grid.is_blocks and _gives(grid, s)]
        fitting = said or [common]
        if len({_own(grid, s) for s in fitting}) > 1:
            raise CheckpointError(
                f"{path}: {grid.name} could be in blocks of {' or '.join(str(list(s)) for s in fitting if s)}; leave one of "
                "them in quantization_config in config.json"
            )
        found[grid.name] = _own(grid, fitting[0])
    return found


def _own(grid: Grid, size: Sizes | None) -> Sizes:
    """A weight's blocks: of the common size where that makes a difference."""
    if grid.is_one:
        return ONE
    (rows, down), (columns, across) = grid.pairs
    wanted = size or (rows, columns)
    return (
        rows if down == 1 else 1 if down == rows else wanted[0],
        columns if across == 1 else 1 if across == columns else wanted[1],
    )


def _common(path: Path, blocks: list[Grid]) -> Sizes:
    """The one power of two, for rows and for columns, that gives every grid."""
    sizes = []
    for i in (0, 1):
        ranges = [(_sizes(*g.pairs[i]), g) for g in blocks]
        (low, _), tall = max(ranges, key=lambda r: r[0][0])
        (_, high), short = min(ranges, key=lambda r: r[0][1])
        size = 1 << (low - 1).bit_length()
        if size > high:
            names = tall.name if tall is short else f"{tall.name} and {short.name}"
            raise CheckpointError(
                f"{path}: no power of two is a block of {('rows', 'columns')[i]} which gives the scales of {names}, and its "
                "quantization_config says no size; add weight_block_size there, or fetch the folder again"
            )
        sizes.append(size)
    return sizes[0], sizes[1]


def _sizes(length: int, count: int) -> tuple[int, float]:
    """Smallest and largest size that cuts a length into so many blocks."""
    low = -(-length // count)
    return low, -(-length // (count - 1)) - 1 if count > 1 else float("inf")


def _gives(grid: Grid, size: Sizes) -> bool:
    return all(-(-n // b) == g for (n, g), b in zip(grid.pairs, size, strict=True))


def _parsed(value: object) -> Sizes | None:
    if isinstance(value, str) and (said := _TEXT.fullmatch(value.strip())):
        value = [int(said[1]), int(said[2])]
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return value[0], value[1]
    return None
