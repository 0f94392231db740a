"""The measured table in a model's README.md, between two markers, rendered from a Report and never
typed.

Everything outside the markers is the author's and stays byte for byte. A card without markers gets
them at its end; a folder without a card gets one. The file is replaced whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmquant import MEASURED_END as END
from llmquant import MEASURED_START as START
from llmquant import replace_file
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.results import ModelResult
from llmquant_eval.report.schema import Report
from llmquant_eval.report.table import HEADERS, footnotes, metric_cell, row, side_tables

_DETAILS = (
    ("KL median", "kl_median"),
    ("p90", "kl_p90"),
    ("p99", "kl_p99"),
    ("p99.9", "kl_p99.9"),
    ("max", "kl_max"),
    ("RMS Δp", "rms_delta_p"),
)


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(headers) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [headers, rule, *rows]]


def _name(result: ModelResult) -> str:
    """The label with what would break a Markdown table taken out."""
    return f"{result.label} ({result.scheme})".replace("|", "\\|")


def measured_section(report: Report, label: str) -> str:
    """The Markdown between the markers: this model beside the reference, protocols, text and
    command.

    Raises:
        KeyError: the report has no model of that label.
    """
    shown = [m for m in report.models if m.role == "reference"] + [report.model(label)]
    rows = [[_name(m), *(" ".join(filter(None, pair)) for pair in row(m))] for m in shown]
    lines = [*_markdown_table(["model", *HEADERS], rows), ""]
    metrics = report.model(label).metrics
    if "kl_mean" in metrics:
        details = [" ".join(filter(None, metric_cell(metrics, name))) for _, name in _DETAILS]
        lines += [
            *_markdown_table(["per token", *(title for title, _ in _DETAILS)], [["", *details]]),
            "",
        ]
    names = [m.label for m in shown]
    for side_table in side_tables(report):
        rows = [list(cells) for cells in side_table.rows if cells[0] in names]
        lines += [*_markdown_table([side_table.title, *side_table.headers], rows), ""]
    lines += [f"- {note}" for note in footnotes(report)]
    if report.text is not None:
        lines.append(
            f"- Text: `{report.text.source}`, sha256 `{report.text.sha256}`, {report.text.tokens} tokens."
        )
    lines += [
        f"- Measured {report.created:%Y-%m-%d} with "
        + ", ".join(f"{name} {version}" for name, version in report.versions.items())
        + ". Repeat it:",
        "",
        "```sh",
        report.command,
        "```",
    ]
    return "\n".join(lines)


def splice(card: str, section: str) -> str:
    """``card`` with ``section`` between its markers, which are added under a heading at the end
    where there are none.

    Raises:
        UsageError: one marker without the other, markers in the wrong order, or more than one pair.
    """
    starts, ends = card.count(START), card.count(END)
    block = f"{START}\n{section}\n{END}"
    if starts == ends == 0:
        return (card.rstrip("\n") + "\n\n" if card.strip() else "") + f"## Measured\n\n{block}\n"
    begin, end = card.find(START), card.find(END)
    if (starts, ends) != (1, 1) or end < begin:
        raise UsageError(
            f"the card has {starts} start and {ends} end markers; leave one {START} before one {END}"
        )
    return card[:begin] + block + card[end + len(END) :]


def write_card(folder: Path, report: Report, label: str) -> Path:
    """Put the measured table of ``label`` into ``folder/README.md``; returns the file.

    Raises:
        UsageError: the card's markers are broken.
        LlmquantError: the file cannot be read or written.
    """
    path = folder / "README.md"
    try:
        # Bytes, because a text file's line ends would be translated.
        card = path.read_bytes().decode() if path.exists() else f"# {label}\n"
        replace_file(path, splice(card, measured_section(report, label)))
    except UsageError as e:
        raise UsageError(f"{path}: {e}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise LlmquantError(f"{path} cannot be updated: {e}") from e
    return path
