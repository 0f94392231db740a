"""Pareto plots as inline SVG.

Drawn here rather than by a script in the page, so the page shows them without scripts, and rendered
from the same rows as the table. Colours are CSS variables of the page, so one drawing serves light
and dark; shape and fill say the same as colour. A point on the front is filled and lies on the
stepped line; the reference is a diamond. Whiskers are one standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from llmquant_eval.leaderboard.pareto import ParetoPlot, ParetoPoint, Scale

WIDTH, HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 16, 46
_FONT = (
    11.5  # px; a character is about 0.56 of it wide; labels leave space for the 13 px of a phone
)
_FAR = 19  # px; a label farther up or down gets a line to its point


@dataclass(frozen=True, slots=True)
class _Axis:
    """Data → pixels."""

    scale: Scale
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + self.scale.position(value) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return self.scale.ticks()


def draw(plot: ParetoPlot) -> str:
    """The ``<svg>`` element."""
    across = _Axis(plot.cost_scale, _LEFT, WIDTH - _RIGHT)
    up = _Axis(plot.loss_scale, HEIGHT - _BOTTOM, _TOP)
    titles = plot.cost_axis.title, plot.loss_title
    parts = [
        _axes(across, up, *titles, plot.cost_axis.tick_text),
        _step_line(plot.front_line(), across, up),
        *(_mark(p, across, up) for p in plot.points),
        *_labels(plot, across, up),
    ]
    body = "\n".join(filter(None, parts))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(plot.title)}" '
        f'font-size="{_FONT}" xmlns="http://www.w3.org/2000/svg">\n{body}\n</svg>'
    )


def _axes(
    across: _Axis, up: _Axis, x_title: str, y_title: str, tick_text: Callable[[float], str]
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


def _step_line(best: Sequence[ParetoPoint], across: _Axis, up: _Axis) -> str:
    """The edge of what is reached: from each best point straight on until the next one is
    better."""
    if len(best) < 2:
        return ""
    path = f"M{across(best[0].x):.1f} {up(best[0].y):.1f}"
    path += "".join(f"H{across(p.x):.1f}V{up(p.y):.1f}" for p in best[1:])
    return f'<path class="front" d="{path}"/>'


def _mark(p: ParetoPoint, across: _Axis, up: _Axis) -> str:
    x, y = across(p.x), up(p.y)
    whisker = ""
    if p.error:
        top, bottom = up(p.y + p.error), up(p.y - p.error)
        whisker = f'<path class="whisker" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8"/>'
    if p.row.is_reference:
        shape = f'<path class="dot" d="M{x:.1f} {y - 6:.1f}l6 6-6 6-6-6z"/>'
    else:
        shape = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    tip = f"{p.row.name} · {p.row.scheme} · {p.text}"
    return f'<g class="point {p.kind}" data-row="{escape(p.row.name)}"><title>{escape(tip)}</title>{whisker}{shape}</g>'


def _labels(plot: ParetoPlot, across: _Axis, up: _Axis) -> list[str]:
    """Names beside the points, each at the first of eight places where it hides nothing; one
    without a place is left out."""
    taken = [
        (across(p.x) - 6, up(p.y + p.error) - 2, across(p.x) + 6, up(p.y - p.error) + 2)
        for p in plot.points
    ]
    parts = []
    for p in plot.named_points():
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
