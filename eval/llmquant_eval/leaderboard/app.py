"""The leaderboard as a Gradio app: a tab per ranking, on this machine only.

Gradio is an extra (``pip install 'llmquant[eval]'``) and is imported when the app is asked for. It
is set not to report usage, and the app listens on 127.0.0.1. :func:`add_board` puts a ranking into
any Gradio layout, so that another app can have it as a tab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.leaderboard.board import Board, Row
from llmquant_eval.leaderboard.cells import Column, columns, notes, rank_text, repeat_commands
from llmquant_eval.leaderboard.pareto import COLOURS, pareto_plots
from llmquant_eval.leaderboard.svg import draw

_BYTES = ("size", "peak memory")
HOST = "127.0.0.1"
# The page's plot colours, for a drawing outside of the page: Gradio sets the class "dark" on the
# body.
_STYLE = """
.board-plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px;
  --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --best: BEST; --other: OTHER; --base: REFERENCE; --panel: #ffffff; }
.dark .board-plots { --ink: #e7eaee; --soft: #a0a9b5; --line: #343b45; --best: #74b0ff; --other: #8b95a3; --base: #f0a860;
  --panel: #1c2026; }
.board-plots svg { width: 100%; height: auto; }
.board-plots .grid { stroke: var(--line); } .board-plots .tick, .board-plots .title { fill: var(--soft); }
.board-plots .name { fill: var(--ink); } .board-plots .front { fill: none; stroke: var(--best); stroke-dasharray: 5 4; }
.board-plots .leader { stroke: var(--soft); stroke-width: .8; }
.board-plots .whisker { fill: none; stroke: currentColor; } .board-plots .point { color: var(--other); }
.board-plots .dot { fill: var(--panel); stroke: currentColor; stroke-width: 1.8; }
.board-plots .point * { color: var(--other); } .board-plots .best * { color: var(--best); }
.board-plots .reference * { color: var(--base); }
.board-plots .best .dot, .board-plots .reference .dot { fill: currentColor; }
"""


def _style() -> str:
    style = _STYLE
    for kind, colour in COLOURS.items():
        style = style.replace(kind.upper(), colour)
    return style


def load_gradio() -> Any:
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gradio
    except ImportError as e:
        raise UsageError(
            f"--serve needs Gradio, which is not installed ({e}); pip install 'llmquant[eval]'"
        ) from e
    return gradio


def table(board: Board) -> tuple[list[str], list[str], list[list[Any]]]:
    """Headers, Gradio's column types and rows. Numbers stay numbers of few digits, so that the app
    sorts them; bytes are MB."""
    shown = columns(board)
    headers = [
        "#",
        "model",
        "scheme",
        *(f"{c.title} MB" if c.title in _BYTES else c.title for c in shown),
    ]
    rows = [
        [rank_text(row), row.name, row.scheme, *(_number(c, row) for c in shown)]
        for row in board.rows
    ]
    return headers, ["str", "str", "str", *["number"] * len(shown)], rows


def _number(column: Column, row: Row) -> float | None:
    value = column.cell(row).value
    return (
        None if value is None else float(f"{value * (1e-6 if column.title in _BYTES else 1.0):.6g}")
    )


def add_board(gradio: Any, board: Board) -> None:
    """One ranking's notes, table, plots and commands into the layout that is open."""
    gradio.Markdown("\n".join([f"### {board.title}", "", *(f"- {note}" for note in notes(board))]))
    headers, kinds, rows = table(board)
    gradio.Dataframe(
        value=rows, headers=headers, datatype=kinds, interactive=False, show_search="filter",
        label="Sort by a header, or filter",
    )  # fmt: skip
    drawings = [draw(plot) for plot in pareto_plots(board)]
    if drawings:
        gradio.HTML(f'<style>{_style()}</style><div class="board-plots">{"".join(drawings)}</div>')
    # The reference is measured beside each of the others: it has no command of its own.
    measured = [row for row in board.rows if not row.is_reference] or board.rows
    names = [row.name for row in measured]
    commands = {row.name: "\n".join(repeat_commands(row)) for row in measured}
    choice = gradio.Dropdown(names, value=names[0], label="The command that repeats a row")
    code = gradio.Code(commands[names[0]], language="shell", label="Command")
    choice.change(commands.get, choice, code, show_progress="hidden")


def build(boards: Sequence[Board], title: str) -> Any:
    """The app as ``gradio.Blocks``, not yet running."""
    gradio = load_gradio()
    with gradio.Blocks(title=title, analytics_enabled=False) as app:
        gradio.Markdown(f"# {title}")
        with gradio.Tabs():
            for board in boards:
                with gradio.Tab(f"{board.key.protocol}, {board.source.rsplit('/', 1)[-1]}"):
                    add_board(gradio, board)
    return app


def serve(boards: Sequence[Board], port: int, title: str, *, block: bool = True) -> Any:
    """Run the app on ``127.0.0.1:port`` (0: a free port) until it is interrupted; returns it.

    Raises:
        UsageError: Gradio is not installed.
        LlmquantError: the port is taken.
    """
    app = build(boards, title)
    theme = load_gradio().themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    try:
        app.launch(
            server_name=HOST,
            server_port=port or None,
            share=False,
            theme=theme,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            ssr_mode=False,
        )
    except OSError as e:
        raise LlmquantError(
            f"the app cannot listen on {HOST}:{port}: {e}; choose another --port"
        ) from e
    print(f"the leaderboard is at {app.local_url} (Ctrl-C ends it)", flush=True)
    if block:
        app.block_thread()
    return app
