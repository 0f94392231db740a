"""The figures that become files, drawn with matplotlib's Agg canvas, which needs no display and no
global state. The same data give the same SVG bytes.

Which figures there are, and from what, is in :mod:`llmquant_eval.leaderboard.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmquant import save_figure
from llmquant.errors import UsageError
from llmquant_eval.leaderboard.pareto import COLOURS, ParetoPlot
from llmquant_eval.report.results import Breakdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SERIES_COLOURS = (
    "#0b63ce",
    "#b4530a",
    "#2e7d4f",
    "#8e3fa8",
    "#c0392b",
    "#5b6470",
    "#0e8a93",
    "#a07a00",
    "#d0679d",
    "#3f51b5",
)

_AXIS = {
    "confidence": "probability that the reference gives its first choice",
    "context": "tokens before the position",
}

_RESOLUTION = 150

_LINE = 10.0  # points from one name to the next


class LayerError(NamedTuple):
    """One quantized linear: its block (None outside of any), its name within it, and a relative
    error."""

    block: int | None
    leaf: str
    error: float


def layers_figure(label: str, kind: str, errors: Sequence[LayerError]) -> Figure:
    """A group of bars per block, a colour per kind of linear; linears outside of blocks stand at
    the end."""
    leaves = list(dict.fromkeys(e.leaf for e in errors))
    blocks = sorted({e.block for e in errors if e.block is not None})
    places: dict[int | None, int] = {block: i for i, block in enumerate(blocks)}
    places[None] = len(blocks)
    outside = any(e.block is None for e in errors)
    names = [str(b) for b in blocks] + (["other"] if outside else [])
    figure, axes = _figure(max(6.4, 1.5 + 0.13 * len(names) * (len(leaves) + 2)), 3.6)
    width = 0.8 / len(leaves)
    for i, leaf in enumerate(leaves):
        mine = [e for e in errors if e.leaf == leaf]
        at = [places[e.block] - 0.4 + (i + 0.5) * width for e in mine]
        axes.bar(
            at,
            [e.error for e in mine],
            width,
            color=_SERIES_COLOURS[i % len(_SERIES_COLOURS)],
            label=leaf,
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("block")
    axes.set_ylabel(f"relative {kind}")
    axes.set_title(label, loc="left")
    axes.legend(ncols=min(4, len(leaves)), fontsize=8, frameon=False)
    axes.margins(y=0.25)
    return figure


def divergence_figure(parts: Sequence[tuple[str, Breakdown]]) -> Figure:
    """Mean KL against confidence or context, a line per model; all breakdowns of one kind, at least
    one."""
    by = parts[0][1].by
    figure, axes = _figure(6.8, 4.2)
    for i, (label, part) in enumerate(parts):
        where = [_middle(b.lower, b.upper, by) for b in part.buckets]
        axes.errorbar(
            where,
            [b.kl_mean for b in part.buckets],
            yerr=[b.standard_error or 0.0 for b in part.buckets],
            label=label,
            color=_SERIES_COLOURS[i % len(_SERIES_COLOURS)],
            marker="os^Dv"[i % 5],
            markersize=4,
            linewidth=1.3,
            capsize=2,
        )
    if all(b.kl_mean > 0 for _, part in parts for b in part.buckets):
        axes.set_yscale("log")
    if by == "context":
        axes.set_xscale("log", base=2)
    axes.set_xlabel(_AXIS[by])
    axes.set_ylabel("mean KL, nats")
    axes.set_title(parts[0][1].protocol, loc="left")
    axes.legend(fontsize=8, frameon=False, ncols=1 + (len(parts) > 6))
    return figure


def _middle(lower: float, upper: float, by: str) -> float:
    """Of a bucket: the arithmetic middle of probabilities, the geometric one of lengths."""
    return (lower + upper) / 2 if by == "confidence" else float((max(lower, 1) * upper) ** 0.5)


def front_figure(plot: ParetoPlot, title: str) -> Figure:
    """Loss against size or speed, with the front."""
    figure, axes = _figure(6.8, 4.4)
    for p in plot.points:
        colour = COLOURS[p.kind]
        axes.errorbar(
            [p.x],
            [p.y],
            yerr=[p.error] if p.error else None,
            color=colour,
            marker="D" if p.kind == "reference" else "o",
            markerfacecolor="white" if p.kind == "other" else colour,
            capsize=3,
            linestyle="none",
        )
    line = plot.front_line()
    axes.step(
        [p.x for p in line],
        [p.y for p in line],
        where="post",
        color=COLOURS["best"],
        linestyle="--",
        linewidth=1,
    )
    across, up = plot.cost_scale, plot.loss_scale
    axes.set_xlim(across.low, across.high)
    axes.set_xticks(across.ticks(), [plot.cost_axis.tick_text(tick) for tick in across.ticks()])
    axes.set_yscale("log" if up.log else "linear")
    axes.set_ylim(up.low, up.high)
    axes.set_yticks(up.ticks(), [f"{tick:g}" for tick in up.ticks()])
    axes.set_xlabel(plot.cost_axis.title)
    axes.set_ylabel(plot.loss_title)
    axes.set_title(title, loc="left", fontsize=9)
    _name_points(figure, axes, [(p.row.name, p.x, p.y) for p in plot.named_points()])
    return figure


def _name_points(figure: Figure, axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, from the top down, each at least a line below the last; a moved one has
    a line to its point."""
    # settles the layout, without which there are no places on paper
    figure.draw_without_rendering()
    per_point = figure.dpi / 72
    last = float("inf")
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        at = axes.transData.transform((x, y))[1] / per_point
        wanted = min(at, last - _LINE)
        last = wanted
        line = (
            {"arrowstyle": "-", "color": COLOURS["other"], "linewidth": 0.6}
            if at - wanted > 1
            else None
        )
        axes.annotate(
            name,
            (x, y),
            xytext=(9, wanted - at),
            textcoords="offset points",
            fontsize=8,
            va="center",
            arrowprops=line,
        )


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UsageError(
            f"--plots needs matplotlib, which is not installed ({e}); pip install 'llmquant[eval]'"
        ) from e
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    import matplotlib

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    save_figure(figure, paths[0], dpi=_RESOLUTION, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "llmquant"}):
        save_figure(figure, paths[1], metadata={"Date": None})
    return paths
