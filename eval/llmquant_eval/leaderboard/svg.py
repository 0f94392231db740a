"""Pareto plots as inline SVG: what a model loses against what it weighs, or against how fast it
decodes.

Drawn here rather than by a script in the page, so the page shows them without scripts, and rendered
from the same rows as the table. Colours are CSS variables of the page, so one drawing serves light
and dark; shape and fill say the same as colour. A point no other beats in both directions is filled
and lies on the stepped line; the reference is a diamond. Whiskers are one standard error. Losses in
KL stand on a logarithmic axis (they span decades), ratios on a linear one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from llmquant_eval.leaderboard.cells import metric_cell
from llmquant_eval.leaderboard.ranking import Board, Row, front, loss
from llmquant_eval.report.table import size, speed

WIDTH, HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 16, 46
_FONT = 11.5  # px; a character is about 0.56 of it wide; labels leave room for the 13 px of a phone
_FAR = 19  # px; a label farther up or down gets a line to its point
_LABELLED = 14  # points up to which all are labelled; beyond it those on the front are


@dataclass(frozen=True, slots=True)
class Axis:
    """Data → pixels. ``log`` axes have ticks at 1, 2 and 5 times powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        return self.start + (min(max(at, low), high) - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
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
class Point:
    """One model in data units; ``error`` 0 where there is none, ``text`` the loss for people."""

    row: Row
    x: float
    y: float
    error: float
    best: bool
    text: str


@dataclass(frozen=True, slots=True)
class Plot:
    """One drawing. ``kind`` and ``loss`` name it for the page's switches."""

    kind: str
    loss: str
    title: str
    svg: str


_KINDS: dict[str, tuple[str, Callable[[Row], float | None], Callable[[float], str], bool]] = {
    # kind: (axis title, value, tick text, more is better)
    "size": ("size on disk", lambda row: row.result.bytes_on_disk, size, False),
    "speed": ("decode, tokens/s", lambda row: row.decode_speed, speed, True),
}
_LOSS_TITLES = {
    "kl_mean": "KL to the reference, nats", "perplexity_ratio": "perplexity ÷ reference's",
    "word_perplexity_ratio": "word perplexity ÷ reference's", "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
}  # fmt: skip


def plots(board: Board) -> list[Plot]:
    """Every plot that the ranking has data for (two models or more): by size and speed, for KL and
    the ordering loss."""
    names = dict.fromkeys(filter(None, ("kl_mean", board.loss_name)))
    found = []
    for kind, (title, *_) in _KINDS.items():
        for name in names:
            shown = points(board, kind, name)
            if len(shown) >= 2:
                label = f"{_LOSS_TITLES[name]} against {title}"
                found.append(Plot(kind, name, label, draw(shown, kind, name, label)))
    return found


def points(board: Board, kind: str, name: str) -> list[Point]:
    """The rows that have both coordinates; of speeds only those of the machine that measured most
    of them.

    On the logarithmic KL axis the reference, whose KL is 0, has no place and is left out.
    """
    _, value, _, more = _KINDS[kind]
    found = []
    for row in board.rows:
        x, metric = value(row), loss(row, name)
        if x is not None and metric is not None and (name != "kl_mean" or metric.value > 0):
            found.append((row, float(x), metric))
    if more and found:
        machines = [row.machine for row, _, _ in found]
        most = max(dict.fromkeys(machines), key=machines.count)
        found = [entry for entry in found if entry[0].machine == most]
    best = front([(-x if more else x, metric.value) for _, x, metric in found])
    if board.partial:
        best = [False] * len(found)
    return [
        Point(
            row, x, metric.value, metric.standard_error or 0.0, on_front, metric_cell(metric).both
        )
        for (row, x, metric), on_front in zip(found, best, strict=True)
    ]


def draw(shown: Sequence[Point], kind: str, name: str, label: str) -> str:
    """The ``<svg>`` element."""
    title, _, tick_text, more = _KINDS[kind]
    log = name == "kl_mean"
    across = Axis(*_span([p.x for p in shown], 0.12, floor=0.0), _LEFT, WIDTH - _RIGHT)
    lows, highs = [p.y - p.error for p in shown], [p.y + p.error for p in shown]
    if log:
        smallest = min(p.y for p in shown)
        up = Axis(
            max(min(lows), smallest / 3) / 1.4, max(highs) * 1.4, HEIGHT - _BOTTOM, _TOP, log=True
        )
    else:
        up = Axis(*_span(lows + highs, 0.1), HEIGHT - _BOTTOM, _TOP)
    parts = [
        _axes(
            across, up, title + (", more is better" if more else ""), _LOSS_TITLES[name], tick_text
        )
    ]
    parts.append(_step_line(shown, across, up, more))
    parts += [_mark(p, across, up) for p in shown]
    parts += _labels(shown, across, up)
    body = "\n".join(filter(None, parts))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" '
        f'font-size="{_FONT}" xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>'
    )


def _span(
    values: Sequence[float], margin: float, floor: float | None = None
) -> tuple[float, float]:
    low, high = min(values), max(values)
    width = (high - low) or abs(high) or 1.0
    low, high = low - margin * width, high + margin * width
    return (low if floor is None else max(low, floor)), high


def _axes(
    across: Axis, up: Axis, x_title: str, y_title: str, tick_text: Callable[[float], str]
) -> str:
    bottom, parts = HEIGHT - _BOTTOM, []
    for tick in up.ticks():
        y = up(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick_text(tick)}</text>'
        )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="title" x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="title" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    return "\n".join(parts)


def _step_line(shown: Sequence[Point], across: Axis, up: Axis, more: bool) -> str:
    """The edge of what is reached: from each best point straight on until the next one is
    better."""
    best = sorted((p for p in shown if p.best), key=lambda p: p.x, reverse=more)
    if len(best) < 2:
        return ""
    path = f"M{across(best[0].x):.1f} {up(best[0].y):.1f}"
    path += "".join(f"H{across(p.x):.1f}V{up(p.y):.1f}" for p in best[1:])
    return f'<path class="front" d="{path}"/>'


def _mark(p: Point, across: Axis, up: Axis) -> str:
    x, y = across(p.x), up(p.y)
    whisker = ""
    if p.error:
        top, bottom = up(p.y + p.error), up(p.y - p.error)
        whisker = f'<path class="whisker" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8"/>'
    if p.row.is_reference:
        shape = f'<path class="dot" d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>'
    else:
        shape = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    kind = "reference" if p.row.is_reference else "best" if p.best else "other"
    tip = f"{p.row.name} · {p.row.scheme} · {p.text}"
    return f'<g class="point {kind}" data-row="{escape(p.row.name)}"><title>{escape(tip)}</title>{whisker}{shape}</g>'


def _labels(shown: Sequence[Point], across: Axis, up: Axis) -> list[str]:
    """Names beside the points, each at the first of eight places where it hides nothing; one
    without a place is left out."""
    taken = [
        (across(p.x) - 6, up(p.y + p.error) - 2, across(p.x) + 6, up(p.y - p.error) + 2)
        for p in shown
    ]
    parts = []
    for p in sorted(shown, key=lambda p: (not p.best, p.x)):
        if len(shown) > _LABELLED and not p.best:
            continue
        width, x, y = len(p.row.name) * _FONT * 0.64, across(p.x), up(p.y)
        for anchor, dx, dy in _PLACES:
            left = x + dx - (0 if anchor == "start" else width if anchor == "end" else width / 2)
            box = (left, y + dy - 9, left + width, y + dy + 3)
            inside = (
                box[0] >= _LEFT
                and box[2] <= WIDTH - 2
                and box[1] >= 2
                and box[3] <= HEIGHT - _BOTTOM
            )
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                key = escape(p.row.name)
                if abs(dy) > _FAR:
                    end = y + dy + (3 if dy < 0 else -9)
                    line = f'x1="{x:.1f}" y1="{y:.1f}" x2="{x + dx:.1f}" y2="{end:.1f}"'
                    parts.append(f'<line class="leader" data-row="{key}" {line}/>')
                parts.append(
                    f'<text class="name" data-row="{key}" x="{x + dx:.1f}" y="{y + dy:.1f}" '
                    f'text-anchor="{anchor}">{escape(p.row.name)}</text>'
                )
                break
    return parts


_PLACES = (
    ("start", 9, 4),
    ("end", -9, 4),
    ("middle", 0, -11),
    ("middle", 0, 19),
    ("start", 8, -8),
    ("start", 8, 15),
    ("end", -8, -8),
    ("end", -8, 15),
    ("start", 12, -20),
    ("start", 12, 27),
    ("end", -12, -20),
    ("end", -12, 27),
)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
