"""What a person sees: a live table on a terminal, a line for each event elsewhere, both on stderr;
the answer on stdout at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmquant_eval.auto.answer.render import (
    COLUMNS,
    ORIGINAL,
    cells,
    duration,
    original_cells,
    without_empty,
)
from llmquant_eval.auto.schema import AutoReport, Rung, Spent
from llmquant_eval.report.results import ModelResult
from llmquant_eval.report.terminal import plain_table, stdout_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

_STYLES = {"met": "green", "not met": "red", "failed": "red"}
_TENTHS = 10


class Screen:
    """Rungs as they are tried. ``live`` None: lines instead of a table."""

    def __init__(self, console: Console, live: Live | None, hidden: bool) -> None:
        self._console, self._live, self._hidden = console, live, hidden
        self._lines: dict[str, tuple[str, ...]] = {}
        self._styles: dict[str, str] = {}
        self._tenth: tuple[str, str, int] | None = None

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self._hidden:
            self._console.print(text, soft_wrap=True)

    def begin(self, names: Sequence[str]) -> None:
        """The ladder is known."""
        blank = [""] * (len(COLUMNS) - 2)
        self._lines = {name: (name, "waiting", *blank) for name in (ORIGINAL, *names)}
        self._draw()

    def doing(self, name: str, what: str, done: int = 0, total: int = 0) -> None:
        """A rung is worked on; ``done`` of ``total`` steps."""
        text = f"{what} {done}/{total}" if total else what
        if name in self._lines:
            old = self._lines[name]
            self._lines[name] = (name, text, *old[2:])
        tenth = (name, what, _TENTHS * done // max(total, 1))
        if self._live is None and tenth != self._tenth:
            self.note(f"{name}: {text}")
        self._tenth = tenth
        self._draw()

    def done(self, rung: Rung) -> None:
        """A rung has an outcome."""
        self._lines[rung.name] = tuple(cells(rung))
        self._styles[rung.name] = _STYLES.get(rung.outcome, "dim")
        if self._live is None:
            self.note(f"{rung.name}: {rung.outcome}{', cached' if rung.cached else ''}; {rung.why}")
        self._draw()

    def original(self, model: ModelResult, spent: Spent) -> None:
        """The original was measured."""
        self._lines[ORIGINAL] = tuple(original_cells(model, spent))
        if self._live is None:
            self.note(f"{ORIGINAL}: {self._lines[ORIGINAL][1]}")
        self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(_table(list(self._lines.values()), self._styles))


@contextmanager
def shown(hidden: bool) -> Iterator[Screen]:
    """A screen for the length of a search."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if hidden or not console.is_terminal:
        yield Screen(console, None, hidden)
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield Screen(console, live, hidden)


def show(report: AutoReport) -> None:
    """Print the answer to stdout."""
    console = stdout_console(markup=False)
    styles = {r.name: _STYLES.get(r.outcome, "dim") for r in report.rungs}
    original = original_cells(report.baseline, report.baseline_spent)
    console.print(_table([original, *map(cells, report.rungs)], styles))
    console.print()
    colour = "green" if report.decision == "chosen" else "yellow"
    title = report.chosen or report.decision
    console.print(f"{title}: {report.why}", style=colour)
    console.print(report.next)
    if report.stopped is not None:
        console.print(report.stopped, style="yellow")
    console.print(f"time  {duration(report.spent.wall)}, {report.spent.cpu:,.0f} CPU s")
    if report.evaluate is not None:
        console.print("measure it again:", style="dim")
        console.print(report.evaluate, soft_wrap=True)


def _table(lines: Sequence[Sequence[str]], styles: dict[str, str]) -> Table:
    table = plain_table()
    columns, kept = without_empty(lines)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i != 1)
    for line in kept:
        table.add_row(*line, style=styles.get(line[0], ""))
    return table
