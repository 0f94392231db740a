"""Options of ``llmquant qat`` that no other command has. Importing this costs no torch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.options import from_home


class Size(StrEnum):
    """What is trained."""

    scales = "scales"
    codes = "codes"
    lora = "lora"


class Norms(StrEnum):
    """Whether norms are trained."""

    auto = "auto"
    on = "on"
    off = "off"


StartArgument = Annotated[
    str,
    typer.Argument(help="Quantized folder or hub name of any tool; or a model to quantize first."),
]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The unquantized original, towards which is trained [default: MODEL itself, if unquantized].",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Text to train on: file:PATH, jsonl:PATH#FIELD, hf:NAME[:CONFIG]:SPLIT[:FIELD]. Of chats, the answers count.",
    ),
]
HeldoutOption = Annotated[
    int | None,
    typer.Option("--heldout", help="Windows that are kept out and decide [default: 16]."),
]
HeldoutDataOption = Annotated[
    str | None,
    typer.Option("--heldout-data", metavar="SOURCE", help="Take them from another text."),
]
SizeOption = Annotated[
    Size | None,
    typer.Option(help="scales (codes stay), codes, or lora [default: scales]."),
]
StepsOption = Annotated[int | None, typer.Option(help="Steps of AdamW, at most [default: 200].")]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Windows per step [default: 8].")
]
MicroOption = Annotated[
    int | None, typer.Option("--micro-batch", help="Of those, at a time [default: 1].")
]
LengthOption = Annotated[
    int | None, typer.Option("--seqlen", help="Tokens per window [default: 512].")
]
SamplesOption = Annotated[
    int | None, typer.Option("--nsamples", help="Windows to train on [default: all, or all used].")
]
RateOption = Annotated[
    float | None, typer.Option("--lr", help="Of scales and norms, as a share [default: 0.002].")
]
CodesRateOption = Annotated[
    float | None, typer.Option("--codes-lr", help="Of latents, in codes [default: 0.01].")
]
LoraRateOption = Annotated[
    float | None, typer.Option("--lora-lr", help="Of adapters [default: 0.0005].")
]
RankOption = Annotated[int | None, typer.Option("--rank", help="Of adapters [default: 16].")]
NormsOption = Annotated[
    Norms | None, typer.Option(help="Train norms: auto is where a grid is asymmetric.")
]
TopKOption = Annotated[
    int | None,
    typer.Option("--top-k", help="Logits of the original to keep per token; 0: all [default: 64]."),
]
TemperatureOption = Annotated[
    float | None, typer.Option(help="Of both distributions [default: 1].")
]
HiddenLossOption = Annotated[
    float | None, typer.Option("--hidden-loss", help="Weight of a loss on last hidden states.")
]
NextLossOption = Annotated[
    float | None, typer.Option("--next-token-loss", help="Weight of a loss on the text's tokens.")
]
ChecksOption = Annotated[
    int | None, typer.Option(help="How often the held-out text is measured [default: 10].")
]
PatienceOption = Annotated[
    int | None,
    typer.Option(help="Measurements without a new best after which it ends [default: 4]."),
]
CheckpointingOption = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Compute blocks twice to save memory [default: where memory is short].",
    ),
]
CacheOption = Annotated[
    str,
    typer.Option("--max-cache", metavar="SIZE", help="Disk that the original's logits may take."),
]
LogOption = Annotated[
    Path | None,
    typer.Option(help="JSON line per step; default: OUTPUT.qat.log.jsonl.", callback=from_home),
]
PlotOption = Annotated[
    bool, typer.Option("--plot/--no-plot", help="Draw the losses into OUTPUT.qat.png.")
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of windows and their order.")]
