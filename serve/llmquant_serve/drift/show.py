"""A report for people: a table in the terminal, a plot, a page."""

from __future__ import annotations

import html
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant import DriftReport, FileKind, refuse_foreign, save_figure, write_file
from llmquant.errors import LlmquantError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = (".png", ".svg", ".pdf", ".html")
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="generator" content="llmquant"><title>Drift of {model}</title>
<style>body{{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}
td,th{{text-align:left;padding:.2em .8em .2em 0}}svg{{max-width:100%;height:auto}}</style>
<h1>{says}</h1><p>{head}</p><table>{rows}</table>{plot}</html>
"""


def show(report: DriftReport, console: Console) -> None:
    """Print what a report says."""
    from rich import box
    from rich.table import Table

    console.print(headline(report))
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if i > 1 else "left")
    for cells in _cells(report):
        table.add_row(*cells)
    console.print(table)
    console.print(report.says)


def headline(report: DriftReport) -> str:
    left = f", {report.unfinished:,} more that nobody waited for" if report.unfinished else ""
    return (
        f"{report.requests:,} requests to {report.model}{left}; an alarm needs odds of {report.threshold:,.0f} "
        f"(any false alarm, ever: at most {report.alpha:.2g})"
    )


_COLUMNS = ("statistic", "of", "profile", "recent", "seen", "odds now", "most", "alarm at")


def _cells(report: DriftReport) -> list[list[str]]:
    return [
        [
            row.label,
            row.side,
            _number(row.before),
            _number(row.recent),
            f"{row.seen:,}",
            _number(row.evidence),
            _number(row.peak),
            "–" if row.alarm is None else f"request {row.alarm:,}",
        ]
        for row in report.rows
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def check_plot(path: Path | None) -> None:
    """Raises UsageError for a file that cannot be a plot or is there and none, and LlmquantError
    without matplotlib."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path}: the name must end in {', '.join(FORMATS)}")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--plot {path}: the folder does not exist; make it first")
    refuse_foreign(path, FileKind.PAGE if path.suffix.lower() == ".html" else FileKind.PLOT)
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise LlmquantError(
            "plots need matplotlib; install it with pip install 'llmquant[eval]'"
        ) from e


def write_plot(report: DriftReport, path: Path) -> None:
    """Evidence and means over the requests, as a picture or a page.

    Raises:
        LlmquantError: it cannot be written.
    """
    if path.suffix.lower() == ".html":
        write_file(path, _page(report))
        return
    try:
        save_figure(_figure(report), path, dpi=120)
    except OSError as e:
        raise LlmquantError(f"{path} cannot be written: {e.strerror or e}") from e


def _page(report: DriftReport) -> str:
    drawn = io.StringIO()
    _figure(report).savefig(drawn, format="svg")
    head = "".join(f"<th>{html.escape(name)}" for name in _COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) for cells in _cells(report)
    )
    return _PAGE.format(
        model=html.escape(report.model),
        says=html.escape(report.says),
        head=html.escape(headline(report)),
        rows=f"<tr>{head}{rows}",
        plot=drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2],
    )


def _figure(report: DriftReport) -> Any:
    """One panel of evidence, and one of means for each statistic that has windows."""
    from matplotlib.figure import Figure

    seen = [row for row in report.rows if any(row.statistic in w.means for w in report.windows)]
    lines = math.ceil(len(seen) / 3)
    figure = Figure(figsize=(12, 4 + 2.2 * lines), layout="constrained")
    grid = figure.add_gridspec(lines + 2, 3)
    above = figure.add_subplot(grid[:2, :])
    for row in seen:
        at = [(w.last, w.evidence[row.statistic]) for w in report.windows]
        above.plot(*zip(*at, strict=True), label=f"{row.label} ({row.side})", marker=".")
    above.axhline(report.threshold, color="black", linestyle="--", label="alarm")
    above.set(yscale="log", xlabel="request", ylabel="odds against no drift")
    above.set_title(report.says.partition(":")[0])
    above.legend(fontsize="x-small", ncols=2)
    for i, row in enumerate(seen):
        axes = figure.add_subplot(grid[2 + i // 3, i % 3])
        at = [(w.last, w.means[row.statistic]) for w in report.windows if row.statistic in w.means]
        axes.plot(*zip(*at, strict=True), marker=".")
        if row.before is not None:
            axes.axhline(row.before, color="gray", linestyle=":")
        if row.alarm is not None:
            axes.axvline(row.alarm, color="red")
        axes.set_title(row.label, fontsize="small")
    return figure
