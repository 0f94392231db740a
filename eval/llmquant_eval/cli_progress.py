"""What ``eval`` and ``validate`` show while they work: a bar per stage on a terminal, lines in a
log. Importing this loads nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID

Advance = Callable[[str, int, int], None]
"""Gets the stage, how much of it is done, and how much there is."""


@contextmanager
def stages(hidden: bool) -> Iterator[tuple[Advance, Callable[[str], None]]]:
    """A bar with the time left per stage, and what is said meanwhile, on stderr. A log has no bars:
    it gets a line per tenth of a stage."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    from llmquant.cli.progress import bar_columns

    console = Console(stderr=True)
    drawn = console.is_terminal and not hidden
    with Bars(*bar_columns(), console=console, disable=not drawn) as bars:
        tasks: dict[str, TaskID] = {}
        tenths: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:  # what is done before says nothing of the speed
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)
            tenth = 10 * done // max(total, 1)
            if not drawn and tenths.get(stage) != tenth:
                tenths[stage] = tenth
                tell(f"{stage}: {done}/{total}")

        def tell(note: str) -> None:
            if not hidden:
                console.print(note, markup=False, highlight=False, soft_wrap=True)

        yield advance, tell
