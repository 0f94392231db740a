"""Where commands print for people: rich without its liberties.

Paths, patterns and text sources are printed as they are: ``[a-z]`` in one is no markup, and
``:train:`` no emoji.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDTH = 110  # of tables in a file or pipe, which have no width of their own


def screen(*, stderr: bool = False) -> Console:
    """A console for facts on stdout, or for progress on stderr."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr,
        width=None if terminal else _WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )


def fact_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Rows of a name and what is said of it. A long text continues below itself, not below the
    name."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
