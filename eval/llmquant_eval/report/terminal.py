"""A Report in the terminal, as one rich table with its footnotes.

A standard error stands under its value and the scheme under the model's name, so that all columns
fit a hundred characters. What the cells say is in :mod:`llmquant_eval.report.table`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmquant_eval.report.results import ModelResult
from llmquant_eval.report.schema import Report
from llmquant_eval.report.table import HEADERS, SideTable, footnotes, row, side_tables

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

_LOG_WIDTH = 120  # columns of a table where stdout is no terminal; rich would take 80

_SHORTEST_NAME = 12  # characters to which the model column may shrink before the table is turned


def stdout_console(markup: bool = True) -> Console:
    """For tables on stdout, wide enough for all columns in a log; ``markup`` False prints labels as
    they are."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _LOG_WIDTH
    return Console(width=width, markup=markup, highlight=markup, emoji=markup)


def render(report: Report, width: int) -> Group:
    """The run as one rich table with its footnotes.

    A row per model where ``width`` columns can hold it; in a narrower terminal a column per
    model, because a number cut in two is worse than a table turned.
    """
    from rich.console import Console, Group
    from rich.measure import Measurement
    from rich.text import Text

    table = _by_row(report.models)
    console = Console(width=10_000)
    if Measurement.get(console, console.options, table).minimum > width:
        table = _by_column(report.models)
    parts: list[Table | Text] = [table]
    for side_table in side_tables(report):
        parts += [Text(""), _render_side_table(side_table)]
    return Group(*parts, *(Text(line, style="dim") for line in footnotes(report)))


def _render_side_table(content: SideTable) -> Table:
    table = plain_table()
    table.title, table.title_justify, table.title_style = content.title, "left", "bold"
    table.add_column("model", overflow="fold")
    for header in content.headers:
        table.add_column(header, justify="right", overflow="fold")
    for cells in content.rows:
        table.add_row(*cells)
    return table


def plain_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _by_row(models: Sequence[ModelResult]) -> Table:
    from rich.text import Text

    table = plain_table()
    table.add_column("model", overflow="fold", min_width=_SHORTEST_NAME)
    for header in HEADERS:
        table.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in models:
        name = Text.assemble(result.label, "\n", (result.scheme, "dim"))
        table.add_row(name, *("\n".join(filter(None, pair)) for pair in row(result)))
    return table


def _by_column(models: Sequence[ModelResult]) -> Table:
    from rich.text import Text

    table = plain_table()
    table.add_column("model", no_wrap=True)
    for result in models:
        table.add_column(Text(f"{result.label}\n{result.scheme}"), justify="right", overflow="fold")
    for header, *pairs in zip(HEADERS, *map(row, models), strict=True):
        table.add_row(header, *(" ".join(filter(None, pair)) for pair in pairs))
    return table
