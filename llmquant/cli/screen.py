"""Where commands print for people: rich without its liberties.

Paths, patterns and text sources are printed as they are: ``[a-z]`` in one is no markup, and
``:train:`` no emoji.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

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
