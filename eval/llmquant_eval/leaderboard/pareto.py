"""The Pareto plots of a ranking as data: what a model loses against what it weighs, or against how
fast it decodes.

The page and the app draw them as inline SVG (:mod:`llmquant_eval.leaderboard.svg`), files come from
matplotlib (:mod:`llmquant_eval.leaderboard.plots`). What both must agree on stands here: which
models a plot shows, which of them are on the front, the axes with their titles, ranges, scales and
ticks, which points have their names beside them, and the colours.

A point is on the front if no other is better in both directions. Losses in KL have a logarithmic
axis because they span decades, ratios a linear one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmquant_eval.leaderboard.board import Board, Row, loss
from llmquant_eval.leaderboard.cells import metric_cell
from llmquant_eval.report.table import size, speed

COLOURS = {"best": "#0b63ce", "other": "#77808c", "reference": "#b4530a"}
"""Of a point's :attr:`ParetoPoint.kind`, on a light ground."""
_MOST_NAMES = 14  # points up to which each has its name beside it


@dataclass(frozen=True, slots=True)
class Scale:
    """The range of an axis. ``log`` scales have ticks at 1, 2 and 5 times powers of ten."""

    low: float
    high: float
    log: bool = False

    def position(self, value: float) -> float:
        """Where a value lies, from 0 at ``low`` to 1 at ``high``; values outside are moved to the
        end."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        return (min(max(at, low), high) - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values inside the range."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if self.high / self.low < 300 else (1,)
            return [t for p in powers for s in steps if self.low <= (t := s * 10.0**p) <= self.high]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
        first = math.ceil(self.low / step)
        return [round(step * i, 12) for i in range(first, math.floor(self.high / step) + 1)]


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One model in data units; ``error`` 0 where there is none, ``text`` the loss for people."""

    row: Row
    x: float
    y: float
    error: float
    best: bool
    text: str

    @property
    def kind(self) -> Literal["reference", "best", "other"]:
        """How it is drawn."""
        return "reference" if self.row.is_reference else "best" if self.best else "other"


@dataclass(frozen=True, slots=True)
class CostAxis:
    """What a loss is drawn against."""

    name: str
    value: Callable[[Row], float | None]
    tick_text: Callable[[float], str]
    more_is_better: bool = False

    @property
    def title(self) -> str:
        return self.name + (", more is better" if self.more_is_better else "")


COST_AXES = {
    "size": CostAxis("size on disk", lambda row: row.result.bytes_on_disk, size),
    "speed": CostAxis("decode, tokens/s", lambda row: row.decode_speed, speed, more_is_better=True),
}
_LOSS_TITLES = {
    "kl_mean": "KL to the reference, nats",
    "perplexity_ratio": "perplexity ÷ reference's",
    "word_perplexity_ratio": "word perplexity ÷ reference's",
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
}


@dataclass(frozen=True, slots=True)
class ParetoPlot:
    """One plot: the ``loss`` of ``points`` against their cost ``kind``, a key of
    :data:`COST_AXES`."""

    kind: str
    loss: str
    points: tuple[ParetoPoint, ...]

    @property
    def cost_axis(self) -> CostAxis:
        return COST_AXES[self.kind]

    @property
    def loss_title(self) -> str:
        return _LOSS_TITLES[self.loss]

    @property
    def title(self) -> str:
        return f"{self.loss_title} against {self.cost_axis.name}"

    @property
    def cost_scale(self) -> Scale:
        return Scale(*_range([p.x for p in self.points], 0.12, floor=0.0))

    @property
    def loss_scale(self) -> Scale:
        """Holds all points with their whiskers; on a log axis no whisker reaches below a third of
        the least loss."""
        lows, highs = [p.y - p.error for p in self.points], [p.y + p.error for p in self.points]
        if self.loss == "kl_mean":
            smallest = min(p.y for p in self.points)
            return Scale(max(min(lows), smallest / 3) / 1.4, max(highs) * 1.4, log=True)
        return Scale(*_range(lows + highs, 0.1))

    def named_points(self) -> list[ParetoPoint]:
        """The points that have their names beside them, those on the front first: all of few, of
        many the front alone."""
        few = len(self.points) <= _MOST_NAMES
        named = [p for p in self.points if few or p.best]
        return sorted(named, key=lambda p: (not p.best, p.x))

    def front_line(self) -> list[ParetoPoint]:
        """The points on the front, from the cheapest on."""
        return sorted(
            (p for p in self.points if p.best),
            key=lambda p: p.x,
            reverse=self.cost_axis.more_is_better,
        )


def pareto_plots(board: Board) -> list[ParetoPlot]:
    """Every plot that the ranking has data for: by size and speed, for KL and the ordering loss."""
    names = dict.fromkeys(filter(None, ("kl_mean", board.loss_name)))
    plots = [pareto_plot(board, kind, name) for kind in COST_AXES for name in names]
    return [plot for plot in plots if plot is not None]


def pareto_plot(board: Board, kind: str, name: str) -> ParetoPlot | None:
    """The loss ``name`` against a cost; None where fewer than two models have both."""
    points = pareto_points(board, kind, name)
    return ParetoPlot(kind, name, tuple(points)) if len(points) >= 2 else None


def pareto_points(board: Board, kind: str, name: str) -> list[ParetoPoint]:
    """The rows that have both coordinates; of speeds only those of the machine that measured most
    of them.

    The reference, whose KL is 0, has no place on the logarithmic KL axis and is left out. Where
    only a part of the text was scored no point is on the front.
    """
    axis = COST_AXES[kind]
    measured = []
    for row in board.rows:
        x, metric = axis.value(row), loss(row, name)
        if x is not None and metric is not None and (name != "kl_mean" or metric.value > 0):
            measured.append((row, float(x), metric))
    if axis.more_is_better and measured:
        machines = [row.machine for row, _, _ in measured]
        most = max(dict.fromkeys(machines), key=machines.count)
        measured = [entry for entry in measured if entry[0].machine == most]
    sign = -1 if axis.more_is_better else 1
    best = pareto_front([(sign * x, metric.value) for _, x, metric in measured])
    return [
        ParetoPoint(
            row,
            x,
            metric.value,
            metric.standard_error or 0.0,
            on_front and not board.partial,
            metric_cell(metric).both,
        )
        for (row, x, metric), on_front in zip(measured, best, strict=True)
    ]


def best_by_size(board: Board) -> set[str]:
    """The models that no other beats in size and the ordering loss."""
    if board.loss_name is None:
        return set()
    return {p.row.name for p in pareto_points(board, "size", board.loss_name) if p.best}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: none is at most as far in both coordinates and nearer in one.
    Both: less is better."""
    return [
        not any(x <= a and y <= b and (x < a or y < b) for j, (x, y) in enumerate(points) if j != i)
        for i, (a, b) in enumerate(points)
    ]


def _range(
    values: Sequence[float], margin: float, floor: float | None = None
) -> tuple[float, float]:
    """Least and greatest value with a margin, a share of the distance between them, on either
    side."""
    low, high = min(values), max(values)
    width = (high - low) or abs(high) or 1.0
    low, high = low - margin * width, high + margin * width
    return (low if floor is None else max(low, floor)), high
