"""The options of ``llmquant eval``, and those that other commands of this package have too, each
written once with its help.

Options that the library's commands have as well are in :mod:`llmquant.cli.options`. Importing this
costs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.options import from_home

ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Model folders or hub names, dense or packed, or http://HOST:PORT/v1#MODEL.",
        metavar="MODEL",
    ),
]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text", help="Text to score: file:PATH, jsonl:PATH#FIELD, hf:NAME[:CONFIG]:SPLIT[:FIELD]."
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference", help="Model to compare the others with, by KL and perplexity ratio."
    ),
]
ProtocolOption = Annotated[
    list[str] | None,
    typer.Option(
        "--protocol",
        help="ppl/gptq[-N], ppl/strided[-N[-STRIDE]], ppl/word[-N], ppl/word-wikitext[-N] or, for the "
        "answers in chats, ppl/chat[-N], with N the window; several as A,B [default: ppl/gptq].",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--window",
        help="Tokens per window [default: 2048, or the model's context where that is shorter].",
    ),
]
BosOption = Annotated[
    str,
    typer.Option(
        "--bos",
        metavar="default|each-window",
        help="default: a BOS token where the tokenizer puts one, at the start of the text; each-window: "
        "before every window, which Gemma needs. Protocol ids then end in -bos.",
    ),
]
MaxWindowsOption = Annotated[
    int | None, typer.Option("--max-windows", help="Score only the first N windows of the text.")
]
BatchSizeOption = Annotated[
    int | None, typer.Option("--batch-size", help="Windows per batch [default: about 4096 tokens].")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="Folder or hub name whose tokenizer a served model uses [default: the reference's].",
    ),
]
CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache",
        help="Folder that keeps the reference's distributions, so that later runs need not run it again, and "
        "what an unfinished run measured.",
        metavar="DIR",
        callback=from_home,
    ),
]
CacheFormOption = Annotated[
    str | None,
    typer.Option(
        "--cache-form",
        help="How --cache keeps a distribution: full-16 (all tokens, 16 bits each) or top-K (the K most "
        "likely) [default: full-16 up to 4 GiB, else top-512].",
    ),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="lm-eval tasks by NAME, or NAME=FILE.jsonl for those that read your file; several as A,B.",
    ),
]
IncludePathOption = Annotated[
    str | None,
    typer.Option(
        "--include-path",
        help="Folder with lm-eval task files of your own.",
        metavar="DIR",
        callback=from_home,
    ),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", help="Only the first N items of every task.")
]
LogSamplesOption = Annotated[
    str | None,
    typer.Option(
        "--log-samples",
        help="Folder for what lm-eval logs of each item, as JSON Lines.",
        metavar="DIR",
        callback=from_home,
    ),
]
RetryForOption = Annotated[
    float | None,
    typer.Option(
        "--retry-for",
        help="Seconds to keep asking a server that is busy or cannot be reached [default: 120; 30 for the first contact].",
        metavar="SECONDS",
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Write the Report there as JSON; with --suite, a folder of Reports.",
        callback=from_home,
    ),
]
ResultOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write the result as JSON.", callback=from_home
    ),
]
CardOption = Annotated[
    bool, typer.Option("--card", help="Put the table into the README.md of each candidate.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
CostOption = Annotated[
    bool, typer.Option("--cost/--no-cost", help="Measure load time, speed and memory.")
]
NoiseFloorOption = Annotated[
    bool,
    typer.Option(
        "--noise-floor/--no-noise-floor",
        help="Measure the KL that rounding alone gives, on a few windows.",
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(help="Write one self-contained HTML page.", metavar="FILE", callback=from_home),
]
MarkdownOption = Annotated[
    Path | None, typer.Option(help="Write Markdown.", metavar="FILE", callback=from_home)
]
PlotsOption = Annotated[
    Path | None,
    typer.Option("--plots", help="Write plots as PNG and SVG.", metavar="DIR", callback=from_home),
]
SuiteOption = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Measure a suite of models, texts and protocols: a YAML file, or quick or standard.",
    ),
]
MissingOption = Annotated[
    bool,
    typer.Option(
        "--missing",
        help="With --suite: measure only models whose report is missing from the results or outdated.",
    ),
]


def share_of(text: str) -> float | None:
    """``1%``, ``1 %`` or ``0.01`` as a number; None for anything else."""
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        return None
