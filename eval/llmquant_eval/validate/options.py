"""The options of ``llmquant validate``, each with its help.

Those that other commands have too are in :mod:`llmquant_eval.cli_options` and
:mod:`llmquant.cli.options`. Importing this costs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.options import from_home

ModelArgument = Annotated[
    str,
    typer.Argument(
        help="Model folder or hub name, dense or packed, or http://HOST:PORT/v1#MODEL.",
        metavar="MODEL",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="Your prompts, JSON Lines: a prompt or messages on each line, and what a good answer is "
        "(docs/evaluation.md has the keys).",
        metavar="FILE",
        callback=from_home,
    ),
]
OutputOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Results as JSON, for `llmquant compare`.",
        callback=from_home,
    ),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        help="Results of the original on the same data, to show beside these.",
        metavar="FILE",
        callback=from_home,
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="Also write what prompts and answers are like (counts and hashes, no text), for `llmquant serve --drift`.",
        metavar="FILE",
        callback=from_home,
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure only this; several times for several [default: all that the data has].",
        metavar="NAME",
    ),
]
ScorerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A scorer of your own. The file is Python code, and it is run on this machine. "
        "Several times for several.",
        metavar="FILE.py:FUNCTION",
    ),
]
LowerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lower-is-better", help="Of this metric of your scorers less is better.", metavar="NAME"
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(help="System message for prompts without one.", metavar="TEXT")
]
MaxTokensOption = Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)]
TemperatureOption = Annotated[float, typer.Option(help="0: greedy.", min=0.0)]
SeedOption = Annotated[
    int, typer.Option(help="Of drawing, with a temperature above 0.", min=0, max=2**63 - 1)
]
LimitOption = Annotated[int | None, typer.Option(help="Only the first N items.", metavar="N")]
RawOption = Annotated[
    bool, typer.Option("--raw", help="Continue prompts as text; do not use the chat template.")
]
NoTextOption = Annotated[
    bool, typer.Option("--no-text", help="Leave prompts and answers out of the results.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name whose tokenizer a served model uses; needed for log-probabilities.",
        metavar="MODEL",
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(help="Prompts answered together [default: 8].", min=1, metavar="N")
]
