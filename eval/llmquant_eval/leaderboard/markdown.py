"""The leaderboard as Markdown: rendered from Reports alone, so that the same reports give the same
bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmquant_eval.leaderboard.board import Board, Row
from llmquant_eval.leaderboard.cells import columns, notes, rank_text, repeat_commands

_INTRODUCTION = (
    "Results are ranked together only if protocol, text, scored windows, dtype, reference and tokenizer are the same. The "
    "order is by loss; where the ± of two rows overlap, their order is not certain. Rendered by `llmquant leaderboard` from "
    "stored reports; do not edit it by hand."
)


def render_markdown(boards: Sequence[Board]) -> str:
    """One section per ranking: a table, what its numbers mean, and the commands that repeat its
    rows."""
    lines = ["# Leaderboard", "", _INTRODUCTION, ""]
    for board in boards:
        lines += [f"## {_plain(board.title)}", "", *_table(board), ""]
        lines += [f"- {_plain(note)}" for note in notes(board)]
        lines += ["", *_commands(board)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(board: Board) -> list[str]:
    shown = columns(board)
    header = ["#", "model", "scheme", *(c.title for c in shown)]
    rule = ["---:", "---", "---", *["---:"] * len(shown)]
    rows = [
        [rank_text(row), _plain(row.name), _plain(row.scheme), *(c.cell(row).both for c in shown)]
        for row in board.rows
    ]
    return ["| " + " | ".join(cells) + " |" for cells in [header, rule, *rows]]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no cell, link, emphasis or HTML begins in it."""
    return re.sub(r"([\\`*\[\]|<>&])|(?<!\w)_|_(?!\w)", lambda mark: f"\\{mark[0]}", text)


def _commands(board: Board) -> list[str]:
    lines = ["<details><summary>Commands that repeat these rows</summary>", ""]
    measured = [row for row in board.rows if not row.is_reference]  # it is measured beside them
    for row in measured or board.rows:
        fence = "`" * max(
            3, *(1 + len(run) for step in repeat_commands(row) for run in re.findall("`+", step)), 3
        )
        lines += [
            f"{_plain(row.name)}, {_measured(row)}:",
            "",
            f"{fence}sh",
            *repeat_commands(row),
            fence,
            "",
        ]
    return [*lines, "</details>", ""]


def _measured(row: Row) -> str:
    versions = row.report.versions
    tools = ", ".join(
        f"{name} {versions[name]}"
        for name in ("llmquant", "torch", "transformers")
        if name in versions
    )
    return f"{row.report.created:%Y-%m-%d} with {tools}"
