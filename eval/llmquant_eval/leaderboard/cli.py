"""``llmquant leaderboard``: rankings from a folder of reports, in the terminal, as Markdown, as a
page, as plots, as an app. Importing this module loads typer and nothing heavier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant_eval.cli_options import HtmlOption, MarkdownOption, PlotsOption

if TYPE_CHECKING:
    from llmquant_eval.leaderboard.board import Board, StoredReport

_LAST_PORT = 65535


def leaderboard_command(
    results: Annotated[
        Path,
        typer.Argument(
            help="Folder of reports, as `llmquant eval --output` writes them.", metavar="DIR"
        ),
    ],
    html: HtmlOption = None,
    markdown: MarkdownOption = None,
    plots: PlotsOption = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it as an app on this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option(help="Port of --serve; 0 takes a free one.", min=0, max=_LAST_PORT)
    ] = 7861,
    title: Annotated[str, typer.Option(help="Title of the page and the app.")] = "Leaderboard",
) -> None:
    """Rank stored evaluations.

    Different protocols, texts or window counts are never ranked together.
    """
    from llmquant_eval.leaderboard.ranking import load_reports, make_boards

    check_pages(markdown, html)
    stored = load_reports(results)
    boards = make_boards(stored)
    for written in render_files(boards, stored, markdown, html, plots, title):
        sys.stderr.write(f"wrote {written}\n")
    if serve:
        from llmquant_eval.leaderboard.app import serve as serve_app

        serve_app(boards, port, title)
    elif html is markdown is plots is None:
        show(boards)


def check_pages(markdown: Path | None, html: Path | None) -> None:
    """Raises UsageError where pages cannot be written, or would take the place of something
    else."""
    from llmquant import FileKind
    from llmquant_eval.report.files import check_file

    if markdown is not None:
        check_file(markdown, FileKind.MARKDOWN)
    if html is not None:
        check_file(html, FileKind.PAGE)


def render_files(
    boards: Sequence[Board],
    stored: Sequence[StoredReport],
    markdown: Path | None = None,
    html: Path | None = None,
    plots: Path | None = None,
    title: str = "Leaderboard",
    folders: Mapping[str, Path] | None = None,
) -> list[Path]:
    """Write what is asked for; returns what was written. ``folders``: where models lie by label,
    for their layers' errors.

    Raises:
        UsageError: a file's folder does not exist, or plots need a library that is not there.
        LlmquantError: something cannot be written.
    """
    from llmquant import write_file
    from llmquant_eval.leaderboard.html import render_html
    from llmquant_eval.leaderboard.markdown import render_markdown

    pages: list[tuple[Path | None, Callable[[], str]]] = [
        (markdown, lambda: render_markdown(boards)),
        (html, lambda: render_html(boards, title)),
    ]
    check_pages(markdown, html)
    written = []
    for path, render in pages:
        if path is not None:
            write_file(path, render())
            written.append(path)
    if plots is not None:
        from llmquant_eval.leaderboard.plots import write_plots

        written += write_plots(plots, [s.report for s in stored], boards, folders)
    return written


def show(boards: Sequence[Board]) -> None:
    """The rankings as tables on stdout."""
    from rich import box
    from rich.table import Table

    from llmquant_eval.leaderboard.cells import columns, notes, rank_text
    from llmquant_eval.report.terminal import stdout_console

    console = stdout_console(markup=False)
    for board in boards:
        shown = columns(board)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        table.add_column("#", justify="right")
        table.add_column("model", overflow="fold")
        for column in shown:
            table.add_column(column.title, justify="right", overflow="fold")
        for row in board.rows:
            cells = [column.cell(row) for column in shown]
            table.add_row(
                rank_text(row),
                row.name,
                *("\n".join(filter(None, (c.text, c.error))) for c in cells),
            )
        console.print(board.title, style="bold", soft_wrap=True)
        console.print(table)
        for note in notes(board):
            console.print(note, style="dim")
        console.print()
