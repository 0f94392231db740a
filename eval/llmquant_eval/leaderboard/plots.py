"""Plots that people look at, from Reports and manifests: PNG to paste, SVG to zoom.

* ``layers-LABEL``: the relative output error of every quantized linear by block, as
  ``manifest.json`` recorded it when the model was quantized (the weight error where no text was
  seen), for candidates whose folder is here and is what was measured.
* ``kl-by-confidence``, ``kl-by-context``: mean KL of each candidate by the probability that the
  reference gives its first choice, and by the tokens that stand before a position; one standard
  error.
* ``front-size``, ``front-speed``: the Pareto plots of a ranking.

Drawn with matplotlib's Agg canvas, which needs no display and no global state. The same data give
the same SVG bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import llmquant
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.leaderboard.pareto import COLOURS, COST_AXES, ParetoPlot, pareto_plot
from llmquant_eval.report.schema import Breakdown, ModelResult, Report
from llmquant_eval.suites.schema import slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmquant_eval.leaderboard.ranking import Board

_BLOCK = re.compile(r"^(?P<before>.*?\.)?(?P<block>\d+)\.(?P<leaf>.+)$")
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


def layer_errors(folder: Path) -> tuple[str, list[LayerError]] | None:
    """``("output error" or "weight error", errors)`` of a folder, None where there is no record of
    errors.

    Raises:
        UsageError: a manifest that is not one.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))["modules"]
        by_name = {
            name: (entry.get("output_error"), entry.get("weight_error"))
            for name, entry in modules.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{path} is not a manifest of llmquant: {type(e).__name__}: {e}") from e
    for column, kind in enumerate(("output error", "weight error")):
        errors = {name: pair[column] for name, pair in by_name.items() if pair[column] is not None}
        if errors:
            return kind, [_layer(name, float(error)) for name, error in errors.items()]
    return None


def _layer(name: str, error: float) -> LayerError:
    match = _BLOCK.match(name)
    if match is None:
        return LayerError(None, name, error)
    return LayerError(int(match["block"]), match["leaf"].rpartition(".")[2], error)


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


def write_plots(
    folder: Path,
    reports: Sequence[Report],
    boards: Sequence[Board],
    folders: Mapping[str, Path] | None = None,
) -> list[Path]:
    """Every plot that there is data for, as PNG and SVG; returns the files.

    ``folders`` says where models lie, by label; what is not in it is looked for where its report
    says.

    Raises:
        UsageError: matplotlib is not installed, or nothing can be drawn.
        LlmquantError: the folder cannot be written.
    """
    figures = dict(_figures(reports, boards, folders or {}))
    if not figures:
        raise UsageError(
            f"--plots {folder}: nothing can be drawn: the reports have no KL and fewer than two models, and no model folder has a manifest"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [path for name, figure in figures.items() for path in _save(figure, folder, name)]
    except OSError as e:
        raise LlmquantError(f"--plots {folder} cannot be written: {e}") from e


def write_report_plots(folder: Path, report: Report) -> list[Path]:
    """The plots of one run; raises as :func:`write_plots`."""
    from llmquant_eval.leaderboard.ranking import StoredReport, make_boards

    return write_plots(folder, [report], make_boards([StoredReport(Path("report.json"), report)]))


def _figures(
    reports: Sequence[Report], boards: Sequence[Board], folders: Mapping[str, Path]
) -> Iterable[tuple[str, Figure]]:
    candidates = {m.label: m for r in reports for m in r.models if m.role == "candidate"}
    for label, model in candidates.items():
        place = folders.get(label, Path(model.source))
        recorded = layer_errors(place)
        # Of a folder that was made again since, the record says nothing about what was measured.
        if recorded is not None and llmquant.inspect(place).weights_sha256 == model.weights_sha256:
            yield f"layers-{slug(label)}", layers_figure(label, *recorded)
    yield from _breakdowns(boards)
    for number, board in enumerate(boards):
        if board.loss_name is None:
            continue  # a task has no loss
        for kind in COST_AXES:
            plot = pareto_plot(board, kind, board.loss_name)
            if plot is not None:
                name = f"front-{kind}-{slug(board.key.protocol)}{f'-{number}' if number else ''}"
                yield name, front_figure(plot, f"{board.title}\n{board.scope}")


def _breakdowns(boards: Sequence[Board]) -> Iterable[tuple[str, Figure]]:
    """Only breakdowns of one ranking share a plot: others are of other tokens."""
    for number, board in enumerate(boards):
        for by in ("confidence", "context"):
            parts = [
                (row.name, part)
                for row in board.rows
                for part in _own(row.result, board)
                if part.by == by and part.buckets
            ]
            if parts:
                yield (
                    f"kl-by-{by}-{slug(parts[0][1].protocol)}{f'-{number}' if number else ''}",
                    divergence_figure(parts),
                )


def _own(result: ModelResult, board: Board) -> list[Breakdown]:
    return [part for part in result.breakdowns if part.protocol in board.key.protocol.split(" · ")]


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


def _save(figure: Figure, folder: Path, name: str) -> list[Path]:
    import matplotlib

    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=_RESOLUTION, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": "llmquant"}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
