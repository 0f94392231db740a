"""The leaderboard as one HTML page that needs nothing else: no network, no library, readable
without scripts.

Tables and plots are rendered here; the page's script only sorts, filters, folds and highlights what
is there. Every text from a report is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from llmquant_eval.leaderboard.board import Board, Row, printable
from llmquant_eval.leaderboard.cells import Column, columns, notes, rank_text, repeat_commands
from llmquant_eval.leaderboard.pareto import ParetoPlot, best_by_size, pareto_plots
from llmquant_eval.leaderboard.svg import draw
from llmquant_eval.report.page import render_page

TEMPLATE = Path(__file__).parent / "templates" / "leaderboard.html"
_INTRODUCTION = (
    "Results are ranked together only if protocol, text, scored windows, dtype, reference and tokenizer are the same. "
    "The order is by loss; where the ± of two rows overlap, their order is not certain."
)
_ONLY_BEST = "only what nothing beats in size and loss"
_LOSSES = {
    "kl_mean": "KL",
    "perplexity_ratio": "perplexity ratio",
    "word_perplexity_ratio": "word perplexity ratio",
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
}


def render_html(boards: Sequence[Board], title: str = "Leaderboard") -> str:
    """The whole page, styles and script included."""
    sections = "\n".join(_section(board, number) for number, board in enumerate(boards))
    shown = printable(title)
    parts = {
        "title": escape(shown),
        "introduction": escape(_INTRODUCTION),
        "boards": sections,
    }
    return render_page(TEMPLATE, shown, parts, scripts=True)


def _section(board: Board, number: int) -> str:
    plots = pareto_plots(board)
    flag = f' <span class="flag">{escape(board.scope)}</span>' if board.partial else ""
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(board))
    figures = "\n".join(_figure(plot) for plot in plots)
    return (
        f'<section class="board" aria-labelledby="board-{number}">\n<h2 id="board-{number}">{escape(board.title)}{flag}</h2>\n'
        f"<ul>{listed}</ul>\n{_controls(board, plots)}\n"
        + (f'<div class="plots">\n{figures}\n</div>\n' if plots else "")
        + f"{_table(board, number)}\n</section>"
    )


def _figure(plot: ParetoPlot) -> str:
    filled = (
        "Filled: no other model is better in both. "
        if any(p.kind == "best" for p in plot.points)
        else ""
    )
    caption = f"{plot.title[0].upper()}{plot.title[1:]}. {filled}Whiskers: one standard error."
    return (
        f'<figure data-kind="{plot.kind}" data-loss="{plot.loss}">{draw(plot)}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _controls(board: Board, plots: Sequence[ParetoPlot]) -> str:
    """Hidden until the script runs: without it they would do nothing."""
    losses = dict.fromkeys(plot.loss for plot in plots)
    choice = "".join(f'<option value="{name}">{_LOSSES[name]}</option>' for name in losses)
    widths = sorted({bits for row in board.rows if (bits := _bits(row))}, key=float)
    options = "".join(f'<option value="{bits}">{bits} bits</option>' for bits in widths)
    return (
        '<div class="controls" hidden>'
        '<label>Filter <input type="search" name="filter" placeholder="model, scheme or tool"></label>'
        f'<label>Weights <select name="bits"><option value="">all</option>{options}</select></label>'
        + (
            f'<label><input type="checkbox" name="front"> {_ONLY_BEST}</label>'
            if best_by_size(board)
            else ""
        )
        + (f'<label>Plot <select name="loss">{choice}</select></label>' if len(losses) > 1 else "")
        + '<span class="count" role="status"></span></div>'
    )


def _bits(row: Row) -> str:
    """The nominal weight width, ``"4"``, or nothing where it is not known."""
    per_weight = row.result.bits_per_weight
    return "" if per_weight is None else str(int(per_weight))


def _table(board: Board, number: int) -> str:
    shown = columns(board)
    heads = (
        _head("#", "number") + _head("model", "text", css="text model") + _head("scheme", "text")
    )
    heads += "".join(_head(c.title, "number", more=c.more_is_better) for c in shown)
    best = best_by_size(board)
    bodies = "\n".join(
        _body(row, shown, row.name in best, f"detail-{number}-{i}")
        for i, row in enumerate(board.rows)
    )
    caption = f"{board.title}, {board.scope}"
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead>\n{bodies}\n</table></div>"
    )


def _head(title: str, kind: str, more: bool = False, css: str = "") -> str:
    css = css or ("text" if kind == "text" else "")
    attributes = f' class="{css}"' if css else ""
    attributes += ' data-more="yes"' if more else ""
    return f'<th scope="col" data-kind="{kind}"{attributes}><button type="button">{escape(title)}</button></th>'


def _body(row: Row, shown: Sequence[Column], best: bool, key: str) -> str:
    """One model: its row and, folded away, what repeats and identifies it."""
    searched = printable(" ".join((row.name, row.scheme, row.result.source))).lower()
    rank = "0" if row.is_reference else "" if row.rank is None else str(row.rank)
    cells = f'<td data-value="{rank}">{rank_text(row)}</td>'
    cells += (
        f'<th scope="row" data-value="{escape(row.name)}"><button type="button" class="open" aria-expanded="false" '
        f'aria-controls="{key}" title="Show the command that repeats this row">{escape(row.name)}</button></th>'
        f'<td class="text" data-value="{escape(row.scheme)}">{escape(row.scheme)}</td>'
    )
    for column in shown:
        cell = column.cell(row)
        error = f"<small>{escape(cell.error)}</small>" if cell.error else ""
        value = "" if cell.value is None else repr(cell.value)
        cells += f'<td data-value="{value}">{escape(cell.text)}{error}</td>'
    return (
        f'<tbody data-row="{escape(row.name)}" data-search="{escape(searched)}" data-bits="{_bits(row)}" '
        f'data-front="{"yes" if best else "no"}"{" class=baseline" if row.is_reference else ""}>'
        f'<tr class="row">{cells}</tr>'
        f'<tr class="detail" id="{key}" hidden><td colspan="{len(shown) + 3}">{_detail(row)}</td></tr></tbody>'
    )


def _detail(row: Row) -> str:
    report, result = row.report, row.result
    facts = {
        "measured": f"{report.created:%Y-%m-%d %H:%M} UTC",
        "on": row.machine,
        "with": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "weights": result.weights_sha256,
        "recipe": result.recipe_sha256,
        "kernels": ", ".join(f"{name} × {count}" for name, count in result.kernels.items()),
        "report": row.path.name,
    }
    listed = "".join(
        f"<dt>{name}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items() if fact
    )
    beside = ", measured beside another" if row.is_reference else ""
    return f"To repeat this row{beside}:<pre><code>{escape(chr(10).join(repeat_commands(row)))}</code></pre><dl>{listed}</dl>"
